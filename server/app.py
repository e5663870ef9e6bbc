"""The application: routes, and errors turned into answers. Every decision is made elsewhere."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from server import oip_routes, routes, simple, tracing
from server.bodies import Bodies
from server.direct import Direct, DirectCalls
from server.errors import PROBLEM_TYPE, InternalError, InvalidError, ServiceError
from server.http import Written, refusal
from server.page import page
from server.schemas import Problem
from server.service import Service
from server.settings import Settings
from server.tracing import Tracing
from server.unforeseen import Unforeseen

_CLIENT_GONE = 499
_METHOD_NOT_ALLOWED = 405


def create_app(settings: Settings, service: Service | None = None) -> FastAPI:
    """Return the application; it measures and serves once the server starts it.

    Raises:
        ArtifactError, EngineError: the artifact of the settings cannot be served.
    """
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
        # FastAPI's own pages ask another host for their scripts; server.page has one that does not.
        docs_url=None,
        redoc_url=None,
        # Spans are made in server.tracing; FastAPI would look for its own at every request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        responses={"default": _any_error()},
    )
    bodies = Bodies(settings.max_body_bytes, settings.max_bodies_bytes)
    routers = (
        routes.inference(served, bodies),
        routes.calibration(served, bodies),
        routes.health(served),
        oip_routes.protocol_v2(served, bodies),
        page(served.artifact.manifest),
    )
    for router in routers:
        app.include_router(router)
    _add_errors(app, served, [app.router, *routers])
    if not (settings.access_log or tracing.is_recording()):  # lines and spans are the usual way's
        app.state.whole = simple.Whole(served, bodies)
    app.add_middleware(DirectCalls, calls=_direct(served, bodies), errors=app.exception_handlers)
    app.add_middleware(Unforeseen, answer=partial(_failed, served))
    app.add_middleware(Tracing, access_log=settings.access_log)
    return app


def _direct(service: Service, bodies: Bodies) -> dict[str, Direct]:
    name = service.artifact.manifest.name
    return {
        simple.INFER: Direct(simple.INFER, simple.infer_call(service, bodies)),
        oip_routes.INFER.format(model=name): Direct(
            oip_routes.INFER, oip_routes.infer_call(service, bodies)
        ),
    }


def _any_error() -> dict[str, Any]:
    """Return what OpenAPI says of errors; a model would be described as of each call's own type."""
    return {
        "description": "An error (RFC 9457); Retry-After comes with 503",
        "content": {PROBLEM_TYPE: {"schema": Problem.model_json_schema()}},
    }


def _refused(service: Service, path: str, error: ServiceError) -> Response:
    """Return what an error is answered with, counted where an inference was asked for."""
    _count(service, path, error.code, error.members.get("reason"))
    return Written(*refusal(error))


def _count(service: Service, path: str, code: str, reason: str | None = None) -> None:
    if path.endswith("/infer"):
        service.counting.refused(code, reason)


def _failed(service: Service, path: str) -> Response:
    return _refused(service, path, InternalError("the server failed; its log says where"))


def _add_errors(app: FastAPI, service: Service, routers: Sequence[APIRouter]) -> None:
    @app.exception_handler(ServiceError)
    async def known(request: Request, error: ServiceError) -> Response:
        return _refused(service, request.scope["path"], error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return Written(*refusal(InvalidError(f"{name or 'the body'}: {first['msg']}")))

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> Response:
        headers = error.headers
        if error.status_code == _METHOD_NOT_ALLOWED:  # a route knows of its own methods only
            headers = {"Allow": ", ".join(_methods(routers, request))}
        detail = str(error.detail)
        content = {
            "type": "about:blank",
            "title": detail,
            "status": error.status_code,
            "detail": detail,
            "error": detail,
        }
        return Response(orjson.dumps(content), error.status_code, headers, media_type=PROBLEM_TYPE)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, _error: ClientDisconnect) -> Response:
        _count(service, request.scope["path"], "client-gone")
        return Response(status_code=_CLIENT_GONE)


def _methods(routers: Sequence[APIRouter], request: Request) -> list[str]:
    """Return the methods that some route takes at this path.

    What an application keeps of the routers that it includes has no methods.
    """
    found: set[str] = set()
    for route in (route for router in routers for route in router.routes):
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)
