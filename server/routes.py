"""Our own calls: /infer, /frontier, /profile, health and metrics."""

import ipaddress
import secrets
import time
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from numpy.typing import NDArray

from benchmarks.effort import FULL, QUICK
from server import inputs
from server.answers import infer_answer
from server.bodies import Bodies
from server.direct import Call
from server.errors import ForbiddenError, UnauthorizedError, UnsupportedMediaError
from server.http import ARRIVED, Json, form_file, header_targets_ms, media_type
from server.schemas import (
    Explained,
    Frontier,
    InferAnswer,
    InferParameters,
    Job,
    ProfileAnswer,
    ProfileRequest,
    parse_parameters,
)
from server.service import Service
from server.settings import Settings
from server.tracing import ANSWER

INFER = "/infer"

_JSON = "application/json"
_NPY = ("application/x-npy", "application/npy")
_PICTURES = ("image/png", "image/jpeg", "image/jpg")
_FORM = "multipart/form-data"
# What clients send when nobody told them the type: `curl --data-binary` the last.
_UNSAID = ("", "application/octet-stream", "application/x-www-form-urlencoded")
_SERVED = ", ".join((_JSON, *_PICTURES[:2], _NPY[0], _FORM))


def infer_call(service: Service, bodies: Bodies) -> Call:
    """Return what answers the simple call."""

    async def infer(request: Request) -> Response:
        service.serving()
        arrived_s: float = request.scope[ARRIVED]
        with bodies.one() as arriving:
            x, given = await _read(request, await arriving.read(request), service)
            parameters = parse_parameters(request.query_params, given, header_targets_ms(request))
            served = service.artifact  # a search may replace it meanwhile
            result = await service.infer(x, parameters, arrived_s, request.receive)
        content = infer_answer(served, parameters, result, time.monotonic() - arrived_s)
        service.count(result, content)
        request.scope[ANSWER] = content
        timing = ", ".join(
            f"{name};dur={content[f'{name}_ms']}" for name in ("queue", "compute", "total")
        )
        return Json(content, headers={"Server-Timing": timing})

    return infer


def inference(service: Service, bodies: Bodies) -> APIRouter:
    """Return the simple call, and the points it may be answered from."""
    router = APIRouter()
    router.add_api_route(
        INFER,
        infer_call(service, bodies),
        methods=["POST"],
        response_model=InferAnswer,
        openapi_extra=_infer_description(service),
        summary="Infer, as accurately as the target allows",
    )

    @router.post(
        "/explain",
        response_model=Explained,
        openapi_extra=_explain_description(),
        summary="What would be chosen now, and why; runs nothing",
    )
    async def explain(request: Request) -> Response:
        with bodies.one() as arriving:
            body = await arriving.read(request)
        given = inputs.json_object(body) if body else {}
        given.pop("inputs", None)
        parameters = parse_parameters(request.query_params, given, header_targets_ms(request))
        return Json(service.explain(parameters, request.scope[ARRIVED]))

    @router.get("/frontier", response_model=Frontier, summary="The points, as measured here")
    async def frontier(batch: Annotated[int, Query(ge=1)] = 1) -> Response:
        return Json(service.frontier(batch))

    return router


def calibration(service: Service) -> APIRouter:
    """Return the calls that measure this host."""
    router = APIRouter()

    @router.get("/profile", response_model=ProfileAnswer, summary="The profile in use")
    async def profile() -> Response:
        return Json(service.profile_answer())

    @router.post(
        "/profile",
        status_code=202,
        response_model=Job,
        summary="Start a calibration; an admin call",
    )
    async def calibrate(request: Request, wanted: ProfileRequest | None = None) -> Response:
        check_admin(request, service.settings)
        wanted = wanted or ProfileRequest()
        effort = QUICK if wanted.kind == "quick" else FULL
        job = await service.start_calibration(replace(effort, search=wanted.search))
        return Json(job, 202, {"Location": f"/profile/jobs/{job['id']}"})

    @router.get("/profile/jobs/{job_id}", response_model=Job, summary="How far a calibration is")
    async def job(job_id: str) -> Response:
        return Json(await service.job(job_id))

    @router.delete("/profile/jobs/{job_id}", response_model=Job, summary="Cancel; an admin call")
    async def cancel(request: Request, job_id: str) -> Response:
        check_admin(request, service.settings)
        return Json(await service.cancel_calibration(job_id))

    return router


