"""The requests that wait, earliest deadline first. Keeps order and sums; decides nothing."""

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from server.requests import Request


@dataclass(slots=True, eq=False)
class Entry:
    """A waiting request with what its wishes come to on this host.

    order: place in the queue (time, priority level, number of arrival).
    expiry_s: when the engine must be done with it; inf without a target.
    lowest..highest: the points that it may run at; floor: the accuracy that it must get.
    work_ms: its share of a full batch at the lowest of them, host at profiled speed.
    """

    request: Request
    order: tuple[float, int, int]
    expiry_s: float
    lowest: int
    highest: int
    floor: float
    work_ms: float
    late: bool = False  # no point makes its target; served as soon as may be


class WaitingList:
    """Entries sorted by `order`, with the sums that the selector needs.

    expiries_s: of the entries, and inf as one more; an array, for numpy to read at once.
    timed: how many have a target.
    """

    __slots__ = ("_orders", "entries", "expiries_s", "rows", "timed", "work_ms")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.expiries_s = array("d", [math.inf])
        self._orders: list[tuple[float, int, int]] = []
        self.rows = 0
        self.timed = 0
        self.work_ms = 0.0

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def place(self, order: tuple[float, int, int]) -> int:
        """Return how many entries come before one of this order."""
        return bisect_left(self._orders, order)

    def add(self, entry: Entry) -> None:
        """Put an entry in its place."""
        place = bisect_left(self._orders, entry.order)
        self.entries.insert(place, entry)
        self.expiries_s.insert(place, entry.expiry_s)
        self._orders.insert(place, entry.order)
        self.rows += entry.request.rows
        self.timed += entry.expiry_s < math.inf
        self.work_ms += entry.work_ms

    def take(self, start: int, count: int) -> list[Entry]:
        """Remove and return `count` entries from place `start` on."""
        taken = self.entries[start : start + count]
        end = start + len(taken)
        del self.entries[start:end]
        del self.expiries_s[start:end]
        del self._orders[start:end]
        for entry in taken:
            self.rows -= entry.request.rows
            self.timed -= entry.expiry_s < math.inf
            self.work_ms -= entry.work_ms
        if not self.entries:
            self.work_ms = 0.0  # rounding must not add up over days
        return taken

    def remove(self, entry: Entry) -> None:
        """Remove one entry that is in the list."""
        self.take(self.place(entry.order), 1)
