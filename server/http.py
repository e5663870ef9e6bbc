"""What every route needs of HTTP: JSON answers, types of bodies, targets from headers."""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import orjson
from fastapi import Request, Response
from python_multipart.multipart import parse_options_header
from starlette.datastructures import QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from server.errors import BadRequestError, InvalidError

Header = tuple[bytes, bytes]
Headers = Mapping[bytes, bytes]


def to_json(content: Any) -> bytes:  # noqa: ANN401  any JSON
    """Return JSON, arrays included."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


class Json(Response):
    """A JSON body, arrays included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:  # noqa: ANN401  any JSON
        return to_json(content)


class Inferred(Response):
    """An inference's answer, of bytes; headers that are text would first be encoded."""

    def __init__(self, body: bytes, media_type: bytes, *headers: Header) -> None:
        self.status_code, self.background, self.body = 200, None, body
        length = str(len(body)).encode()
        self.raw_headers = [(b"content-type", media_type), (b"content-length", length), *headers]


@lru_cache(maxsize=128)
def _query(text: bytes) -> Mapping[str, str]:
    return MappingProxyType(dict(QueryParams(text)))


def query_of(scope: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the last value of each name in the query; a client sends the same over and over."""
    return _query(scope["query_string"])


def headers_of(scope: Mapping[str, Any]) -> Headers:
    """Return the first header of each name. A request's own search the list each time."""
    return dict(reversed(scope["headers"]))


def media_type(headers: Headers) -> str:
    """Return the body's type, without its parameters."""
    return headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()


async def form_file(request: Request, body: bytes) -> tuple[str, bytes]:
    """Return the type and the bytes of the one file in a form.

    Raises:
        BadRequestError: the form cannot be read.
        InvalidError: there is no file in it.
    """

    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {**request.scope, "headers": [(b"content-type", _form_type(request))]}
    try:
        async with Request(scope, replay).form(max_files=1, max_fields=8) as form:
            files = [part for part in form.values() if isinstance(part, UploadFile)]
            if not files:
                raise InvalidError("the form holds no file; send one: curl -F file=@picture.png")
            return (files[0].content_type or "").lower(), await files[0].read()
    except (MultiPartException, HTTPException, ValueError) as error:
        text = getattr(error, "message", None) or str(getattr(error, "detail", error))
        raise BadRequestError(f"the form cannot be read: {text}") from error


def _form_type(request: Request) -> bytes:
    """Return the type of a form with its boundary alone: names are in UTF-8 whatever charset the
    client names, of which some are decoded for minutes."""
    kind, parameters = parse_options_header(request.headers["content-type"])
    boundary = parameters.get(b"boundary")
    return kind if boundary is None else kind + b'; boundary="' + boundary + b'"'


def header_targets_ms(headers: Headers) -> list[str | float]:
    """Return the targets in a request's headers: the client's own, and what a gateway waits.

    A gateway's header that is no positive number is left out: the client cannot mend it.
    """
    own = headers.get(b"x-max-latency-ms")
    gateway = headers.get(b"x-envoy-expected-rq-timeout-ms", b"")
    targets: list[str | float] = [] if own is None else [own.decode("latin-1")]
    if gateway.isdigit() and int(gateway[:10]) > 0:
        targets.append(min(float(gateway[:10]), 3_600_000.0))
    return targets
