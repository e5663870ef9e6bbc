"""Keeps what a request runs through in the processor's caches, while no request comes.

A host is rarely there for one server alone: others take the caches over, and a request after a
pause takes several times as long as one after another (benchmarks/results/overhead.json). So an
inference goes through the server now and then, from the bytes of a request to those of an answer,
with `server.stand_in` in the place of the service.
"""

import asyncio
import io
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import numpy as np
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from maestro_core.artifact import Tensor
from server import inputs, pictures
from server.bodies import Bodies
from server.connections import Limits, limited
from server.direct import FAILED
from server.service import Service
from server.simple import INFER, NPY, Whole
from server.stand_in import StandIn

log = logging.getLogger("maestro")

# A target, as most requests have one. One that no point makes is answered all the same.
TARGET_MS = 50.0
# Nothing is computed: an answer that takes longer is not waited for.
PATIENCE_S = 1.0
# Of the time, at most: large inputs take long to read.
SHARE = 0.05

Sender = Callable[[], Awaitable[bytes]]


async def keep_warm(service: Service, every_s: float) -> None:
    """Send a request through the server whenever none has come for `every_s`, until cancelled.

    Less often where that takes more than its share of the time.
    """
    stand_in: StandIn | None = None
    send: Sender | None = None
    took_s = 0.0
    while True:
        await asyncio.sleep(max(every_s, took_s / SHARE))
        if service.stand_in is not stand_in:  # another profile is in use
            stand_in = service.stand_in
            send = sender(stand_in) if stand_in else None
        if send is None or not service.is_quiet(every_s):
            continue
        began_s = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                answer = await send()
            if answer.startswith(STATUS_LINE[500]):
                log.warning("not kept warm any more: a request of its own failed")
                return
        took_s = time.monotonic() - began_s


def sender(stand_in: StandIn) -> Sender:
    """Return what sends a request to `stand_in`, on a connection of its own, and returns the
    beginning of its answer."""
    request = _request(stand_in.artifact.manifest.input)
    whole = Whole(stand_in, Bodies(len(request), len(request)))
    connect = limited(Limits(1, PATIENCE_S), whole)
    config = uvicorn.Config(_failed, log_config=None, access_log=False, ws="none", lifespan="off")
    state = ServerState()

    def send() -> Awaitable[bytes]:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        protocol = connect(config=config, server_state=state, app_state={})
        protocol.connection_made(_Nowhere(protocol, answer))
        protocol.data_received(request)
        return answer

    return send


class _Nowhere(asyncio.Transport):
    """A connection to nobody. What is written first settles the answer."""

    def __init__(self, protocol: asyncio.BaseProtocol, answer: asyncio.Future[bytes]) -> None:
        super().__init__()
        self._protocol, self._answer = protocol, answer
        self._is_closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._answer.done():
            self._answer.set_result(bytes(data))

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def pause_reading(self) -> None:
        """Nothing more comes."""

    def resume_reading(self) -> None:
        """Nothing more comes."""


async def _failed(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer what `Whole` could not."""
    log.error("a request of the server's own failed", exc_info=scope["state"].get(FAILED))
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body"})


def _request(tensor: Tensor) -> bytes:
    """Return a request with one sample: a picture where the model takes pictures."""
    kind, body = "image/png", inputs.blank_picture(tensor.image, "PNG") if tensor.image else b""
    if not body or pictures.takes_long(body):
        file = io.BytesIO()
        np.save(file, np.zeros((1, *tensor.shape[1:]), np.float32))
        kind, body = NPY[0], file.getvalue()
    head = (
        f"POST {INFER}?max_latency_ms={TARGET_MS:g} HTTP/1.1\r\n"
        "host: localhost\r\nuser-agent: maestro\r\naccept: */*\r\n"
        f"content-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
