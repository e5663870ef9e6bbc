"""Watches for clients that hang up while their requests wait."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect

Receive = Callable[[], Awaitable[Any]]

# A client is watched once its request has waited this long: to watch takes a task, which takes
# longer than most requests wait.
PATIENCE_S = 0.01


class HangUps:
    """Fails the futures of those who hang up, on the event loop that it is made on."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # In the order in which they came, with when that was.
        self._unwatched: dict[asyncio.Future[Any], tuple[float, Receive]] = {}
        self._watches: dict[asyncio.Future[Any], asyncio.Task[None]] = {}
        self._will_look = False

    def expect(self, future: asyncio.Future[Any], receive: Receive) -> None:
        """Let `future` raise ClientDisconnect when `receive` says so."""
        self._unwatched[future] = time.monotonic(), receive
        if not self._will_look:
            self._will_look = True
            self._loop.call_later(PATIENCE_S, self._look)

    def forget(self, future: asyncio.Future[Any]) -> None:
        """Watch no more."""
        self._unwatched.pop(future, None)
        watch = self._watches.pop(future, None)
        if watch is not None:
            watch.cancel()

    def _look(self) -> None:
        """Watch all who have waited for long, and be back while there are others."""
        due_s = time.monotonic() - PATIENCE_S
        for future, (since_s, receive) in list(self._unwatched.items()):
            if since_s > due_s:
                break
            del self._unwatched[future]
            self._watches[future] = self._loop.create_task(_watch(future, receive))
        self._will_look = bool(self._unwatched)
        if self._will_look:
            self._loop.call_later(PATIENCE_S, self._look)


async def _watch(future: asyncio.Future[Any], receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    if not future.done():
        future.set_exception(ClientDisconnect())
