"""What a batch that starts now does to everyone else: those behind it, and those yet to come.

Pure functions of a view of the scheduler. Times in ms from now.

What they hand each other is made for each decision, and not frozen, as that takes time for each
field.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from server.forecast import Envelope
from server.tables import MS, Tables
from server.waiting import WaitingList


@dataclass(slots=True)
class Finished:
    """The last batch that ended."""

    batch_id: int
    rows: int
    point: int
    waited_ms: float  # its first request, before the batch started
    measured_ms: float


@dataclass(slots=True)
class Expected:
    """What may come: mean rows a second, and bursts, of which `fading` is still expected.

    overloaded: more comes than can be served, for longer than a burst.
    """

    rate: float = 0.0
    windows_ms: Sequence[float] = ()
    envelopes: Sequence[Envelope] = ()
    fading: float = 1.0
    overloaded: bool = False

    @property
    def target_ms(self) -> float:
        """The loosest class of targets, inf if there was none."""
        return self.envelopes[-1].target_ms if self.envelopes else math.inf


@dataclass(slots=True)
class View:
    """What a policy may look at. `factor` multiplies profiled tails, `level` medians."""

    now: float
    waiting: WaitingList
    tables: Tables
    factor: float = 1.0
    level: float = 1.0
    slots: int = 1
    running: int = 0
    expected: Expected = field(default_factory=Expected)
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


@dataclass(slots=True)
class Due:
    """When the queue is due, in blocks of places, and inf as one more: first place, rows before
    the last place, ms."""

    firsts: list[int]
    rows: list[float]
    ms: list[float]

    def behind(self, rows: float) -> "Due":
        """Return the same with so many rows before all."""
        return Due(self.firsts, [own + rows for own in self.rows], self.ms)


def due_by_place(view: View) -> Due:
    """Return when what waits must be done. A block is due with its first.

    Places of the next batch and one more are blocks of their own; those far back go in blocks an
    eighth of their distance long, so that there are O(log n).
    """
    waiting, now = view.waiting, view.now
    n = len(waiting.entries)
    firsts, lasts = _blocks(view.tables.max_batch, n)
    expiries_s, each = waiting.expiries_s, waiting.rows / n
    return Due(
        firsts,
        [each * last for last in lasts],
        [MS * (expiries_s[first] - now) for first in firsts],
    )


@lru_cache(maxsize=4096)
def _blocks(single: int, n: int) -> tuple[list[int], list[int]]:
    """Return the first places of blocks of places, and the last of each; n as one more.

    The first `single` + 1 places are blocks of their own.
    """
    firsts, lasts, first = [], [], 0
    while first < n:
        end = min(n, first + 1 if first <= single else first + max(1, first // 8))
        firsts.append(first)
        lasts.append(end - 1)
        first = end
    return [*firsts, n], [*lasts, n]


def due_with_bursts(view: View, due: Due) -> Due:
    """Return the same with the rows that may come yet and be due before each block is.

    Of each class of targets, a burst of those that still come early enough: the demand bound of
    earliest-deadline-first analysis, with measured bursts in place of periods.
    """
    expected, overhead_ms = view.expected, view.tables.overhead_ms
    latest_ms = due.ms[-2] + overhead_ms
    windows_ms = [0.0, *expected.windows_ms]
    rows = due.rows
    tighter: list[float] = []
    for envelope in expected.envelopes:
        early_ms = envelope.target_ms - overhead_ms
        if envelope.target_ms < latest_ms:
            own = bursts = [0.0, *[expected.fading * burst for burst in envelope.bursts]]
            if tighter:
                own = [a - b if a > b else 0.0 for a, b in zip(bursts, tighter, strict=True)]
            rows = [
                before + _linear(ms - early_ms, windows_ms, own) if ms > early_ms else before
                for before, ms in zip(rows, due.ms, strict=True)
            ]
            tighter = bursts
    return Due(due.firsts, rows, due.ms)


def _linear(at: float, xs: list[float], ys: list[float]) -> float:
    """Return the line through the points (xs, ys) at `at`, which is above the first; flat behind
    the last."""
    right = bisect_right(xs, at)
    if right == len(xs):
        return ys[-1]
    x, y = xs[right - 1], ys[right - 1]
    return y + (at - x) / (xs[right] - x) * (ys[right] - y)


def limits_behind_ms(
    view: View, due: Due, counts: Sequence[int], *, tail: bool = True
) -> list[float]:
    """Return for each count, rising, how long the engine may be taken for all from that place on
    to be on time yet, when they are then run at their lowest points.

    Batches all of one size are tried, for each of a few sizes: the entry of place j behind count
    c is done within (j - c) / size + 1 batches. With `tail`, the batch that counts takes its tail.
    """
    waiting, tables = view.waiting, view.tables
    n = len(waiting.entries)
    if counts[0] >= n:
        return [math.inf] * len(counts)
    single = tables.max_batch  # places up to it are blocks
    begin = [c if c <= single else bisect_right(due.firsts, c) - 1 for c in counts]
    each, scale, level, factor = waiting.rows / n, view.level * view.dearer, view.level, view.factor
    limits = [-math.inf] * len(counts)
    due_ms, due_rows = due.ms, due.rows
    for size_ms, size_tail_ms, size in zip(
        tables.batches_ms, tables.batch_tails_ms, tables.batch_sizes, strict=True
    ):
        share_ms = scale * size_ms / size / view.slots  # of a row
        batch_ms = scale * size_ms
        if tail:
            batch_ms += factor * size_tail_ms - level * size_ms
        least_ms, block = math.inf, len(due_ms) - 1
        for k in range(len(counts) - 1, -1, -1):
            while block >= begin[k]:
                spare_ms = due_ms[block] - share_ms * due_rows[block]
                if spare_ms < least_ms:
                    least_ms = spare_ms
                block -= 1
            limit_ms = least_ms + share_ms * each * counts[k] - batch_ms
            if limit_ms > limits[k]:
                limits[k] = limit_ms
    return limits


def burst_limits_ms(view: View, rows: Sequence[int], limits_ms: Sequence[float]) -> list[float]:
    """Return for batches of so many rows, rising, how long they may take for a burst that comes
    meanwhile, or their limits where those are lower.

    A burst that begins just after the start of a batch that takes x has its request of y later
    done at x + drain(left behind + burst(y)), and that must be within y + target for every y:
    the delay bound of network calculus, for each class of targets with those tighter than it.
    The fewer rows a batch takes, the tighter that is: windows that leave the first batch more
    than all limits are passed over.
    """
    expected, waiting, drains = view.expected, view.waiting, view.tables.drains_ms
    limits = list(limits_ms)
    ample_ms = 1.001 * max(limits)  # sums of drains_ms are exact to a rounding only
    alone = rows[0] if len(waiting.entries) == 1 and not view.running else 0
    scale, overhead_ms, slots = view.level * view.dearer, view.tables.overhead_ms, view.slots
    mean_rows, last = waiting.rows / len(waiting.entries), len(drains) - 1
    for envelope in expected.envelopes:
        target_ms = envelope.target_ms - overhead_ms
        before = mean_rows * waiting.place((view.now + target_ms / MS, 0, 0)) + 0.999
        lefts = [max(0.999, before - taken) for taken in rows]
        for window_ms, burst in zip(expected.windows_ms, envelope.bursts, strict=True):
            coming = burst * expected.fading - alone
            if coming < 0.5:
                continue
            latest_ms = target_ms + window_ms
            ahead = int((lefts[0] + coming) / slots)
            if latest_ms - scale * drains[ahead if ahead < last else last] > ample_ms:
                continue
            for k, left in enumerate(lefts):
                ahead = int((left + coming) / slots)
                limit_ms = latest_ms - scale * drains[ahead if ahead < last else last]
                if limit_ms < limits[k]:
                    limits[k] = limit_ms
    return limits


@dataclass(slots=True)
class Load:
    """What has to be served in the time of one target: rows a ms for each slot, on a host at
    profiled speed; the point that carries that (-1 if none does), and what a ms is then worth in
    accuracy."""

    per_ms: float
    point: int
    price: float


def load(view: View, due: Due | None) -> Load:
    """Return the load of what waits and of what comes at the mean rate.

    Without a target anywhere (`due` is None) what waits has for ever, and is no load. Else the most
    crowded of the prefixes of the queue counts, rows by time to its deadline (the
    critical interval of Yao, Demers and Shenker, FOCS 1995), or the queue and what comes in
    the time of the loosest target.
    """
    tables, waiting, expected = view.tables, view.waiting, view.expected
    per_ms = expected.rate / MS
    others = waiting.rows - waiting.entries[0].request.rows
    if due and others:
        horizon_ms = expected.target_ms
        last_ms = MS * (waiting.entries[-1].expiry_s - view.now)
        if last_ms < math.inf:
            horizon_ms = max(horizon_ms, last_ms)
        per_ms += others / horizon_ms
        least_ms = tables.unit_ms[0]
        for rows, due_ms in zip(due.rows[1:-1], due.ms[1:-1], strict=True):
            crowded = rows / (due_ms if due_ms > least_ms else least_ms)
            if crowded > per_ms:
                per_ms = crowded
    per_ms *= view.level / view.slots
    top = len(tables.unit_ms) - 1
    point = bisect_right(tables.unit_ms, 1 / per_ms) - 1 if per_ms > 0 else top
    return Load(per_ms, point, tables.prices[point])


def weigher(view: View, now: Load) -> Callable[[int, int, int], float]:
    """Return what gives the worth of a batch: of so many entries, so many rows, at a point.

    Its worth is the mean accuracy over the batch and over what will wait when it ends, less the
    worth of the mean time that it takes.

    What waits then is what the batch leaves behind and what comes
    meanwhile at the mean rate. It is served at one point: the one that carries the load, or
    a cheaper one where the slack of its first asks for that.

    A function within one, as up to 24 batches are weighed for one decision: what doesn't depend
    on the batch is looked up once.
    """
    tables, accuracy, max_batch = view.tables, view.tables.accuracy, view.tables.max_batch
    p50_ms, tail_ms = tables.p50_ms, tables.tail_ms
    unit_ms, reached = tables.unit_ms, tables.reached
    expiries_s, waiting_rows = view.waiting.expiries_s, view.waiting.rows
    clock_s, level, factor, slots = view.now, view.level, view.factor, view.slots
    rate, target_ms = view.expected.rate, view.expected.target_ms
    price, carrying = now.price, max(0, now.point)
    last_ms = MS * (expiries_s[-2] - clock_s)

    def worth(count: int, rows: int, point: int) -> float:
        took_ms = level * p50_ms[rows - 1][point]
        left = waiting_rows - rows
        after = left + rate * took_ms / MS
        if after < 1e-3:
            return accuracy[point] - price * took_ms / rows
        if after <= max_batch:
            whole = math.ceil(after)
            due_ms = MS * (expiries_s[count] - clock_s) if left else target_ms
            then = bisect_right(tail_ms[whole - 1], (due_ms - took_ms) / factor) - 1
        else:
            whole = 0
            due_ms = last_ms - took_ms if left else target_ms
            then = bisect_right(unit_ms, slots * due_ms / after / level) - 1
        if then < 0:
            return (rows * accuracy[point] - price * took_ms) / (rows + after)
        if then > carrying:
            then = carrying
        usual_ms = p50_ms[whole - 1][then] * after / whole if whole else after * unit_ms[then]
        gained = rows * accuracy[point] + after * reached[then]
        return (gained - price * (took_ms + level * usual_ms)) / (rows + after)

    return worth
