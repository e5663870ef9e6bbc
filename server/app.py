"""The HTTP routes. They read requests and write answers; every decision is made elsewhere."""

import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from benchmarks.profiler import FULL, QUICK
from server import inputs
from server.answers import infer_answer
from server.errors import (
    PROBLEM_TYPE,
    BadRequestError,
    ForbiddenError,
    InvalidError,
    ServiceError,
    TooLargeError,
    UnauthorizedError,
    UnsupportedMediaError,
)
from server.schemas import (
    Frontier,
    InferAnswer,
    InferParameters,
    Job,
    Problem,
    ProfileAnswer,
    ProfileRequest,
    parse_parameters,
)
from server.service import Service
from server.settings import Settings

_ARRIVED = "maestro.arrived_s"
_CLIENT_GONE = 499
_NPY = ("application/x-npy", "application/npy")
_PICTURES = ("image/png", "image/jpeg", "image/jpg")


class Json(Response):
    """A JSON body, arrays included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:  # noqa: ANN401  any JSON
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def create_app(settings: Settings, service: Service | None = None) -> FastAPI:
    """Return the application; it loads and calibrates when the server starts it."""
    served = service or Service(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await served.start()
        yield
        await served.stop()

    app = FastAPI(
        title="Maestro",
        summary="The best accuracy that each request's deadline allows.",
        version=served.version,
        lifespan=lifespan,
        responses={"default": {"model": Problem, "content": {PROBLEM_TYPE: {}}}},
    )
    _add_inference(app, served)
    _add_calibration(app, served)
    _add_health(app, served)
    _add_errors(app, served)
    app.add_middleware(_Arrival)
    return app


class _Arrival:
    """Note when a request reaches the application: the clock of its target starts there."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401
        scope[_ARRIVED] = time.monotonic()
        await self._app(scope, receive, send)


def _add_inference(app: FastAPI, service: Service) -> None:
    tensor = service.artifact.manifest.input

    @app.post(
        "/infer",
        response_model=InferAnswer,
        openapi_extra=_infer_description(service),
        summary="Infer, as accurately as the target allows",
    )
    async def infer(request: Request) -> Response:
        service.serving()
        arrived_s: float = request.scope[_ARRIVED]
        body = await _body(request, service.settings.max_body_bytes)
        kind, body = await _form_file(request, body)
        given: dict[str, Any] = {}
        if kind == "application/json":
            given = inputs.from_json(body)
            x = inputs.from_lists(given.pop("inputs"), tensor)
        elif kind in _NPY:
            x = inputs.from_npy(body, tensor)
        elif kind in _PICTURES:
            x = inputs.from_image(body, tensor)
        else:
            served = ", ".join(("application/json", *_PICTURES[:2], _NPY[0], "multipart/form-data"))
            raise UnsupportedMediaError(f"content-type '{kind}' is not served; send {served}")
        header = request.headers.get("x-max-latency-ms")
        parameters = parse_parameters(request.query_params, given, header)
        answer = await service.infer(x, parameters, arrived_s, request.receive)
        content = infer_answer(service.artifact, parameters, answer, time.monotonic() - arrived_s)
        service.count(answer, content)
        timing = ", ".join(
            f"{name};dur={content[f'{name}_ms']}" for name in ("queue", "compute", "total")
        )
        return Json(content, headers={"Server-Timing": timing})

    @app.get("/frontier", response_model=Frontier, summary="The points, as measured on this host")
    async def frontier(batch: Annotated[int, Query(ge=1)] = 1) -> Response:
        return Json(service.frontier(batch))


