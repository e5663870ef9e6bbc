"""The simple call, /infer: from what a client sends to what it is answered."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray

from maestro_core.artifact import Artifact
from server import inputs, pictures, tracing
from server.answers import Inference, infer_answer
from server.bodies import Bodies, Body
from server.direct import Call
from server.dispatcher import Tell
from server.errors import ServiceError, UnsupportedMediaError
from server.http import (
    Header,
    Pairs,
    Written,
    form_file,
    header_targets_ms,
    headers_of,
    media_type,
    query_of,
    refusal,
    to_json,
)
from server.schemas import InferParameters, parse_parameters
from server.service import Service

Floats = NDArray[np.float32]

INFER = "/infer"

JSON = "application/json"
NPY = ("application/x-npy", "application/npy")
PICTURES = ("image/png", "image/jpeg", "image/jpg")
FORM = "multipart/form-data"
# So many large pictures are decoded at once: pixels take far more room than the body did.
LARGE_AT_ONCE = 2
# What clients send when nobody told them the type: `curl --data-binary` the last.
_UNSAID = ("", "application/octet-stream", "application/x-www-form-urlencoded")
_SERVED = ", ".join((JSON, *PICTURES[:2], NPY[0], FORM))
_JSON_BYTES = JSON.encode()


def infer_call(service: Service, bodies: Bodies) -> Call:
    """Return what answers the simple call."""
    decoding = asyncio.Semaphore(LARGE_AT_ONCE)

    async def infer(request: Request) -> Response:
        service.serving()
        scope = request.scope
        arrived_s: float = scope[tracing.ARRIVED]
        headers = headers_of(scope)
        kind = media_type(headers)
        form: Pairs = ()
        with bodies.one() as arriving:
            body = await arriving.read(request)
            if kind == FORM:
                kind, body, form = await form_file(request, body)
            if pictures.takes_long(body):  # others are served meanwhile
                async with decoding:
                    x, given = await asyncio.to_thread(_input, kind, body, service)
            else:
                x, given = _input(kind, body, service)
            targets_ms = header_targets_ms(headers)
            parameters = parse_parameters(query_of(scope), given, targets_ms, form)
            served = service.artifact  # a search may replace it meanwhile
            result = await service.infer(x, parameters, arrived_s, request.receive)
        fields, answer, content = _answer(service, served, parameters, result, arrived_s)
        scope[tracing.ANSWER] = content
        return Written(200, fields, answer)

    return infer


class Counts(Protocol):
    """What counts inferences."""

    def answered(self, inference: Inference, total_ms: float, target_ms: float | None) -> None:
        """Count an answer."""

    def refused(self, code: str, reason: str | None = None) -> None:
        """Count a request that was answered with an error."""


class Begins(Protocol):
    """What begins inferences: the service, or who stands in for it."""

    @property
    def artifact(self) -> Artifact:
        """Return what is served."""

    @property
    def counting(self) -> Counts:
        """Return what counts them."""

    def serving(self) -> object:
        """Return what serves now.

        Raises:
            UnavailableError: nothing does.
        """

    def begin(
        self, x: Floats, parameters: InferParameters, arrived_s: float, tell: Tell
    ) -> Callable[[], None]:
        """As `Service.begin`."""


@dataclass(slots=True)
class UnderWay:
    """An inference that waits or runs, asked for by a request that came whole."""

    _service: Begins
    _artifact: Artifact
    _parameters: InferParameters
    _arrived_s: float
    _body: Body
    _here: tracing.Trace
    _leave: Callable[[], None]

    def answer(self, outcome: Inference | ServiceError) -> tuple[int, list[Header], bytes]:
        """Return status, headers and body of the answer."""
        self._body.give_back()
        if isinstance(outcome, ServiceError):
            return _refused(self._service, outcome, self._here)
        headers, body, _ = _answer(
            self._service, self._artifact, self._parameters, outcome, self._arrived_s
        )
        headers += self._here.headers()
        return 200, headers, body

    def give_up(self) -> None:
        """Forget it: the client hung up."""
        self._body.give_back()
        self._leave()
        self._service.counting.refused("client-gone")


@dataclass(slots=True)
class Refused:
    """One that was refused when it was to begin, and is to be told so."""

    _service: Begins
    _here: tracing.Trace

    def answer(self, outcome: ServiceError) -> tuple[int, list[Header], bytes]:
        """Return status, headers and body of the answer."""
        return _refused(self._service, outcome, self._here)

    def give_up(self) -> None:
        """Forget it: the client hung up."""
        self._service.counting.refused("client-gone")


class Whole:
    """The same call for requests that came whole, for who waits for no coroutine."""

    paths: ClassVar[tuple[str, ...]] = (INFER,)

    def __init__(self, service: Begins, bodies: Bodies) -> None:
        self._service, self._bodies = service, bodies

    def begin(self, scope: Mapping[str, Any], body: bytes, tell: Tell) -> UnderWay | Refused | None:
        """Return the inference that a request asks for; None: it goes the usual way.

        `tell` gets its outcome, unless it is given up.
        """
        arrived_s = time.monotonic()
        headers = headers_of(scope)
        kind = media_type(headers)
        is_coded = b"content-encoding" in headers or b"transfer-encoding" in headers
        if kind == FORM or is_coded or pictures.takes_long(body):
            return None
        service = self._service
        held = self._bodies.one()
        try:
            service.serving()
            held.hold(len(body))
            x, given = _input(kind, body, service)
            parameters = parse_parameters(query_of(scope), given, header_targets_ms(headers))
            served = service.artifact  # a search may replace it meanwhile
            leave = service.begin(x, parameters, arrived_s, tell)
        except ServiceError as error:
            held.give_back()
            asyncio.get_running_loop().call_soon(tell, error)
            return Refused(service, tracing.read(headers))
        except BaseException:
            held.give_back()
            raise
        here = tracing.read(headers)
        return UnderWay(service, served, parameters, arrived_s, held, here, leave)


def _input(kind: str, body: bytes, service: Begins) -> tuple[Floats, dict[str, Any]]:
    """Return the input, (n, …), and the parameters that came with it in the body."""
    tensor = service.artifact.manifest.input
    if kind in _UNSAID:
        kind = inputs.type_of(body) or kind
    if kind == JSON:
        return inputs.from_json(body, tensor)
    if kind in NPY:
        return inputs.from_npy(body, tensor), {}
    if kind in PICTURES:
        return inputs.from_image(body, tensor), {}
    raise UnsupportedMediaError(f"content-type '{kind}' is not served; send {_SERVED}")


def _answer(
    service: Begins,
    artifact: Artifact,
    parameters: InferParameters,
    result: Inference,
    arrived_s: float,
) -> tuple[list[Header], bytes, dict[str, Any]]:
    """Return the answer, counted: headers, body, and what that says."""
    content = infer_answer(artifact, parameters, result, time.monotonic() - arrived_s)
    service.counting.answered(result, content["total_ms"], parameters.max_latency_ms)
    body = to_json(content)
    headers = [
        (b"content-type", _JSON_BYTES),
        (b"content-length", b"%d" % len(body)),
        (b"server-timing", _timing(content)),
    ]
    return headers, body, content


def _refused(
    service: Begins, error: ServiceError, here: tracing.Trace
) -> tuple[int, list[Header], bytes]:
    """Return the answer to a request that is refused, counted."""
    service.counting.refused(error.code, error.members.get("reason"))
    status, headers, body = refusal(error)
    headers += here.headers()
    return status, headers, body


def _timing(content: dict[str, Any]) -> bytes:
    """Return the header's value that browsers show beside a request."""
    took_ms = content["queue_ms"], content["compute_ms"], content["total_ms"]
    return b"queue;dur=%.3f, compute;dur=%.3f, total;dur=%.3f" % took_ms
