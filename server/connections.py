"""What a connection may take before its request has arrived whole: time, and a place."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# A request's line and headers; the parser itself has no limit.
HEAD_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Limits:
    """Connections open at once, and the seconds that each request may take to arrive."""

    max_connections: int
    receive_timeout_s: float


def limited(
    limits: Limits, on_count: Callable[[int], object] = lambda _: None
) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol on httptools, held to `limits` and to HEAD_BYTES.

    `on_count` is told how many connections are open whenever that changes.

    uvicorn ends connections that are silent between requests, but waits for ever for a first
    request and for the rest of one. Here such a connection ends after the time-out. When more
    connections than allowed are open, the one that has waited longest for a request gives up
    its place.
    """
    waiting: dict[HttpToolsProtocol, None] = {}  # in the order in which they began to wait

    class LimitedProtocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _head_bytes: int | None = None  # of the head that is arriving, if one is

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            on_count(len(self.connections))
            self._watch()
            if len(self.connections) > limits.max_connections and waiting:
                oldest = next(iter(waiting))
                oldest.transport.abort()
                del waiting[oldest]

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(exc)
            on_count(len(self.connections))

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head_bytes is not None:
                self._head_bytes += len(data)
                if self._head_bytes > HEAD_BYTES:
                    self.send_400_response("The request's headers are over 64 KiB.")
            self._watch()

        def on_message_begin(self) -> None:
            self._head_bytes = 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_bytes = None
            super().on_headers_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            """Let the time-out run while a request has not arrived whole, and no longer."""
            cycle = self.cycle
            arrived = cycle is not None and not (cycle.response_complete or cycle.more_body)
            if arrived or self.transport.is_closing():
                self._stop_watching()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(
                    limits.receive_timeout_s, self.transport.abort
                )
                waiting[self] = None

        def _stop_watching(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
            waiting.pop(self, None)

    return LimitedProtocol
