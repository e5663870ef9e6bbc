"""Which request this is: its id and its place in a W3C trace, from the client or made here.

`traceparent` is that of W3C Trace Context (2021). With the extra `tracing` each request is an
OpenTelemetry span as well, exported as OTEL_… variables say.
"""

# Compiled where the extra may be missing:
# mypy: disable-error-code="import-not-found"

import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

try:
    from opentelemetry import propagate, trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    HAS_SPANS = True
except ModuleNotFoundError:  # without the extra there are none
    HAS_SPANS = False

log = logging.getLogger(__name__)

# In a request's scope: when it reached the application, which starts the clock of its target.
ARRIVED = "maestro.arrived_s"
# What a route leaves in the scope of an answered inference, for spans and the access log.
ANSWER = "maestro.answer"
FACTS = ("point", "accuracy", "predicted_ms", "queue_ms", "compute_ms", "total_ms", "target_met")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_PARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_EXPORTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# RFC 3986, section 3.3. A log has others as they were sent: a decoded path may have two lines.
_IN_PATHS = "/:@!$&'()*+,;="
_NO_TRACE, _NO_SPAN = b"0" * 32, b"0" * 16

_NO_SPAN_HERE = nullcontext()


@dataclass(slots=True)
class Trace:
    """A request's id, and the trace and span that it is, in lower-case hexadecimal."""

    request_id: str
    trace_id: str
    span_id: str
    flags: str

    @property
    def traceparent(self) -> str:
        """Return the header that names this span as the parent of what follows."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Return the headers that tell a client its ids."""
        return (
            (b"x-request-id", self.request_id.encode()),
            (b"traceparent", self.traceparent.encode()),
        )


CURRENT: ContextVar[Trace | None] = ContextVar("maestro_trace", default=None)


def read(headers: Mapping[bytes, bytes]) -> Trace:
    """Return the request's place in its client's trace, or in a new one; ids that are ill-formed
    are replaced, as the client can't be told."""
    made = random.randbytes(40).hex()  # ids are to differ, not to be secret
    request_id, trace_id, span_id, flags = made[:32], made[32:64], made[64:], "00"
    own_id, parent = headers.get(b"x-request-id"), headers.get(b"traceparent")
    if own_id is not None and _REQUEST_ID.fullmatch(own_id):
        request_id = own_id.decode()
    ids = None if parent is None else _PARENT.fullmatch(parent)
    if ids is not None and ids[1] != _NO_TRACE and ids[2] != _NO_SPAN:
        trace_id, flags = ids[1].decode(), ids[3].decode()
    return Trace(request_id, trace_id, span_id, flags)


def export_spans(service_name: str) -> bool:
    """Send spans where OTEL_EXPORTER_OTLP_ENDPOINT says; return whether any are sent."""
    if not any(os.environ.get(name) for name in _EXPORTS):
        return False
    if not HAS_SPANS:
        log.warning("no spans are sent: pip install -e '.[tracing]' in a clone of the project")
        return False
    named = os.environ.get("OTEL_SERVICE_NAME") or service_name
    provider = TracerProvider(resource=Resource.create({"service.name": named}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


def is_recording() -> bool:
    """Return whether anybody may record spans."""
    return HAS_SPANS and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


class Tracing:
    """Note when each request came, give it its ids, return them, and log it if asked to."""

    def __init__(self, app: Callable[..., Awaitable[None]], access_log: bool = False) -> None:
        self._app = app
        self._access_log = access_log

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[ARRIVED] = began_s = time.monotonic()
        here = read(dict(scope["headers"]))
        status = 500

        with _span(scope) as span:
            here = _of_span(span, here)
            CURRENT.set(here)
            own = here.headers()

            async def send_with_ids(message: dict[str, Any]) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message = {**message, "headers": [*message["headers"], *own]}
                await send(message)

            try:
                await self._app(scope, receive, send_with_ids)
            finally:
                _finish(span, scope, status)
                if self._access_log:
                    self._log(scope, status, time.monotonic() - began_s)

    def _log(self, scope: dict[str, Any], status: int, seconds: float) -> None:
        facts = {"status": status, "ms": round(1e3 * seconds, 3), **_facts(scope)}
        path = quote(scope["path"], safe=_IN_PATHS)
        log.info("%s %s", scope["method"], path, extra={"facts": facts})


def _facts(scope: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of the answer; nothing of what was asked."""
    answer = scope.get(ANSWER, {})
    return {name: answer[name] for name in FACTS if answer.get(name) is not None}


def _span(scope: dict[str, Any]) -> AbstractContextManager[Any]:
    if not is_recording():
        return _NO_SPAN_HERE  # to make one all the same takes longer than to ask
    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return trace.get_tracer("maestro").start_as_current_span(
        scope["method"],
        context=propagate.extract(carrier),
        kind=trace.SpanKind.SERVER,
        record_exception=False,
    )


def _of_span(span: Any, here: Trace) -> Trace:  # noqa: ANN401  a Span, where there are any
    """Return `here` with the ids of a span that is recorded."""
    if span is None or not span.is_recording():
        return here
    context = span.get_span_context()
    return Trace(
        here.request_id,
        f"{context.trace_id:032x}",
        f"{context.span_id:016x}",
        f"{int(context.trace_flags):02x}",
    )


def _finish(span: Any, scope: dict[str, Any], status: int) -> None:  # noqa: ANN401
    if span is None or not span.is_recording():
        return
    route = getattr(scope.get("route"), "path", "")
    span.update_name(f"{scope['method']} {route}".strip())
    span.set_attribute("http.request.method", scope["method"])
    span.set_attribute("http.response.status_code", status)
    if route:
        span.set_attribute("http.route", route)
    for name, value in _facts(scope).items():
        span.set_attribute(f"maestro.{name}", value)
    if status >= 500:
        span.set_status(trace.StatusCode.ERROR)
