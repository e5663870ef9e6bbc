"""Which point, which batch: pure functions of what waits and of the latency tables.

A `Policy` sees a `View` and answers with a `Choice`; `choose` is ours.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from server.latencies import Latencies
from server.waiting import WaitingList

MS = 1e3


class Tables:
    """Latencies laid out for look-up. Columns are by batch size, rising along the points."""

    __slots__ = ("best", "full_batch", "latencies", "p50_ms", "tail_ms", "unit_ms")

    def __init__(self, latencies: Latencies) -> None:
        self.latencies = latencies
        sizes = range(latencies.max_batch)
        self.p50_ms = [[row[b] for row in latencies.p50_ms] for b in sizes]
        self.tail_ms = [[row[b] for row in latencies.tail_ms] for b in sizes]
        self.best: list[int] = []  # the most accurate point up to each
        for point, accuracy in enumerate(latencies.accuracy):
            last = self.best[-1] if self.best else 0
            self.best.append(point if accuracy > latencies.accuracy[last] else last)
        # The batch size with the most rows a second, and one row's share of it.
        self.full_batch = [
            1 + min(sizes, key=lambda b, row=row: (row[b] / (b + 1), -b))  # type: ignore[misc]
            for row in latencies.p50_ms
        ]
        self.unit_ms = [
            row[b - 1] / b for row, b in zip(latencies.p50_ms, self.full_batch, strict=True)
        ]

    def drain_ms(self, rows: float, point: int = 0) -> float:
        """Return how long one slot usually takes for so many rows at one point."""
        full = self.full_batch[point]
        batches, rest = divmod(math.ceil(rows), full)
        last_ms = self.p50_ms[rest - 1][point] if rest else 0.0
        return batches * full * self.unit_ms[point] + last_ms

    def fastest_ms(self, lowest: int, rows: int) -> float:
        """Return the tail of the quickest way to run so many rows at `lowest` or above."""
        return self.tail_ms[rows - 1][lowest]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last batch that ended."""

    batch_id: int
    rows: int
    point: int
    waited_ms: float  # its first request, before the batch started
    measured_ms: float


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at. `factor` multiplies tails, `level` medians."""

    now: float
    waiting: WaitingList
    tables: Tables
    factor: float = 1.0
    level: float = 1.0
    slots: int = 1
    finished: Finished | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Run `count` entries from place `start` at `point`; count 0: nothing until `wait_until_s`.

    `drop` entries at the head are given up first, and `start` counts from after them.
    """

    count: int
    point: int = 0
    start: int = 0
    drop: int = 0
    wait_until_s: float = math.inf


Policy = Callable[[View], Choice]


def choose(view: View) -> Choice:
    """Return the batch to run now: the most accurate that leaves nobody behind late."""
    tables, entries = view.tables, view.waiting.entries
    lowest, highest = 0, len(tables.best) - 1
    rows, expiry_s, floor = 0, math.inf, 0.0
    chosen = Choice(1, entries[0].lowest)
    for count, entry in enumerate(entries[: tables.latencies.max_batch], 1):
        rows += entry.request.rows
        lowest, highest = max(lowest, entry.lowest), min(highest, entry.highest)
        expiry_s, floor = min(expiry_s, entry.expiry_s), max(floor, entry.floor)
        if rows > tables.latencies.max_batch or lowest > highest:
            break
        budget_ms = MS * (expiry_s - view.now) / view.factor
        point = most_accurate(tables, rows, budget_ms, lowest, highest)
        if point is not None and tables.latencies.accuracy[point] >= floor:
            chosen = Choice(count, point)
    return chosen


def most_accurate(
    tables: Tables, rows: int, budget_ms: float, lowest: int, highest: int
) -> int | None:
    """Return the most accurate of the points lowest..highest whose tail fits, or None."""
    fits = bisect_right(tables.tail_ms[rows - 1], budget_ms) - 1
    return max(lowest, tables.best[min(fits, highest)]) if fits >= lowest else None