def health(service: Service) -> APIRouter:
    """Return what orchestrators and Prometheus ask."""
    router = APIRouter()

    @router.get("/livez", include_in_schema=False)
    @router.get("/v2/health/live", summary="The process answers")
    async def live() -> Response:
        return Json({"live": True, "ready": service.is_ready})

    @router.get("/readyz", include_in_schema=False)
    @router.get("/v2/health/ready", summary="200 when requests are served, else 503")
    async def ready() -> Response:
        status = 200 if service.is_ready else 503
        return Json({"live": True, "ready": service.is_ready, **service.progress()}, status)

    @router.get(
        "/metrics",
        summary="Prometheus",
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        return Response(await service.metrics_text(), media_type="text/plain; version=0.0.4")

    return router


def check_admin(request: Request, settings: Settings) -> None:
    """Let admin calls pass with the token; with none set, from this machine only.

    Raises:
        UnauthorizedError: the token is wrong or missing.
        ForbiddenError: no token is set, and the client is elsewhere.
    """
    if settings.admin_token is not None:
        given = request.headers.get("authorization", "")
        expected = f"Bearer {settings.admin_token.get_secret_value()}"
        if not secrets.compare_digest(given.encode(), expected.encode()):
            raise UnauthorizedError("send 'Authorization: Bearer ' with MAESTRO_ADMIN_TOKEN")
    elif not _is_loopback(request.client.host if request.client else ""):
        raise ForbiddenError("set MAESTRO_ADMIN_TOKEN to allow this call from other machines")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _read(
    request: Request, body: bytes, service: Service
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return the input, (n, …), and the parameters that came with it in the body."""
    tensor = service.artifact.manifest.input
    kind = media_type(request)
    if kind == _FORM:
        kind, body = await form_file(request, body)
    if kind in _UNSAID:
        kind = inputs.type_of(body) or kind
    if kind == _JSON:
        given = inputs.from_json(body)
        return inputs.from_lists(given.pop("inputs"), tensor), given
    if kind in _NPY:
        return inputs.from_npy(body, tensor), {}
    if kind in _PICTURES:
        return inputs.from_image(body, tensor), {}
    raise UnsupportedMediaError(f"content-type '{kind}' is not served; send {_SERVED}")


def _explain_description() -> dict[str, Any]:
    """Return what OpenAPI says of the parameters of `/explain`, in the query or in a JSON body."""
    schema = InferParameters.model_json_schema()["properties"]
    as_json = {
        "type": "object",
        "properties": {"inputs": {}, **schema},
        "additionalProperties": False,
        "example": {"max_latency_ms": 5},
    }
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": field} for name, field in schema.items()
        ],
        "requestBody": {"content": {_JSON: {"schema": as_json}}},
    }


def _infer_description(service: Service) -> dict[str, Any]:
    """Return what OpenAPI says of the body and the parameters of `/infer`."""
    schema = InferParameters.model_json_schema()["properties"]
    example = np.zeros(service.artifact.manifest.input.shape[1:], int).tolist()
    file = {"type": "string", "format": "binary"}
    as_json = {
        "type": "object",
        "required": ["inputs"],
        "properties": {"inputs": _lists(service), **schema},
        "additionalProperties": False,
        "example": {"inputs": example, "max_latency_ms": 5},
    }
    content = {
        _JSON: {"schema": as_json},
        **{kind: {"schema": file} for kind in (*_PICTURES[:2], _NPY[0])},
        _FORM: {"schema": {"type": "object", "required": ["file"], "properties": {"file": file}}},
    }
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": field} for name, field in schema.items()
        ],
        "requestBody": {"required": True, "content": content},
    }


def _lists(service: Service) -> dict[str, Any]:
    """Return what OpenAPI says of nested lists: one sample, or a list of samples."""
    largest = float(np.finfo(np.float32).max)
    sample: dict[str, Any] = {"type": "number", "minimum": -largest, "maximum": largest}
    for size in reversed(service.artifact.manifest.input.shape[1:]):
        sample = {"type": "array", "minItems": size, "maxItems": size, "items": sample}
    most = service.settings.max_batch
    samples = {"type": "array", "minItems": 1, "maxItems": most, "items": sample}
    return {"anyOf": [sample, samples]}
