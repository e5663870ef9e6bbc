"""Sends one HTTP request over and over, for as little of the sender's time as Python allows.

Closed loop: each connection sends its next request when it has the answer to the last. Open loop:
requests go out at their times, and a latency counts from when a request should have been sent.
"""

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from benchmarks.open_loop import until

MS = 1e3
OK = 200
# Connections that are open before the first request of an open loop. To open one costs sender and
# server as much as a request does: a burst at the start would find none, and more behind it.
READY = 32
BROKEN = 0  # in the place of a status: the server ended the connection, as one does that drowns


@dataclass(frozen=True, slots=True)
class Call:
    """One request: where it goes, and its bytes."""

    url: str
    media_type: str
    body: bytes

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def to_bytes(self) -> bytes:
        """Return the request as it goes over a connection that is kept."""
        parts = urlsplit(self.url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        head = (
            f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Type: {self.media_type}\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + self.body


@dataclass(slots=True)
class Latencies:
    """What came back: latencies of the answers with status 200, in ms, and how many were none."""

    ms: list[float] = field(default_factory=list)
    failed: int = 0

    def add(self, status: int, latency_s: float) -> None:
        """Count one answer."""
        if status == OK:
            self.ms.append(MS * latency_s)
        else:
            self.failed += 1


class Connection(asyncio.Protocol):
    """One kept connection, with one request on its way at most."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  narrows: this is TCP
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Hand the status over; the parser calls this at the end of an answer."""
        status = self._parser.get_status_code()
        self._parser = httptools.HttpResponseParser(self)
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server hung up"))

    async def send(self, request: bytes) -> int:
        """Return the status of the answer.

        Raises:
            OSError: the connection broke.
        """
        if self._transport is None or not self.is_open:
            raise ConnectionResetError("the server hung up")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    @property
    def is_open(self) -> bool:
        """Return whether the server has not hung up, as servers do on connections long idle."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()


async def connect(call: Call) -> Connection:
    """Return a connection to where a call goes.

    Raises:
        OSError: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, *call.address)
    return connection


async def closed_loop(call: Call, connections: int, seconds: float) -> tuple[Latencies, float]:
    """Return what came back over so many connections, and over how many seconds.

    Raises:
        OSError: nobody listens there.
    """
    found, request = Latencies(), call.to_bytes()
    kept = [await connect(call) for _ in range(connections)]

    async def repeat(connection: Connection, until_s: float) -> None:
        while (began_s := time.perf_counter()) < until_s:
            try:
                status = await connection.send(request)
            except ConnectionError:
                status = BROKEN
                connection = await connect(call)
                kept.append(connection)
            found.add(status, time.perf_counter() - began_s)

    try:
        began_s = time.perf_counter()
        await asyncio.gather(*(repeat(one, began_s + seconds) for one in kept))
        return found, time.perf_counter() - began_s
    finally:
        for one in kept:
            one.close()


async def open_loop(call: Call, arrivals_s: Sequence[float]) -> Latencies:
    """Return what came back of requests sent at these times, on as many connections as it takes:
    READY at first.

    Raises:
        OSError: nobody listens there.
    """
    found, request = Latencies(), call.to_bytes()
    free = [await connect(call) for _ in range(READY)]
    made = list(free)

    async def send(due_s: float) -> None:
        while free and not free[-1].is_open:
            free.pop()
        if free:
            connection = free.pop()
        else:
            connection = await connect(call)
            made.append(connection)
        try:
            status = await connection.send(request)
        except ConnectionError:
            status = BROKEN
        found.add(status, time.perf_counter() - due_s)
        free.append(connection)

    gc.collect()
    gc.disable()  # a pause of the sender's would count as the server's
    try:
        began_s = time.perf_counter()
        sent = []
        for arrival_s in arrivals_s:
            await until(began_s + arrival_s)
            sent.append(asyncio.ensure_future(send(began_s + arrival_s)))
        await asyncio.gather(*sent)
        return found
    finally:
        gc.enable()
        for one in made:
            one.close()
