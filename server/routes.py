"""Our own calls: /infer, /frontier, /profile, health and metrics."""

import ipaddress
import re
import secrets
from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
from fastapi import APIRouter, Query, Request, Response, Security
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer

from benchmarks.effort import FULL, QUICK
from server import inputs
from server.bodies import Bodies
from server.errors import ForbiddenError, UnauthorizedError
from server.http import NOT_READY, Json, header_targets_ms, headers_of, in_query, query_of
from server.schemas import (
    Explained,
    Frontier,
    InferAnswer,
    InferParameters,
    Job,
    ProfileAnswer,
    ProfileRequest,
    parse_parameters,
    parse_profile_request,
    single,
)
from server.service import Service
from server.settings import Settings
from server.simple import FORM, INFER, JSON, NPY, PICTURES, infer_call

# RFC 9110, section 7.2. Names, IPv4 and IPv6 are written with these letters, and no browser sends
# others.
_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<ipv6>[0-9A-Fa-f:]+)\])(?::[0-9]*)?")


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
        targets_ms = header_targets_ms(headers_of(request.scope))
        parameters = parse_parameters(query_of(request.scope), given, targets_ms)
        return Json(service.explain(parameters))

    @router.get("/frontier", response_model=Frontier, summary="The points, as measured here")
    async def frontier(
        request: Request,
        batch: Annotated[int, Query(ge=1, description="Samples that run together")] = 1,
    ) -> Response:
        single(query_of(request.scope))  # two that differ are refused
        return Json(service.frontier(batch))

    return router


def calibration(service: Service, bodies: Bodies) -> APIRouter:
    """Return the calls that measure this host."""
    router = APIRouter()
    # In the description, where one is set; `check_admin` checks it.
    token = HTTPBearer(scheme_name="admin token", auto_error=False)
    admin = [Security(token)] if service.settings.admin_token else []

    @router.get("/profile", response_model=ProfileAnswer, summary="The profile in use")
    async def profile() -> Response:
        return Json(service.profile_answer())

    @router.post(
        "/profile",
        status_code=202,
        response_model=Job,
        openapi_extra=_profile_description(),
        dependencies=admin,
        summary="Start a calibration; an admin call",
    )
    async def calibrate(request: Request) -> Response:
        check_admin(request, service.settings)  # before anything is read
        with bodies.one() as arriving:
            body = await arriving.read(request)
        given = inputs.json_object(body) if body else {}
        wanted = parse_profile_request(query_of(request.scope), given)
        effort = QUICK if wanted.kind == "quick" else FULL
        job = await service.start_calibration(replace(effort, search=wanted.search))
        return Json(job, 202, {"Location": f"/profile/jobs/{job['id']}"})

    @router.get("/profile/jobs/{job_id}", response_model=Job, summary="How far a calibration is")
    async def job(job_id: str) -> Response:
        return Json(await service.job(job_id))

    @router.delete(
        "/profile/jobs/{job_id}",
        response_model=Job,
        dependencies=admin,
        summary="Cancel; an admin call",
    )
    async def cancel(request: Request, job_id: str) -> Response:
        check_admin(request, service.settings)
        return Json(await service.cancel_calibration(job_id))

    return router


