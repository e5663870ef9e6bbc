"""Calls past the routing: the exact paths and methods, their errors, everything else handed on."""

import asyncio
from typing import Any

import pytest
from fastapi import Request, Response

from server.direct import Direct, DirectCalls
from server.errors import InvalidError, ServiceError


async def answered(request: Request) -> Response:
    return Response(await request.body(), 200)


async def wrong(_: Request) -> Response:
    raise InvalidError("no")


async def broken(_: Request) -> Response:
    raise ZeroDivisionError


async def as_problem(_: Request, error: ServiceError) -> Response:
    return Response(error.code, error.status)


async def routed(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 299, "headers": []})


CALLS = {
    path: Direct(path, call)
    for path, call in {"/infer": answered, "/wrong": wrong, "/broken": broken}.items()
}


def asked(path: str, method: str = "POST", kind: str = "http") -> tuple[dict[str, Any], list[Any]]:
    """Return the scope that is left by a request, and what was sent."""
    scope: dict[str, Any] = {"type": kind, "path": path, "headers": [], "query_string": b""}
    if kind == "http":
        scope["method"] = method
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"seven"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = DirectCalls(routed, CALLS, {ServiceError: as_problem})
    asyncio.run(app(scope, receive, send))
    return scope, sent


def test_a_post_to_its_path_is_answered_and_its_route_noted() -> None:
    scope, sent = asked("/infer")

    assert (sent[0]["status"], sent[1]["body"]) == (200, b"seven")
    assert scope["route"].path == "/infer"


@pytest.mark.parametrize(
    ("path", "method"), [("/infer", "GET"), ("/infer/", "POST"), ("/", "POST")]
)
def test_other_paths_and_methods_are_handed_on(path: str, method: str) -> None:
    assert asked(path, method)[1][0]["status"] == 299


def test_what_is_no_request_is_handed_on() -> None:
    assert asked("/infer", kind="websocket")[1][0]["status"] == 299


def test_an_error_is_answered_by_the_handler_of_its_class() -> None:
    _, sent = asked("/wrong")

    assert (sent[0]["status"], sent[1]["body"]) == (422, b"invalid")


def test_an_unknown_error_is_raised_on() -> None:
    with pytest.raises(ZeroDivisionError):
        asked("/broken")
