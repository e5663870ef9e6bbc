"""Errors that nobody foresaw: answered, and logged with where they came from.

The traceback is logged without the error's message, which may quote what was sent.
"""

import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Response

log = logging.getLogger(__name__)


class Unforeseen:
    """Answer a request that ends in an exception. FastAPI's own place for this is outside of all
    that is added to it: the answer would lack the request's ids."""

    def __init__(
        self, app: Callable[..., Awaitable[None]], answer: Callable[[str], Response]
    ) -> None:
        """`answer` gets the request's path."""
        self._app = app
        self._answer = answer

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noted(message: dict[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if has_begun:  # the server ends the connection, and logs why
                raise
            frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
            log.error("a request ended in %s:\n%s", type(error).__name__, frames)
            await self._answer(scope["path"])(scope, receive, send)
