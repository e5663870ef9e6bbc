"""The Open Inference Protocol v2 over HTTP: what tritonclient and kserve clients call."""

import time
from math import prod
from typing import Any

from fastapi import APIRouter, Request, Response

from maestro_core.artifact import Manifest, Tensor
from server import protocol
from server.answers import infer_answer
from server.bodies import Bodies
from server.direct import Call
from server.errors import NotFoundError
from server.http import NOT_READY, Json, header_targets_ms, headers_of, in_query, query_of
from server.schemas import InferParameters, parse_parameters
from server.service import Service
from server.tracing import ANSWER, ARRIVED

INFER = "/v2/models/{model}/infer"
PLATFORM = "onnxruntime_onnx"
# Of an answer, what goes into its parameters: the protocol allows scalars only.
_FACTS = (
    *("point", "accuracy", "predicted_ms", "queue_ms", "compute_ms", "total_ms"),
    *("max_latency_ms", "target_met", "batch_size"),
)


def protocol_v2(service: Service, bodies: Bodies) -> APIRouter:
    """Return the protocol's calls for the one model that is served."""
    router = APIRouter(tags=["Open Inference Protocol v2"])
    manifest = service.artifact.manifest

    @router.get("/v2", summary="The server")
    async def server() -> Response:
        return Json(
            {"name": "maestro", "version": service.version, "extensions": protocol.EXTENSIONS}
        )

    # Before the model's own call, which would take "stats" for a name.
    @router.get("/v2/models/stats", include_in_schema=False)
    async def all_stats() -> Response:
        return Json(await service.statistics_answer())

    @router.get("/v2/models/{model}/versions/{version}", include_in_schema=False)
    @router.get("/v2/models/{model}", summary="The model")
    async def metadata(request: Request, model: str) -> Response:
        _check(manifest, model, request)
        return Json(_metadata(manifest))

    @router.get("/v2/models/{model}/versions/{version}/ready", include_in_schema=False)
    @router.get(
        "/v2/models/{model}/ready", responses=NOT_READY, summary="Whether the model is served"
    )
    async def ready(request: Request, model: str) -> Response:
        _check(manifest, model, request)
        status = 200 if service.is_ready else 503
        return Json({"name": manifest.name, "ready": service.is_ready}, status)

    @router.get("/v2/models/{model}/versions/{version}/config", include_in_schema=False)
    @router.get("/v2/models/{model}/config", summary="The model's configuration")
    async def config(request: Request, model: str) -> Response:
        _check(manifest, model, request)
        return Json(_configuration(manifest, service.max_batch))

    @router.get("/v2/models/{model}/versions/{version}/stats", include_in_schema=False)
    @router.get("/v2/models/{model}/stats", summary="What has been served")
    async def stats(request: Request, model: str) -> Response:
        _check(manifest, model, request)
        return Json(await service.statistics_answer())

    call = infer_call(service, bodies)

    @router.post("/v2/models/{model}/versions/{version}/infer", include_in_schema=False)
    @router.post(INFER, summary="Infer", openapi_extra=_description(manifest))
    async def infer(request: Request, model: str) -> Response:
        _check(manifest, model, request)
        return await call(request)

    return router


def infer_call(service: Service, bodies: Bodies) -> Call:
    """Return what answers an inference of the one model that is served."""
    manifest = service.artifact.manifest

    async def infer(request: Request) -> Response:
        service.serving()
        arrived_s: float = request.scope[ARRIVED]
        with bodies.one() as arriving:
            body = await arriving.read(request)
            length = request.headers.get(protocol.JSON_LENGTH)
            wanted = protocol.read(body, length, manifest.input, manifest.output)
            targets_ms = [*header_targets_ms(headers_of(request.scope)), wanted.timeout_ms]
            query = query_of(request.scope)
            protocol.check_names(name for name, _ in query)
            parameters = parse_parameters(query, wanted.parameters, targets_ms)
            served = service.artifact  # a search may replace it meanwhile
            result = await service.infer(wanted.x, parameters, arrived_s, request.receive)
        content = infer_answer(served, parameters, result, time.monotonic() - arrived_s)
        service.counting.answered(result, content["total_ms"], parameters.max_latency_ms)
        request.scope[ANSWER] = content
        answer, headers = protocol.write(
            wanted,
            manifest.name,
            manifest.version,
            manifest.output,
            result.output,
            {name: content[name] for name in _FACTS if content[name] is not None},
            manifest.labels,
        )
        return Response(answer, headers=headers)

    return infer


def _check(manifest: Manifest, model: str, request: Request) -> None:
    """Refuse another model, and another version where the path names one.

    The version is no argument of the handlers: where a path has none, FastAPI would describe it as
    a parameter of the query.
    """
    version = request.path_params.get("version")
    if model != manifest.name:
        raise NotFoundError(f"there is no model '{model}'; this is '{manifest.name}'")
    if version not in (None, manifest.version):
        raise NotFoundError(f"there is no version '{version}'; this is '{manifest.version}'")


def _metadata(manifest: Manifest) -> dict[str, Any]:
    def described(tensor: Tensor) -> dict[str, Any]:
        return {"name": tensor.name, "datatype": "FP32", "shape": tensor.shape}

    return {
        "name": manifest.name,
        "versions": [manifest.version],
        "platform": PLATFORM,
        "inputs": [described(manifest.input)],
        "outputs": [described(manifest.output)],
    }


def _configuration(manifest: Manifest, max_batch: int) -> dict[str, Any]:
    def described(tensor: Tensor) -> dict[str, Any]:
        return {"name": tensor.name, "data_type": "TYPE_FP32", "dims": tensor.shape[1:]}

    return {
        "name": manifest.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": max_batch,
        "input": [described(manifest.input)],
        "output": [described(manifest.output)],
    }


def _description(manifest: Manifest) -> dict[str, Any]:
    """Return what OpenAPI says of an inference: its parameters in the query, and its body."""
    size = prod(manifest.input.shape[1:])
    example = {
        "inputs": [
            {
                "name": manifest.input.name,
                "shape": [1, *manifest.input.shape[1:]],
                "datatype": "FP32",
                "data": [0] * size,
            }
        ],
        "parameters": {"max_latency_ms": 5},
    }
    schema = {"type": "object", "required": ["inputs"], "example": example}
    fields = InferParameters.model_json_schema()["properties"]
    return {
        "parameters": in_query({name: fields[name] for name in protocol.PARAMETERS}),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
    }
