"""What a connection may take before its request has arrived whole: time, and a place.

And inferences that arrive whole, which are begun and answered here, past ASGI.
"""

import asyncio
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from server.direct import FAILED
from server.errors import BadRequestError
from server.http import refusal
from server.patience import Patience

# A request's line and headers; the parser itself has no limit.
HEAD_BYTES = 64 * 2**10
_LARGE_HEAD = "the request's headers are over 64 KiB"
# Requests that wait for those before them on their connection. What one read brings is all parsed,
# and 256 kB are 14,000 of the shortest.
MOST_PIPELINED = 64
# A body up to this size is waited for here; uvicorn itself reads as much before anybody asks.
SMALL_BYTES = HIGH_WATER_LIMIT
# For so long a connection may be silent between requests: uvicorn's own default.
KEEP_ALIVE_S = 5.0


@dataclass(frozen=True)
class Limits:
    """Connections open at once, and the seconds that each request may take to arrive."""

    max_connections: int
    receive_timeout_s: float


class UnderWay(Protocol):
    """A request that was begun."""

    def answer(self, outcome: Any) -> tuple[int, Iterable[tuple[bytes, bytes]], bytes]:  # noqa: ANN401
        """Return status, headers and body, or raise what the application is to answer."""

    def give_up(self) -> None:
        """Forget it: the client hung up."""


class Whole(Protocol):
    """What begins requests without ASGI."""

    @property
    def paths(self) -> Container[str]:
        """Return the paths of what it takes."""

    def begin(
        self, scope: Mapping[str, Any], body: bytes, tell: Callable[[Any], None]
    ) -> UnderWay | None:
        """Begin a POST to one of the paths; None: let the application have it. May raise.

        `tell` gets the outcome to answer with, unless it is given up; not from within.
        """


def limited(
    limits: Limits,
    whole: Whole | None = None,
    on_count: Callable[[int], object] = lambda _: None,
    is_leaving: Callable[[], bool] = lambda: False,
) -> Callable[..., asyncio.Protocol]:
    """Return what makes connections of uvicorn's arguments, held to `limits` and to HEAD_BYTES.

    `whole` begins what it takes of requests that came whole; `on_count` is told how many
    connections are open whenever that changes; once `is_leaving`, each ends with its next answer.
    """
    return partial(LimitedProtocol, Together(limits, whole, on_count, is_leaving))


class Together:
    """What all connections of a server have in common."""

    def __init__(
        self,
        limits: Limits,
        whole: Whole | None,
        on_count: Callable[[int], object],
        is_leaving: Callable[[], bool],
    ) -> None:
        self.max_connections = limits.max_connections
        self.whole, self.on_count, self.is_leaving = whole, on_count, is_leaving
        # Those that a request is to arrive on, or that are to read an answer; and those between
        # requests.
        self.receiving: Patience[LimitedProtocol] = Patience(
            limits.receive_timeout_s, LimitedProtocol.abort
        )
        self.idle: Patience[LimitedProtocol] = Patience(
            KEEP_ALIVE_S, LimitedProtocol.timeout_keep_alive_handler
        )


