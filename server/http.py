"""What every route needs of HTTP: JSON answers, types of bodies, targets from headers."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from server.errors import BadRequestError, InvalidError

ARRIVED = "maestro.arrived_s"


class Json(Response):
    """A JSON body, arrays included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:  # noqa: ANN401  any JSON
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


class Arrival:
    """Note when a request reaches the application: the clock of its target starts there."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401
        scope[ARRIVED] = time.monotonic()
        await self._app(scope, receive, send)


def media_type(request: Request) -> str:
    """Return the body's type, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def form_file(request: Request, body: bytes) -> tuple[str, bytes]:
    """Return the type and the bytes of the one file in a form.

    Raises:
        BadRequestError: the form cannot be read.
        InvalidError: there is no file in it.
    """

    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, replay).form(max_files=1, max_fields=8) as form:
            files = [part for part in form.values() if isinstance(part, UploadFile)]
            if not files:
                raise InvalidError("the form holds no file; send one: curl -F file=@picture.png")
            return (files[0].content_type or "").lower(), await files[0].read()
    except (MultiPartException, HTTPException) as error:
        text = getattr(error, "message", None) or str(getattr(error, "detail", error))
        raise BadRequestError(f"the form cannot be read: {text}") from error


def header_targets_ms(request: Request) -> list[str | float]:
    """Return the targets in a request's headers: the client's own, and what a gateway waits.

    A gateway's header that is no positive number is left out: the client cannot mend it.
    """
    own = request.headers.get("x-max-latency-ms")
    gateway = request.headers.get("x-envoy-expected-rq-timeout-ms", "")
    targets: list[str | float] = [] if own is None else [own]
    if gateway.isascii() and gateway.isdigit() and int(gateway[:10]) > 0:
        targets.append(min(float(gateway[:10]), 3_600_000.0))
    return targets
