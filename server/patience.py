"""Ends waits that take too long, with one timer for all of them."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Patience(Generic[T]):
    """Who is waited for, each for `seconds`; `on_due` is told of those that take longer.

    All are waited for equally long, so they are due in the order in which their waits began: the
    timer runs for the first. A timer for each would be made and cancelled with every request.
    """

    def __init__(self, seconds: float, on_due: Callable[[T], object]) -> None:
        self._seconds, self._on_due = seconds, on_due
        self._due_s: dict[T, float] = {}
        self._will_look = False

    def begin(self, one: T, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for one from now on, if it is not waited for already."""
        if one in self._due_s:
            return
        due_s = self._due_s[one] = loop.time() + self._seconds
        if not self._will_look:
            self._will_look = True
            loop.call_at(due_s, self._look, loop)

    def end(self, one: T) -> None:
        """Wait for one no more."""
        self._due_s.pop(one, None)

    @property
    def first(self) -> T | None:
        """Return the one that is waited for the longest."""
        return next(iter(self._due_s), None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the waits that are due, and be back for the next."""
        self._will_look = False
        while self._due_s:
            one, due_s = next(iter(self._due_s.items()))
            if loop.time() < due_s:
                self._will_look = True
                loop.call_at(due_s, self._look, loop)
                return
            del self._due_s[one]
            self._on_due(one)
