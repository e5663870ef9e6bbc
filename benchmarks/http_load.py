"""Sends HTTP requests for as little of the sender's time as Python allows.

Closed loop: each connection sends its next request when it has the answer to the last. Open loop:
requests go out at their times whatever became of those before, and a latency counts from when a
request should have been sent: one that had to wait for a connection, or for the sender itself,
waited like any other (coordinated omission, as Gil Tene named it).
"""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import httptools

T = TypeVar("T")

MS = 1e3
OK = 200
# Connections that are open before the first request of an open loop. To open one costs sender and
# server as much as a request does: a burst at the start would find none, and more behind it.
READY = 32
BROKEN = 0  # in the place of a status: the server ended the connection, as one does that drowns
# Sleeping is that exact, as timers count whole milliseconds; the rest is spun away.
SPIN_S = 1.5e-3


@dataclass(frozen=True, slots=True)
class Call:
    """One request: where it goes, and its bytes."""

    url: str
    media_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def to_bytes(self) -> bytes:
        """Return the request as it goes over a connection that is kept."""
        parts = urlsplit(self.url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        fields = {
            "Host": parts.netloc,
            "Content-Type": self.media_type,
            "Content-Length": str(len(self.body)),
            **self.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"POST {target} HTTP/1.1\r\n{head}\r\n".encode() + self.body


class Answer(NamedTuple):
    """What came back: the status and the body; and when the request was written, perf_counter s."""

    status: int
    body: bytes
    written_s: float


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
        self._body = b""
        self._transport: asyncio.Transport | None = None
        self.written_s: float | None = None  # the last request; None if it was not

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  narrows: this is TCP
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body; the parser calls this."""
        self._body += body

    def on_message_complete(self) -> None:
        """Hand the status over; the parser calls this at the end of an answer."""
        status = self._parser.get_status_code()
        self._parser = httptools.HttpResponseParser(self)
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server hung up"))

    async def send(self, request: bytes) -> Answer:
        """Return the answer.

        Raises:
            OSError: the connection broke.
        """
        self.written_s = None
        if self._transport is None or not self.is_open:
            raise ConnectionResetError("the server hung up")
        self._answer = asyncio.get_running_loop().create_future()
        self._body = b""
        self._transport.write(request)
        self.written_s = written_s = time.perf_counter()
        return Answer(await self._answer, self._body, written_s)

    @property
    def is_open(self) -> bool:
        """Return whether the server has not hung up, as servers do on connections long idle."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()


async def connect(address: tuple[str, int]) -> Connection:
    """Return a connection.

    Raises:
        OSError: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, *address)
    return connection


class Pool:
    """Connections to one server, each with one request at most: as many as it takes."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._free: list[Connection] = []
        self._made: list[Connection] = []

    async def open(self) -> None:
        """Have READY connections.

        Raises:
            OSError: nobody listens there.
        """
        self._free = [await connect(self._address) for _ in range(READY)]
        self._made = list(self._free)

    async def send(self, request: bytes) -> Answer:
        """Return the answer, of status BROKEN where the connection broke."""
        while self._free and not self._free[-1].is_open:
            self._free.pop()
        if self._free:
            connection = self._free.pop()
        else:
            connection = await connect(self._address)
            self._made.append(connection)
        try:
            return await connection.send(request)
        except ConnectionError:
            return Answer(BROKEN, b"", connection.written_s or time.perf_counter())
        finally:
            self._free.append(connection)

    def close(self) -> None:
        """Hang up."""
        for connection in self._made:
            connection.close()


async def closed_loop(call: Call, connections: int, seconds: float) -> tuple[Latencies, float]:
    """Return what came back over so many connections, and over how many seconds.

    Raises:
        OSError: nobody listens there.
    """
    found, request = Latencies(), call.to_bytes()
    kept = [await connect(call.address) for _ in range(connections)]

    async def repeat(connection: Connection, until_s: float) -> None:
        while (began_s := time.perf_counter()) < until_s:
            try:
                status = (await connection.send(request)).status
            except ConnectionError:
                status = BROKEN
                connection = await connect(call.address)
                kept.append(connection)
            found.add(status, time.perf_counter() - began_s)

    try:
        began_s = time.perf_counter()
        await asyncio.gather(*(repeat(one, began_s + seconds) for one in kept))
        return found, time.perf_counter() - began_s
    finally:
        for one in kept:
            one.close()


async def open_loop(call: Call, arrivals_s: Sequence[float]) -> tuple[Latencies, float]:
    """Return what came back of requests sent at these times, and after how many seconds all had.

    Raises:
        OSError: nobody listens there.
    """
    found, request = Latencies(), call.to_bytes()
    pool = Pool(call.address)

    async def send(i: int, due_s: float) -> float:
        answer = await pool.send(request)
        latency_s = time.perf_counter() - due_s
        found.add(answer.status, latency_s)
        return arrivals_s[i] + latency_s

    await pool.open()
    try:
        return found, max(await at_their_times(arrivals_s, send))
    finally:
        pool.close()


async def at_their_times(
    arrivals_s: Sequence[float],
    send: Callable[[int, float], Awaitable[T]],
    resting: Callable[[int], None] = lambda _sent: None,
) -> list[T]:
    """Start `send` for each arrival at its time, given its number and perf_counter; return what
    all have returned. No garbage is collected meanwhile: a pause would count as the server's.

    resting: called shortly before an arrival for which the sender waits, where all that was started
    has returned, with how many that are.
    """
    gc.collect()
    gc.disable()
    try:
        began_s = time.perf_counter()
        sent: list[asyncio.Future[T]] = []
        returned = 0  # of those started first
        for i, arrival_s in enumerate(arrivals_s):
            waits_s = began_s + arrival_s - time.perf_counter() - SPIN_S
            if waits_s > 0:
                await asyncio.sleep(waits_s)
                while returned < i and sent[returned].done():
                    returned += 1
                if returned == i:
                    resting(i)
            await _until(began_s + arrival_s)
            sent.append(asyncio.ensure_future(send(i, began_s + arrival_s)))
        return await asyncio.gather(*sent)
    finally:
        gc.enable()


async def _until(due_s: float) -> None:
    """Return at `due_s`, having let others go on at least once."""
    await asyncio.sleep(0)
    while time.perf_counter() < due_s:
        await asyncio.sleep(0)
