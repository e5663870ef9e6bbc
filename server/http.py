"""What every route needs of HTTP: JSON answers, types of bodies, targets from headers."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson
from fastapi import Request, Response
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers as HttpHeaders
from starlette.datastructures import QueryParams, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Message

from server.errors import PROBLEM_TYPE, BadRequestError, InvalidError, ServiceError

Header = tuple[bytes, bytes]
Headers = Mapping[bytes, bytes]
Pairs = tuple[tuple[str, str], ...]

# The targets that headers may hold: the client's own, and what a gateway waits.
_OWN_TARGET, _GATEWAY_TARGET = b"x-max-latency-ms", b"x-envoy-expected-rq-timeout-ms"

# What OpenAPI says of a probe's 503: its body is that of 200, and no problem.
NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"description": "Not ready", "content": {"application/json": {"schema": {}}}}
}


def in_query(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what OpenAPI says of parameters in the query, from their schemas by name."""
    return [
        {"name": name, "in": "query", "description": field["description"], "schema": field}
        for name, field in fields.items()
    ]


def to_json(content: Any) -> bytes:  # noqa: ANN401  any JSON
    """Return JSON, arrays included."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


class Json(Response):
    """A JSON body, arrays included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:  # noqa: ANN401  any JSON
        return to_json(content)


class Written(Response):
    """A status, headers and a body that are bytes; headers that are text would first be encoded."""

    def __init__(self, status: int, headers: list[Header], body: bytes) -> None:
        self.status_code, self.background, self.body = status, None, body
        self.raw_headers = headers


def refusal(error: ServiceError) -> tuple[int, list[Header], bytes]:
    """Return what a request is answered with that ends in an error."""
    body = orjson.dumps(error.problem())
    headers = [
        (b"content-type", PROBLEM_TYPE.encode()),
        (b"content-length", b"%d" % len(body)),
        *((name.lower().encode(), value.encode()) for name, value in error.headers().items()),
    ]
    return error.status, headers, body


@lru_cache(maxsize=128)
def _query(text: bytes) -> Pairs:
    return tuple(QueryParams(text).multi_items())


def query_of(scope: Mapping[str, Any]) -> Pairs:
    """Return the names in the query with their values; a client sends the same over and over."""
    return _query(scope["query_string"])


def headers_of(scope: Mapping[str, Any]) -> Headers:
    """Return the first header of each name, and of a target all, joined by commas (RFC 9110, 5.3).

    A request's own search the list each time.
    """
    sent = scope["headers"]
    found = dict(reversed(sent))
    if len(found) < len(sent):
        for name in found.keys() & {_OWN_TARGET, _GATEWAY_TARGET}:
            found[name] = b",".join(value for each, value in sent if each == name)
    return found


def media_type(headers: Headers) -> str:
    """Return the body's type, without its parameters."""
    return _bare(headers.get(b"content-type", b"").decode("latin-1"))


def _bare(kind: str) -> str:
    return kind.partition(";")[0].strip().lower()


class _InMemory(MultiPartParser):
    """Reads a form whose body is in memory already: its file is written to no disk."""

    spool_max_size = 0  # never


async def form_file(request: Request, body: bytes) -> tuple[str, bytes, Pairs]:
    """Return the type and the bytes of the one file in a form, and its other fields.

    Raises:
        BadRequestError: the form cannot be read.
        InvalidError: there is no file in it.
    """

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    stream = Request(request.scope, receive).stream()
    headers = HttpHeaders(raw=[(b"content-type", _form_type(request))])
    try:
        form = await _InMemory(headers, stream, max_files=1, max_fields=8).parse()
    except (MultiPartException, ValueError) as error:
        text = getattr(error, "message", None) or str(error)
        raise BadRequestError(f"the form cannot be read: {text}") from error
    try:
        files = [part for part in form.values() if isinstance(part, UploadFile)]
        if not files:
            raise InvalidError("the form holds no file; send one: curl -F file=@picture.png")
        fields = tuple((k, part) for k, part in form.multi_items() if isinstance(part, str))
        return _bare(files[0].content_type or ""), await files[0].read(), fields
    finally:
        await form.close()


def _form_type(request: Request) -> bytes:
    """Return the type of a form with its boundary alone: names are in UTF-8 whatever charset the
    client names, of which some are decoded for minutes."""
    kind, parameters = parse_options_header(request.headers["content-type"])
    boundary = parameters.get(b"boundary")
    return kind if boundary is None else kind + b'; boundary="' + boundary + b'"'


def header_targets_ms(headers: Headers) -> list[str | float]:
    """Return the targets in a request's headers: the client's own, and what gateways wait.

    A gateway's header that is no positive number is left out: the client cannot mend it.
    """
    own, gateways = headers.get(_OWN_TARGET), headers.get(_GATEWAY_TARGET)
    targets: list[str | float] = [] if own is None else [*own.decode("latin-1").split(",")]
    if gateways is not None:
        waited = [ms[:10] for ms in map(bytes.strip, gateways.split(b",")) if ms.isdigit()]
        targets += [min(float(ms), 3_600_000.0) for ms in waited if int(ms) > 0]
    return targets
