"""What a batch that starts now does to everyone else: those behind it, and those yet to come.

Pure functions of a view of the scheduler. Times in ms from now.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from server.forecast import Envelope
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
        return self.level * self.dearer * self.tables.drain_ms(rows / self.slots)

    @property
    def dearer(self) -> float:
        """Return how much more work the waiting rows are at their lowest points than at 0."""
        waiting = self.waiting
        if not waiting.rows:
            return 1.0
        return max(1.0, waiting.work_ms / (waiting.rows * self.tables.unit_ms[0]))


@dataclass(frozen=True, slots=True)
class Due:
    """When the queue is due, in blocks of places, inf as one more: first place, last place, ms."""

    lows: NDArray[np.int64]
    ends: NDArray[np.float64]
    ms: NDArray[np.float64]


def due_by_place(view: View) -> Due:
    """Return when what waits must be done. A block is due with its first.

    Places of the next batch and one more are blocks of their own; those far back go in blocks an
    eighth of their distance long, so that there are O(log n).
    """
    entries = view.waiting.entries
    lows, ends = _blocks(view.tables.latencies.max_batch, len(entries))
    expiries_s = [entries[low].expiry_s for low in lows.tolist()[:-1]]
    return Due(lows, ends, MS * (np.array([*expiries_s, math.inf]) - view.now))


@lru_cache(maxsize=4096)
def _blocks(single: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the first places of blocks of places, and the last of each, and n as one more.

    The first `single` + 1 places are blocks of their own.
    """
    lows, ends, low = [], [], 0
    while low < n:
        high = min(n, low + 1 if low <= single else low + max(1, low // 8))
        lows.append(low)
        ends.append(high - 1)
        low = high
    return np.array([*lows, n]), np.array([*ends, n], dtype=np.float64)


def rows_between(view: View, due: Due) -> NDArray[np.float64]:
    """Return (blocks + 1,): the rows that may come yet and be due before each block is.

    Of each class of targets, a burst of those that still come early enough: the demand bound of
    earliest-deadline-first analysis, with measured bursts in place of periods.
    """
    expected, overhead_ms = view.expected, view.tables.latencies.overhead_ms
    rows = np.zeros(len(due.ms))
    spans_ms = due.ms[:-1] + overhead_ms
    classes = [e for e in expected.envelopes if e.target_ms < spans_ms[-1]]
    if classes:
        bursts = expected.fading * np.array([[0.0, *e.bursts] for e in classes])
        bursts[1:] = np.maximum(bursts[1:] - bursts[:-1], 0.0)  # without the tighter classes
        windows_ms = [0.0, *expected.windows_ms]
        for envelope, own in zip(classes, bursts, strict=True):
            rows[:-1] += np.interp(spans_ms - envelope.target_ms, windows_ms, own)
    return rows


def limits_behind_ms(
    view: View,
    due: Due,
    counts: Sequence[int],
    extra_rows: NDArray[np.float64] | float = 0.0,
    *,
    tail: bool = True,
) -> list[float]:
    """Return for each count how long the engine may be taken for all from that place on to be
    on time yet, when they are then run at their lowest points.

    Batches all of one size are tried, for each of a few sizes: the entry of place j behind count
    c is done within (j - c) / size + 1 batches. `extra_rows` more come before them, or before each
    block. With `tail`, the batch that counts takes its tail.
    """
    waiting, tables = view.waiting, view.tables
    n = len(waiting)
    if counts[0] >= n:
        return [math.inf] * len(counts)
    scale = view.level * view.dearer
    share_ms = scale * tables.share_ms / view.slots  # (sizes, 1) of a row
    batch_ms = scale * tables.batch_ms
    if tail:
        batch_ms = batch_ms + view.factor * tables.batch_tail_ms - view.level * tables.batch_ms
    mean_rows = waiting.rows / n if n else 1.0
    spare_ms = due.ms - share_ms * (mean_rows * due.ends + extra_rows)  # (sizes, blocks + 1)
    spare_ms = np.minimum.accumulate(spare_ms[:, ::-1], axis=1)[:, ::-1]
    at = np.searchsorted(due.lows, counts, side="right") - 1
    served = mean_rows * np.asarray(counts)
    limits: list[float] = (spare_ms[:, at] + share_ms * served - batch_ms).max(axis=0).tolist()
    return limits


def burst_limits_ms(view: View, rows: Sequence[int]) -> list[float]:
    """Return for batches of so many rows how long they may take for a burst that comes meanwhile.

    A burst that begins just after the start of a batch that takes x has its request of y later
    done at x + drain(left behind + burst(y)), and that must be within y + target for every y:
    the delay bound of network calculus, for each class of targets with those tighter than it.
    """
    expected, waiting, drains = view.expected, view.waiting, view.tables.drains_ms
    limits = [math.inf] * len(rows)
    alone = rows[0] if len(waiting) == 1 and not view.running else 0
    scale, overhead_ms = view.level * view.dearer, view.tables.latencies.overhead_ms
    mean_rows, last = waiting.rows / len(waiting), len(drains) - 1
    for envelope in expected.envelopes:
        target_ms = envelope.target_ms - overhead_ms
        before = mean_rows * waiting.place((view.now + target_ms / MS, 0, 0)) + 0.999
        lefts = [max(0.999, before - taken) for taken in rows]
        for window_ms, burst in zip(expected.windows_ms, envelope.bursts, strict=True):
            coming = burst * expected.fading - alone
            if coming < 0.5:
                continue
            latest_ms = target_ms + window_ms
            for k, left in enumerate(lefts):
                ahead = int((left + coming) / view.slots)
                limit_ms = latest_ms - scale * drains[ahead if ahead < last else last]
                if limit_ms < limits[k]:
                    limits[k] = limit_ms
    return limits


@dataclass(frozen=True, slots=True)
class Load:
    """What has to be served in the time of one target: the point that carries it (-1 if none
    does), and what a ms is then worth in accuracy."""

    point: int
    price: float


def load(view: View, due: Due) -> Load:
    """Return the load of what waits and of what comes at the mean rate.

    The most crowded of the prefixes of the queue counts, rows by time to its deadline (the
    critical interval of Yao, Demers and Shenker, FOCS 1995), or the queue and what comes in
    the time of the loosest target.
    """
    tables, waiting, expected = view.tables, view.waiting, view.expected
    horizon_ms = expected.target_ms
    mean_rows = waiting.rows / len(waiting)
    last_ms = MS * (waiting.entries[-1].expiry_s - view.now)
    if last_ms < math.inf:
        horizon_ms = max(horizon_ms, last_ms)
    others = waiting.rows - waiting.entries[0].request.rows
    per_ms = others / horizon_ms + expected.rate / MS
    if others:
        crowded = mean_rows * due.ends[1:-1] / np.maximum(due.ms[1:-1], tables.unit_ms[0])
        per_ms = max(per_ms, float(crowded.max()))
    per_ms *= view.level / view.slots
    top = len(tables.unit_ms) - 1
    point = bisect_right(tables.unit_ms, 1 / per_ms) - 1 if per_ms > 0 else top
    return Load(point, tables.prices[point])


def worth(view: View, count: int, rows: int, point: int, now: Load) -> float:
    """Return the mean accuracy over a batch and over what will wait when it ends, less the
    worth of the mean time that it takes.

    What waits then is what the batch leaves behind and what comes
    meanwhile at the mean rate. It is served at one point: the one that carries the load, or
    a cheaper one where the slack of its first asks for that.
    """
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