class LimitedProtocol(HttpToolsProtocol):
    """One connection: uvicorn's on httptools, held to limits. `limited` makes them for a server.

    uvicorn ends connections that are silent between requests, but waits for ever for a first
    request, for the rest of one, and until an answer is read. Here such a connection ends after
    the time-out. When more connections than allowed are open, the one that has waited longest for
    a request gives up its place.

    A request whose body is small waits for it here, and is begun by the `whole` of `limited` where
    that takes it: without a task, without coroutines, and answered with one write: the application
    takes longer. It has all others, and answers errors that nobody foresaw. What is no request is
    refused here, once those before it are answered, and ends the connection.
    """

    def __init__(self, together: Together, *given: Any, **named: Any) -> None:  # noqa: ANN401
        super().__init__(*given, **named)
        self._together = together
        self._head_bytes: int | None = None  # that reads before brought of the head that arrives
        self._read_bytes = 0  # of this read
        self._read_requests = 0  # that it has bytes of
        self._framing_bytes = 0  # of chunks' sizes and of trailers, since the last of the body came
        self._is_lost = False
        self._is_at_head = False
        self._is_at_upgrade = False  # at a head that is to be read again
        self._held: tuple[RequestResponseCycle, Any] | None = None  # until its body is here
        self._under_way: UnderWay | None = None
        self._answered: RequestResponseCycle | None = None  # the one that is, or was last
        self._refusal: str | None = None  # why nothing more is read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        together = self._together
        together.on_count(len(self.connections))
        self._watch()
        oldest = together.receiving.first
        if len(self.connections) > together.max_connections and oldest is not None:
            together.receiving.end(oldest)
            oldest.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._together.receiving.end(self)
        self._together.idle.end(self)
        super().connection_lost(exc)
        self.pipeline.clear()
        cycle = self._answered
        if cycle is not None and not cycle.response_complete:
            # uvicorn tells the request that came last, which may wait for this one.
            cycle.disconnected = True
            cycle.message_event.set()
        if self._held is not None:
            self._hand_on(*self._held)
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.give_up()
        self._together.on_count(len(self.connections))

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        is_amid = self._head_bytes is not None or (self.cycle is not None and self.cycle.more_body)
        self._read_bytes, self._read_requests = len(data), int(is_amid)
        self._framing_bytes += len(data)
        self._parse(data)
        if self.cycle is not None and self.cycle.more_body:
            self._limit_framing()
        if self._head_bytes is not None and self._read_requests == 1:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.send_400_response(_LARGE_HEAD)
        if self._held is not None and not _is_small(self._held[0].scope):
            self._hand_on(*self._held)
        self._watch()

    def _parse(self, data: bytes) -> None:
        """Parse what came, as uvicorn does, but pass over wishes for another protocol."""
        self._together.idle.end(self)
        try:
            while data:
                data = self._parsed(data)
        except httptools.HttpParserError:
            why = "Invalid HTTP request received."
            self.logger.warning(why)
            self.send_400_response(why)

    def _parsed(self, data: bytes) -> bytes:
        """Return what is left to parse."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self._is_at_upgrade = False
            head = _without_upgrade(self.parser, self.url, self.headers)
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            return head + data[stopped.args[0] :]
        return b""

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._read_requests += 1
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_bytes is not None:  # else it is a trailer: nobody asks for those
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        most = (self._head_bytes or 0) + self._read_bytes
        self._head_bytes = None
        if most > HEAD_BYTES and _head_size(self.url, self.headers) > HEAD_BYTES:
            self.send_400_response(_LARGE_HEAD)
            raise ValueError("too large a head")  # the parser stops
        self._framing_bytes = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("no tunnels are made here")  # the parser stops
            self._is_at_upgrade = True
            return
        if len(self.pipeline) >= MOST_PIPELINED:
            self.send_400_response(f"over {MOST_PIPELINED} requests wait on this connection")
            raise ValueError("too many pipelined requests")  # the parser stops
        if self.expect_100_continue and self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # to be ignored (RFC 9110, section 10.1.1)
        self._is_at_head = True
        super().on_headers_complete()
        self._is_at_head = False
        if self._together.is_leaving() and self.cycle is not None:  # the client is to go elsewhere
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if self._is_at_upgrade:
            return
        super().on_message_complete()
        self.cycle.more_body = False  # uvicorn leaves it where the answer came first
        if self._held is not None:
            self._begin(*self._held)

    def on_response_complete(self) -> None:
        """As uvicorn's, but for its timer."""
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            else:
                self._together.idle.begin(self, self.loop)
        if self._refusal is not None:
            self._refuse_in_turn()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Read nothing more; say why once the requests before it are answered."""
        if self._refusal is not None:
            return
        self._refusal = msg
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()
        self._refuse_in_turn()

    def _refuse_in_turn(self) -> None:
        cycle = self._answered
        if self._refusal is None or self.transport.is_closing():
            return
        is_broken = cycle is not None and cycle.more_body  # what is refused is the rest of it
        if cycle is not None and is_broken and cycle.response_started:
            self.transport.abort()
        elif cycle is None or is_broken or cycle.response_complete:
            self.transport.write(_refused(self._refusal))
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def _limit_framing(self) -> None:
        if self._framing_bytes > HEAD_BYTES:
            self.send_400_response("the request's trailers are over 64 KiB")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401
        scope, whole = cycle.scope, self._together.whole
        self._answered = cycle
        if (
            whole is not None
            and self._is_at_head  # else it has waited for those before it on its connection
            and scope["path"] in whole.paths
            and scope["method"] == "POST"
            and not cycle.waiting_for_100_continue
            and not self.flow.write_paused
        ):
            self._held = cycle, app
        else:
            super()._start_asgi_task(cycle, app)

    def _hand_on(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401
        self._held = None
        super()._start_asgi_task(cycle, app)

    def _begin(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401
        self._held = None
        try:
            answer = partial(self._answer, cycle, app)
            whole = self._together.whole
            under_way = whole.begin(cycle.scope, bytes(cycle.body), answer) if whole else None
        except Exception as error:
            cycle.scope["state"][FAILED] = error
            under_way = None
        self._under_way = under_way
        if under_way is None:
            self._hand_on(cycle, app)

    def _answer(self, cycle: RequestResponseCycle, app: Any, outcome: Any) -> None:  # noqa: ANN401
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        try:
            status, headers, body = under_way.answer(outcome)
        except Exception as error:
            cycle.scope["state"][FAILED] = error
            self._hand_on(cycle, app)
            return
        if not cycle.disconnected:
            _write(cycle, status, headers, body)

    def _watch(self) -> None:
        """Let the time-out run while the client is waited for: to send a request whole, or to
        read its answer."""
        cycle = self.cycle
        arrived = cycle is not None and not (cycle.response_complete or cycle.more_body)
        unread = self.flow.write_paused or self.transport.is_closing()
        if self._is_lost or (arrived and not unread):
            self._together.receiving.end(self)
        else:
            self._together.receiving.begin(self, self.loop)

    def abort(self) -> None:
        """End it, whatever is still to be sent."""
        self.transport.abort()


def _head_size(url: bytes, headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return about how many bytes a head had on the wire."""
    return len(url) + sum(len(name) + len(value) + len(b": \r\n") for name, value in headers)


