"""The requests that wait, earliest deadline first. Keeps order and sums; decides nothing."""

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from server.requests import Request
from server.tables import MS


@dataclass(slots=True, eq=False)
class Entry:
    """A waiting request with what its wishes come to on this host.

    order: place in the queue (time, priority level, number of arrival).
    expiry_s: when the engine must be done with it; inf without a target.
    lowest..highest: the points that it may run at; floor: the accuracy that it must get.
    work_ms: its share of a full batch at the lowest of them, host at profiled speed.
    alone_ms: what it usually takes in a batch of its own there.
    kind: what those have in common that can't be on time any more in the order that they wait;
    nan of one that is late, for which that depends on the host's speed when it came.
    preempted: how often its batch was interrupted.
    """

    request: Request
    order: tuple[float, int, int]
    expiry_s: float
    lowest: int
    highest: int
    floor: float
    work_ms: float
    alone_ms: float
    late: bool = False  # no point makes its target; served as soon as may be
    preempted: int = 0
    kind: float = field(init=False)

    def __post_init__(self) -> None:
        self.kind = math.nan if self.late else self.alone_ms
        if self.expiry_s == math.inf:
            self.kind = math.inf


class WaitingList:
    """Entries sorted by `order`, with the sums that the selector needs.

    expiries_s: of the entries, and inf as one more; an array, for numpy to read at once.
    timed: how many have a target.
    """

    __slots__ = (
        "_alone_ms",
        "_kind",
        "_orders",
        "_others",
        "entries",
        "expiries_s",
        "rows",
        "timed",
        "work_ms",
    )

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.expiries_s = array("d", [math.inf])
        self._orders: list[tuple[float, int, int]] = []
        self._alone_ms = array("d")
        self._kind = math.nan  # of the first that came, and how many have another
        self._others = 0
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
        if not self.entries:
            self._kind = entry.kind
        place = bisect_left(self._orders, entry.order)
        self.entries.insert(place, entry)
        self.expiries_s.insert(place, entry.expiry_s)
        self._orders.insert(place, entry.order)
        self._alone_ms.insert(place, entry.alone_ms)
        self.rows += entry.request.rows
        self.timed += entry.expiry_s < math.inf
        self.work_ms += entry.work_ms
        self._others += entry.kind != self._kind

    def take(self, start: int, count: int) -> list[Entry]:
        """Remove and return `count` entries from place `start` on."""
        taken = self.entries[start : start + count]
        end = start + len(taken)
        del self.entries[start:end]
        del self.expiries_s[start:end]
        del self._orders[start:end]
        del self._alone_ms[start:end]
        for entry in taken:
            self.rows -= entry.request.rows
            self.timed -= entry.expiry_s < math.inf
            self.work_ms -= entry.work_ms
            self._others -= entry.kind != self._kind
        if not self.entries:
            self.work_ms = 0.0  # rounding must not add up over days
        return taken

    def doomed(self, now: float, level: float) -> list[Entry]:
        """Return those that can't be on time any more; medians are `level` times the profiled."""
        if self._others:
            return [self.entries[i] for i in np.flatnonzero(self._latest_s(level) < now)]
        late: list[Entry] = []
        for entry in self.entries:
            if entry.expiry_s - level * entry.alone_ms / MS >= now:
                break
            late.append(entry)
        return late

    def next_doom_s(self, level: float) -> float:
        """Return when the next of them can't be on time any more; inf if none ever."""
        if self._others:
            return float(self._latest_s(level).min())
        if not self.entries:
            return math.inf
        return self.entries[0].expiry_s - level * self.entries[0].alone_ms / MS

    def _latest_s(self, level: float) -> NDArray[np.float64]:
        """Return when each must begin to be on time, (entries,)."""
        return np.frombuffer(self.expiries_s)[:-1] - level / MS * np.frombuffer(self._alone_ms)

    def remove(self, entry: Entry) -> None:
        """Remove one entry that is in the list."""
        self.take(self.place(entry.order), 1)
