"""Inferences past FastAPI's routing, which costs more than a small network takes to run.

FastAPI has the same calls as routes: it describes them, and answers paths that are not here.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

# In the state of a request that was begun without ASGI (server.connections): its error.
FAILED = "maestro.failed"

Call = Callable[[Request], Awaitable[Response]]
ErrorAnswers = Mapping[Any, Callable[[Request, Any], Any]]


@dataclass(frozen=True, slots=True)
class Direct:
    """A call, and its path in the description, for whoever asks which route it was."""

    path: str
    call: Call


class DirectCalls:
    """Answer POSTs to these exact paths; hand every other request on."""

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        calls: Mapping[str, Direct],
        errors: ErrorAnswers,
    ) -> None:
        """`errors` says by class how an exception is answered; others are raised on."""
        self._app = app
        self._calls = calls
        self._errors = errors

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401
        direct = self._calls.get(scope["path"]) if scope.get("method") == "POST" else None
        if direct is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = direct
        request = Request(scope, receive)
        try:
            failed = scope.get("state", {}).get(FAILED)
            if failed is not None:
                raise failed
            response = await direct.call(request)
        except Exception as error:
            answer = next((self._errors[k] for k in type(error).__mro__ if k in self._errors), None)
            if answer is None:
                raise
            response = await answer(request, error)
        await response(scope, receive, send)
