"""Calls between the supervisor and a worker, both ways: JSON, a line for each message."""

import asyncio
import itertools
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

Answer = Callable[[str, dict[str, Any]], Awaitable[Any]]

# Profiles and metrics are the longest messages: some hundred KiB.
_LINE_BYTES = 2**26


class LostError(ConnectionError):
    """The other process has ended."""


class RemoteError(Exception):
    """The other process could not answer; the message is its own."""


class Channel:
    """One end of a pair of sockets. What the other end calls is answered by `answer`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer
    ) -> None:
        self._reader, self._writer, self._answer = reader, writer, answer
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._is_lost = False

    @property
    def is_lost(self) -> bool:
        """Return whether the other process has ended, or closed its socket."""
        return self._is_lost

    async def call(self, name: str, **given: Any) -> Any:  # noqa: ANN401  any JSON
        """Return what the other process answers.

        Raises:
            LostError: it has ended.
            RemoteError: it could not answer.
        """
        if self._is_lost:
            raise LostError("the other process has ended")
        number = next(self._ids)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send({"id": number, "call": name, "given": given})
        try:
            return await future
        finally:
            self._waiting.pop(number, None)

    def tell(self, name: str, **given: Any) -> None:  # noqa: ANN401  any JSON
        """Call without waiting for an answer."""
        if not self._is_lost:
            self._send({"call": name, "given": given})

    async def run(self) -> None:
        """Take messages until the other process ends or closes its socket."""
        try:
            async for line in self._reader:
                self._take(json.loads(line))
        except (OSError, ValueError):  # reset, or cut off in the middle of a line
            pass
        finally:
            self._is_lost = True
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(LostError("the other process has ended"))
            self._writer.close()

    def _take(self, message: dict[str, Any]) -> None:
        if "call" in message:
            task = asyncio.create_task(self._reply(message))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            return
        future = self._waiting.get(message["id"])
        if future is None or future.done():  # nobody waits any more
            return
        if "error" in message:
            future.set_exception(RemoteError(message["error"]))
        else:
            future.set_result(message["answer"])

    async def _reply(self, message: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"id": message.get("id")}
        try:
            reply["answer"] = await self._answer(message["call"], message["given"])
        except Exception as error:  # the caller is told; here there is nobody else
            reply["error"] = f"{type(error).__name__}: {error}"
        if "id" in message and not self._is_lost:
            self._send(reply)

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")


async def open_channel(connection: socket.socket, answer: Answer) -> Channel:
    """Return a channel over one of a pair of sockets; it works while its `run` does."""
    connection.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=connection, limit=_LINE_BYTES)
    return Channel(reader, writer, answer)


def say(connection: socket.socket, name: str, **given: Any) -> None:  # noqa: ANN401  any JSON
    """Tell something before there is an event loop, or after."""
    connection.setblocking(True)
    connection.sendall(json.dumps({"call": name, "given": given}).encode() + b"\n")