def _add_calibration(app: FastAPI, service: Service) -> None:
    @app.get("/profile", response_model=ProfileAnswer, summary="The profile in use")
    async def profile() -> Response:
        return Json(service.profile_answer())

    @app.post(
        "/profile",
        status_code=202,
        response_model=Job,
        summary="Start a calibration; an admin call",
        openapi_extra={"security": [{"admin": []}]},
    )
    async def calibrate(request: Request, wanted: ProfileRequest | None = None) -> Response:
        _check_admin(request, service.settings)
        effort = QUICK if wanted and wanted.kind == "quick" else FULL
        job = service.start_calibration(effort)
        location = f"/profile/jobs/{job['id']}"
        return Json(job, status_code=202, headers={"Location": location})

    @app.get("/profile/jobs/{job_id}", response_model=Job, summary="How far a calibration is")
    async def job(job_id: str) -> Response:
        return Json(service.job(job_id))

    @app.delete("/profile/jobs/{job_id}", response_model=Job, summary="Cancel; an admin call")
    async def cancel(request: Request, job_id: str) -> Response:
        _check_admin(request, service.settings)
        return Json(service.cancel_calibration(job_id))


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/livez", include_in_schema=False)
    @app.get("/v2/health/live", summary="The process answers")
    async def live() -> Response:
        return Json({"live": True, "ready": service.is_ready})

    @app.get("/readyz", include_in_schema=False)
    @app.get("/v2/health/ready", summary="200 when requests are served, 503 before and after")
    async def ready() -> Response:
        status = 200 if service.is_ready else 503
        return Json({"live": True, "ready": service.is_ready, **service.progress()}, status)

    @app.get("/metrics", summary="Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")


def _add_errors(app: FastAPI, service: Service) -> None:
    def problem(error: ServiceError) -> Response:
        return Response(
            orjson.dumps(error.problem()),
            error.status,
            headers=error.headers(),
            media_type=PROBLEM_TYPE,
        )

    @app.exception_handler(ServiceError)
    async def known(request: Request, error: ServiceError) -> Response:
        if request.url.path == "/infer":
            service.metrics.refused(error.code)
        return problem(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return problem(InvalidError(f"{name or 'the body'}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def routed(_request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        content = {
            "type": "about:blank",
            "title": detail,
            "status": error.status_code,
            "detail": detail,
            "error": detail,
        }
        return Response(
            orjson.dumps(content), error.status_code, error.headers, media_type=PROBLEM_TYPE
        )

    @app.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _error: ClientDisconnect) -> Response:
        service.metrics.refused("client-gone")
        return Response(status_code=_CLIENT_GONE)


async def _body(request: Request, limit: int) -> bytes:
    """Return the body; one over the limit is refused without reading it whole."""
    declared = request.headers.get("content-length", "")
    message = f"the body is over {limit} bytes"
    if declared.isdigit() and int(declared[:20]) > limit:
        raise TooLargeError(message, limit_bytes=limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLargeError(message, limit_bytes=limit)
    return bytes(body)


async def _form_file(request: Request, body: bytes) -> tuple[str, bytes]:
    """Return the media type and bytes of the body, or of the one file in it if it is a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return kind, body

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


def _check_admin(request: Request, settings: Settings) -> None:
    """Admin calls need the token; with none set, they come from this machine only."""
    if settings.admin_token is not None:
        given = request.headers.get("authorization", "")
        expected = f"Bearer {settings.admin_token.get_secret_value()}"
        if not secrets.compare_digest(given.encode(), expected.encode()):
            raise UnauthorizedError("send 'Authorization: Bearer ' with MAESTRO_ADMIN_TOKEN")
        return
    if not _is_loopback(request.client.host if request.client else ""):
        raise ForbiddenError("set MAESTRO_ADMIN_TOKEN to allow this call from other machines")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _infer_description(service: Service) -> dict[str, Any]:
    """Return what OpenAPI says of the body and the parameters of `/infer`."""
    schema = InferParameters.model_json_schema()["properties"]
    shape = np.zeros([1, *service.artifact.manifest.input.shape[1:]], int).tolist()
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "schema": {k: v for k, v in field.items() if k != "title"},
            }
            for name, field in schema.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["inputs"],
                        "properties": {"inputs": {"type": "array", "items": {}}, **schema},
                        "example": {"inputs": shape, "max_latency_ms": 5},
                    }
                },
                **dict.fromkeys((*_PICTURES[:2], _NPY[0]), binary),
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {"file": {"type": "string", "format": "binary"}},
                    }
                },
            },
        },
    }