def _is_small(scope: Mapping[str, Any]) -> bool:
    """Return whether a body that is still coming is announced to be small."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return value.isdigit() and int(value[:20]) <= SMALL_BYTES
    return False


def _without_upgrade(
    parser: httptools.HttpRequestParser, url: bytes, headers: Iterable[tuple[bytes, bytes]]
) -> bytes:
    """Return the head that was parsed, without what asks for another protocol."""
    line = b"%b %b HTTP/%b\r\n" % (parser.get_method(), url, parser.get_http_version().encode())
    kept = (b"%b: %b\r\n" % header for header in headers if header[0] != b"upgrade")
    return line + b"".join(kept) + b"\r\n"


def _refused(why: str) -> bytes:
    """Return the answer to what is no request."""
    return _message(*refusal(BadRequestError(why)), keep_alive=False)


def _write(
    cycle: RequestResponseCycle, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> None:
    """Send an answer, as two of the application's messages would."""
    every = (*cycle.default_headers, *headers)
    cycle.transport.write(_message(status, every, body, keep_alive=cycle.keep_alive))
    cycle.response_started = cycle.response_complete = True
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()


def _message(
    status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes, *, keep_alive: bool
) -> bytes:
    parts = [STATUS_LINE[status]]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    parts += (b"\r\n" if keep_alive else b"connection: close\r\n\r\n", body)
    return b"".join(parts)
