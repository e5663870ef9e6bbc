"""What a batch that starts now does to everyone else: those behind it, and those yet to come.

Pure functions of a view of the scheduler. Times in ms from now.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from server.tables import MS, Tables
from server.waiting import WaitingList


@dataclass(frozen=True, slots=True)
class Finished:
    """The last batch that ended."""

    batch_id: int
    rows: int
    point: int
    waited_ms: float  # its first request, before the batch started
    measured_ms: float


@dataclass(frozen=True, slots=True)
class Expected:
    """What may come: mean rows a second, and the most rows within each window."""

    rate: float = 0.0
    windows_ms: Sequence[float] = ()
    bursts: Sequence[float] = ()
    target_ms: float = math.inf  # the tightest of late, less the overhead


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at. `factor` multiplies profiled tails, `level` medians."""

    now: float
    waiting: WaitingList
    tables: Tables
    factor: float = 1.0
    level: float = 1.0
    slots: int = 1
    running: int = 0
    expected: Expected = Expected()
    finished: Finished | None = None

    def drain_ms(self, rows: float) -> float:
        """Return how long so many of the waiting rows usually take at their lowest points."""
        tables, waiting = self.tables, self.waiting
        dearer = 1.0
        if waiting.rows:
            dearer = max(1.0, waiting.work_ms / (waiting.rows * tables.unit_ms[0]))
        return self.level * dearer * tables.drain_ms(rows / self.slots)

    def excess_ms(self) -> float:
        """Return by how much the last batch of a queue may take longer than usual."""
        tables = self.tables
        full = tables.full_batch[0] - 1
        return self.factor * tables.tail_ms[full][0] - self.level * tables.p50_ms[full][0]


def spare_ms(
    view: View, start: int, excess_ms: float, extra_rows: int = 0
) -> list[tuple[int, float]]:
    """Return (place, spare) from `start` on: by how much all from that place on can be delayed
    when the queue is worked off at the lowest points, `extra_rows` before them.

    The last place comes first. Places far back go in blocks an eighth of their distance long,
    each as if all of it were due with its first: O(log n), and on the safe side.
    """
    entries = view.waiting.entries
    n = len(entries)
    mean_rows = view.waiting.rows / n if n else 1.0
    now = view.now
    spare, spares = math.inf, []
    for low, high in _blocks(start, view.tables.latencies.max_batch, n):
        due_ms = MS * (entries[low].expiry_s - now)
        spare = min(spare, due_ms - view.drain_ms(high * mean_rows + extra_rows) - excess_ms)
        spares.append((low, spare))
    return spares


@lru_cache(maxsize=8192)
def _blocks(start: int, single: int, n: int) -> list[tuple[int, int]]:
    """Return (first, end) of blocks of places, last block first; the near ones of one place."""
    blocks, low = [], start
    while low < n:
        high = min(n, low + 1 if low <= start + single else low + max(1, low // 8))
        blocks.append((low, high))
        low = high
    return blocks[::-1]


def limits_behind_ms(view: View, counts: Sequence[int]) -> list[float]:
    """Return for each count, rising, how long a batch of so many heads may take for all that
    are left behind to be on time yet."""
    limits = [math.inf] * len(counts)
    at = len(counts) - 1
    mean_rows = view.waiting.rows / len(view.waiting)
    for low, spare in spare_ms(view, 1, view.excess_ms()):
        while at >= 0 and counts[at] > low:
            at -= 1
        if at >= 0 and counts[at] == low:
            limits[at] = spare + view.drain_ms(low * mean_rows)
    return limits


def burst_limit_ms(view: View, rows: int) -> float:
    """Return how long a batch may take for a burst that comes meanwhile to be on time.

    Who comes just after the start of a batch that takes x waits x, and then for those left
    behind and those of the burst: x + drain(left + burst(x)) <= the tightest target of late.
    """
    expected = view.expected
    if expected.target_ms == math.inf:
        return math.inf
    left = view.waiting.rows - rows
    alone = rows if len(view.waiting) == 1 and not view.running else 0
    limit_ms = start_ms = 0.0
    for end_ms, burst in zip(expected.windows_ms, expected.bursts, strict=True):
        coming = burst - alone
        if coming >= 0.5:
            allowed_ms = expected.target_ms - view.drain_ms(left + coming)
            limit_ms = max(start_ms, min(allowed_ms, end_ms))
            if allowed_ms < end_ms:
                return limit_ms
        start_ms = limit_ms = end_ms
    return math.inf if limit_ms == 0.0 or coming < 0.5 else max(limit_ms, allowed_ms)


def mean_accuracy(view: View, count: int, rows: int, point: int) -> float:
    """Return the mean accuracy over the batch and over what will wait when it ends.

    What waits then is what it leaves behind and what comes meanwhile at the mean rate, and is
    served at one point: the dearest that the slack of its first allows, or, where it fills more
    than a batch, that works it off by the deadline of its last.
    """
    tables, expected = view.tables, view.expected
    accuracy = tables.latencies.accuracy
    took_ms = view.level * tables.p50_ms[rows - 1][point]
    left = view.waiting.rows - rows
    after = left + expected.rate * took_ms / MS
    if after < 1e-3:
        return accuracy[point]
    if left:
        entries = view.waiting.entries
        first_ms = MS * (entries[count].expiry_s - view.now) - took_ms
        last_ms = MS * (entries[-1].expiry_s - view.now) - took_ms
    else:
        first_ms, last_ms = expected.target_ms - took_ms, expected.target_ms
    if after <= tables.latencies.max_batch:
        column = tables.tail_ms[math.ceil(after) - 1]
        then = bisect_right(column, first_ms / view.factor) - 1
    else:
        then = bisect_right(tables.unit_ms, view.slots * last_ms / after / view.level) - 1
    accuracy_then = accuracy[tables.best[then]] if then >= 0 else 0.0
    return (rows * accuracy[point] + after * accuracy_then) / (rows + after)
