"""What a batch that starts now does to everyone else: those behind it, and those yet to come.

Pure functions of a view of the scheduler. Times in ms from now.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from server.forecast import Envelope
from server.tables import MS, TABULATED, Tables
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
    """What may come: mean rows a second, and bursts, of which `fading` is still expected."""

    rate: float = 0.0
    windows_ms: Sequence[float] = ()
    envelopes: Sequence[Envelope] = ()
    fading: float = 1.0

    @property
    def target_ms(self) -> float:
        """The loosest class of targets, inf if there was none."""
        return self.envelopes[-1].target_ms if self.envelopes else math.inf


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

    A burst that begins just after the start of a batch that takes x has its request of y later
    done at x + drain(left behind + burst(y)), and that must be within y + target for every y:
    the delay bound of network calculus, for each class of targets with those tighter than it.
    """
    expected, tables, waiting = view.expected, view.tables, view.waiting
    dearer = max(1.0, waiting.work_ms / (waiting.rows * tables.unit_ms[0]))
    scale, drains, slots = view.level * dearer, tables.drains_ms, view.slots
    alone = rows if len(waiting) == 1 and not view.running else 0
    limit_ms = math.inf
    for envelope in expected.envelopes:
        target_ms = envelope.target_ms - tables.latencies.overhead_ms
        before = waiting.place((view.now + target_ms / MS, 0, 0)) * waiting.rows / len(waiting)
        left = max(0.0, before - rows)
        for window_ms, burst in zip(expected.windows_ms, envelope.bursts, strict=True):
            coming = burst * expected.fading - alone
            if coming >= 0.5:
                ahead = min(TABULATED, math.ceil((left + coming) / slots))
                limit_ms = min(limit_ms, target_ms + window_ms - scale * drains[ahead])
    return limit_ms


@dataclass(frozen=True, slots=True)
class Load:
    """What has to be served in the time of one target: the point that carries it (-1 if none
    does), and what a ms is then worth in accuracy."""

    point: int
    price: float


def load(view: View) -> Load:
    """Return the load of what waits and of what comes at the mean rate."""
    tables, waiting = view.tables, view.waiting
    horizon_ms = view.expected.target_ms
    if waiting.entries[-1].expiry_s < math.inf:
        horizon_ms = max(horizon_ms, MS * (waiting.entries[-1].expiry_s - view.now))
    others = waiting.rows - waiting.entries[0].request.rows
    queued = others / horizon_ms if horizon_ms > 0 else math.inf
    per_ms = view.level * (queued + view.expected.rate / MS)
    point = (
        bisect_right(tables.unit_ms, view.slots / per_ms) - 1
        if per_ms > 0
        else len(tables.unit_ms) - 1
    )
    return Load(point, tables.prices[point])


def worth(view: View, heads: tuple[int, int], point: int, now: Load) -> float:
    """Return the mean accuracy over a batch and over what will wait when it ends, less the
    worth of the mean time that it takes.

    heads: count and rows. What waits then is what the batch leaves behind and what comes
    meanwhile at the mean rate. It is served at one point: the one that carries the load, or
    a cheaper one where the slack of its first asks for that.
    """
    count, rows = heads
    tables, expected = view.tables, view.expected
    accuracy = tables.latencies.accuracy
    took_ms = view.level * tables.p50_ms[rows - 1][point]
    left = view.waiting.rows - rows
    after = left + expected.rate * took_ms / MS
    if after < 1e-3:
        return accuracy[point] - now.price * took_ms / rows
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
    then = min(then, max(0, now.point))
    if then < 0:
        accuracy_then, then_ms = 0.0, 0.0
    else:
        accuracy_then = accuracy[tables.best[then]]
        whole = math.ceil(after)
        then_ms = view.level * (
            tables.p50_ms[whole - 1][then] * after / whole
            if whole <= tables.latencies.max_batch
            else after * tables.unit_ms[then]
        )
    gained = rows * accuracy[point] + after * accuracy_then
    return (gained - now.price * (took_ms + then_ms)) / (rows + after)