def health(service: Service) -> APIRouter:
    """Return what orchestrators and Prometheus ask."""
    router = APIRouter()

    @router.api_route("/livez", methods=["GET", "HEAD"], include_in_schema=False)
    @router.get("/v2/health/live", summary="The process answers")
    async def live() -> Response:
        return Json({"live": True, "ready": service.is_ready})

    @router.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
    @router.get(
        "/v2/health/ready", responses=NOT_READY, summary="200 when requests are served, else 503"
    )
    async def ready() -> Response:
        status = 200 if service.is_ready else 503
        return Json({"live": True, "ready": service.is_ready, **service.progress()}, status)

    @router.head("/metrics", include_in_schema=False)
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
        ForbiddenError: no token is set, and the client is elsewhere or a page of another site.
    """
    if settings.admin_token is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        expected = settings.admin_token.get_secret_value()
        sent = given.strip(" \t").encode("latin-1")  # as it came: clients write UTF-8
        is_right = secrets.compare_digest(sent, expected.encode())
        if scheme.lower() != "bearer" or not is_right:  # the scheme in any case: RFC 9110, 11.1
            raise UnauthorizedError("send 'Authorization: Bearer ' with MAESTRO_ADMIN_TOKEN")
    elif not _is_loopback(request.client.host if request.client else ""):
        raise ForbiddenError("set MAESTRO_ADMIN_TOKEN to allow this call from other machines")
    elif _is_of_another_site(request):
        raise ForbiddenError("set MAESTRO_ADMIN_TOKEN to allow this call from pages of other sites")
    elif not _names_this_machine(request.headers.getlist("host")):
        raise ForbiddenError(
            "set MAESTRO_ADMIN_TOKEN to allow this call by a name other than localhost"
        )


def _names_this_machine(hosts: list[str]) -> bool:
    """Return whether a page that was loaded by this name, of the `Host` header, can only be ours.

    Any other name its owner may point at this machine, and so pass for us (DNS rebinding). What
    can't be read, or isn't there once, names nothing.
    """
    named = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if named is None:
        return False
    name = (named["name"] or named["ipv6"]).lower()
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


def _is_of_another_site(request: Request) -> bool:
    """Return whether a browser sends this for a page that is not ours."""
    origin = request.headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc != request.headers.get("host")
    except ValueError:  # "http://["
        return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _profile_description() -> dict[str, Any]:
    """Return what OpenAPI says of what to calibrate, in the query or in a JSON body."""
    schema = ProfileRequest.model_json_schema()
    fields = schema["properties"]
    as_json = {**schema, "properties": _or_null(fields), "example": {}}
    return {
        "parameters": in_query(fields),
        "requestBody": {"content": {JSON: {"schema": as_json}}},
    }


def _explain_description() -> dict[str, Any]:
    """Return what OpenAPI says of the parameters of `/explain`, in the query or in a JSON body."""
    schema = InferParameters.model_json_schema()["properties"]
    as_json = {
        "type": "object",
        "properties": {"inputs": {}, **_or_null(schema)},
        "additionalProperties": False,
        "example": {"max_latency_ms": 5},
    }
    return {
        "parameters": in_query(schema),
        "requestBody": {"content": {JSON: {"schema": as_json}}},
    }


def _infer_description(service: Service) -> dict[str, Any]:
    """Return what OpenAPI says of the body and the parameters of `/infer`."""
    schema = InferParameters.model_json_schema()["properties"]
    example = np.zeros(service.artifact.manifest.input.shape[1:], int).tolist()
    file = {"type": "string", "format": "binary"}
    as_json = {
        "type": "object",
        "required": ["inputs"],
        "properties": {"inputs": _lists(service), **_or_null(schema)},
        "additionalProperties": False,
        "example": {"inputs": example, "max_latency_ms": 5},
    }
    as_form = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": file, **schema},
        "additionalProperties": False,
    }
    content = {
        JSON: {"schema": as_json},
        **{kind: {"schema": file} for kind in (*PICTURES[:2], NPY[0])},
        FORM: {"schema": as_form},
    }
    return {
        "parameters": in_query(schema),
        "requestBody": {"required": True, "content": content},
    }


def _or_null(fields: dict[str, Any]) -> dict[str, Any]:
    """Return what OpenAPI says of fields of a JSON body, where null is as if one were not there."""
    return {name: {"anyOf": [field, {"type": "null"}]} for name, field in fields.items()}


def _lists(service: Service) -> dict[str, Any]:
    """Return what OpenAPI says of nested lists: one sample, or a list of samples."""
    # The least number that rounds to infinity as float32: half a step above its largest.
    infinite = 2.0**128 - 2.0**103
    sample: dict[str, Any] = {
        "type": "number",
        "exclusiveMinimum": -infinite,
        "exclusiveMaximum": infinite,
    }
    for size in reversed(service.artifact.manifest.input.shape[1:]):
        sample = {"type": "array", "minItems": size, "maxItems": size, "items": sample}
    most = service.max_batch
    samples = {"type": "array", "minItems": 1, "maxItems": most, "items": sample}
    return {"anyOf": [sample, samples]}
