"""Which points are in memory: the most recently used that fit a budget. Loads nothing itself."""

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Residency(Generic[T]):
    """Points are loaded when first used and dropped when others need the room.

    A point that is not resident costs nothing but the time to load it again; one that is dropped
    while it runs stays alive until it has run. Safe to use from several threads.
    """

    def __init__(
        self,
        load: Callable[[int], T],
        size_bytes: Callable[[Iterable[int]], int],
        budget_bytes: int | None,
    ) -> None:
        """`size_bytes` says what some points hold together. None for the budget keeps all."""
        self._load, self._size_bytes, self._budget_bytes = load, size_bytes, budget_bytes
        self._resident: dict[int, T] = {}  # least recently used first
        self._lock = threading.Lock()

    @property
    def resident(self) -> tuple[int, ...]:
        """Return the points in memory, least recently used first."""
        with self._lock:
            return tuple(self._resident)

    def get(self, point: int) -> T:
        """Return a point, loaded; the last one used is kept even if it alone exceeds the budget."""
        if self._budget_bytes is None and point in self._resident:
            return self._resident[point]
        with self._lock:
            found = self._resident.pop(point, None)
            if found is None:
                self._make_room(point, self._budget_bytes)
                found = self._load(point)
            self._resident[point] = found
            return found

    def _make_room(self, point: int, budget_bytes: int | None) -> None:
        if budget_bytes is None:
            return
        while self._resident and self._size_bytes([*self._resident, point]) > budget_bytes:
            del self._resident[next(iter(self._resident))]
