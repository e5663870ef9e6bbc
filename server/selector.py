"""Which point, which batch: pure functions of what waits, what may come and the tables.

A `Policy` sees a `View` and answers with a `Choice`; `choose` is ours (docs/scheduling.md).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.outlook import (
    Due,
    Load,
    View,
    burst_limits_ms,
    due_by_place,
    due_with_bursts,
    limits_behind_ms,
    load,
    weigher,
)
from server.tables import MS
from server.waiting import Entry

# Batch sizes that are weighed against each other, besides the largest possible one.
COUNTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Parts of the time limit that a batch is tried with.
SHARES = (1.0, 0.8, 0.6, 0.4)
# Somebody may be late by the time of so many rows before heads are passed over for the others:
# estimates are no better, and requests that hang up or finish early make room. Under overload
# there is no such hope, and none may be.
LATE = 3.0
# Where times are tight, a batch must be in time as nine in ten are: that far from the median to the
# profiled tail, (ln 10 - ln 2) / (ln 1e4 - ln 2), with an exponential spread.
NINE_IN_TEN = 0.19
# Batches that are surely in time carry a load well up to this part of what they get through: above
# it a queue grows that is late sooner than a larger batch would be.
CARRIED = 0.8
_WEIGHED = frozenset(COUNTS)


# Made for each decision, and not frozen, as that takes time for each field.


@dataclass(slots=True)
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


@dataclass(slots=True)
class Heads:
    """Entries that can share a batch: what they allow together."""

    count: int
    rows: int
    lowest: int
    highest: int
    expiry_s: float


# What is possible: heads, time limit and quickest time in ms.
Possible = tuple[Heads, float, float]


def choose(view: View) -> Choice:
    """Return the batch to run now: the most accurate that leaves nobody late.

    A request that finds the host idle gets the most accurate point in time, whatever may come;
    else `reserve`.
    """
    if len(view.waiting.entries) == 1 and not view.running:
        point = _most_accurate(view, view.waiting.entries[0])
        if point is not None:
            return Choice(1, point)
    return reserve(view)


def reserve(view: View) -> Choice:
    """Return the batch to run now, with time left for what may come, on an idle host too.

    A batch is some of the earliest deadlines. Its time is limited by the tightest of them, by
    those left behind and by a burst that may come meanwhile; within the limit the point is the
    one with the best mean accuracy of the batch and of what will wait when it ends. Where no
    batch is short enough for the burst, the one that gets most through; where none is for
    those that wait, or those that are fall behind the load, `_tight` or `most_on_time`.
    """
    options = sharing(view, 0)
    if not view.waiting.timed and not view.expected.envelopes:
        return _unhurried(view, options)
    due = due_by_place(view)
    counts = [heads.count for heads in options]
    behind_ms = limits_behind_ms(view, due_with_bursts(view, due), counts)
    possible = []
    for heads, behind in zip(options, behind_ms, strict=True):
        limit_ms = min(MS * (heads.expiry_s - view.now), behind)
        quickest_ms = view.factor * view.tables.tail_ms[heads.rows - 1][heads.lowest]
        if quickest_ms <= limit_ms:
            possible.append((heads, limit_ms, quickest_ms))
    if possible:
        now = load(view, due)
        chosen = _tight(view, due, options) if _falls_behind(view, options, possible, now) else None
        return chosen or _best(view, possible, now)
    return _tight(view, due, options) or most_on_time(view)


def _unhurried(view: View, options: Sequence[Heads]) -> Choice:
    """Return the batch of the best worth where nothing has a target: no time is a limit.

    `reserve` would come to the same without this, by way of limits that are all infinite.
    """
    worth = weigher(view, load(view, None))
    best = -math.inf, 0, 0
    for heads in options:
        score, point = _balanced(view, heads, math.inf, worth)
        score += 1e-9 * heads.count
        if score > best[0]:
            best = score, heads.count, point
    return Choice(*best[1:])


def _best(view: View, possible: Sequence[Possible], now: Load) -> Choice:
    """Return the best of batches that are possible."""
    worth = weigher(view, now)
    rows = [heads.rows for heads, _, _ in possible]
    limits_ms = burst_limits_ms(view, rows, [limit_ms for _, limit_ms, _ in possible])
    best, best_pressed = (-math.inf, 0, 0), (-math.inf, 0, 0)
    for (heads, _, quickest_ms), limit_ms in zip(possible, limits_ms, strict=True):
        if limit_ms >= quickest_ms:
            score, point = _balanced(view, heads, limit_ms, worth)
            score += 1e-9 * heads.count
            if score > best[0]:
                best = score, heads.count, point
        elif (saved := _saved(view, heads)) > best_pressed[0]:
            best_pressed = saved, heads.count, heads.lowest
    return Choice(*(best if best[1] else best_pressed)[1:])


def _falls_behind(
    view: View, options: Sequence[Heads], possible: Sequence[Possible], now: Load
) -> bool:
    """Return whether a queue grows where no batch is larger than those possible, and one may be."""
    if possible[-1][0].count == options[-1].count:
        return False
    columns = view.tables.p50_ms
    most = max(heads.rows / columns[heads.rows - 1][heads.lowest] for heads, _, _ in possible)
    return now.per_ms > CARRIED * most


def _tight(view: View, due: Due, options: Sequence[Heads]) -> Choice | None:
    """Return the batch that leaves those behind the most time where times are as usual, not as
    the tail has them; None if even so somebody would be late by more than LATE rows' time.

    The batch itself must be in time as nine in ten are: with as usual, half of those that were
    just in time were late (2 % of what was answered at three times what point 0 carries).

    None under overload where anybody would be late: who is given up makes room for others.
    """
    counts = [heads.count for heads in options]
    late = 0.0 if view.expected.overloaded else LATE
    best_ms, chosen = -late * view.level * view.tables.unit_ms[0], None
    for heads, behind_ms in zip(
        options, limits_behind_ms(view, due, counts, tail=False), strict=True
    ):
        took_ms = view.level * view.tables.p50_ms[heads.rows - 1][heads.lowest]
        if behind_ms - took_ms >= best_ms and _is_likely_in_time(view, heads, took_ms):
            best_ms, chosen = behind_ms - took_ms, Choice(heads.count, heads.lowest)
    return chosen


def sharing(view: View, start: int) -> list[Heads]:
    """Return what the entries from place `start` allow, for each count that is weighed and for
    the largest that can share a batch."""
    entries, max_batch, accuracy = view.waiting.entries, view.tables.max_batch, view.tables.accuracy
    rows, lowest, highest = 0, 0, len(accuracy) - 1
    floor, expiry_s = 0.0, math.inf
    options: list[Heads] = []
    count = 0
    for entry in entries[start : start + max_batch]:
        more, low, high, least = entry.request.rows + rows, entry.lowest, entry.highest, entry.floor
        if low < lowest:
            low = lowest
        if high > highest:
            high = highest
        if least < floor:
            least = floor
        if more > max_batch or low > high or accuracy[low] < least:
            break
        if count in _WEIGHED:
            options.append(Heads(count, rows, lowest, highest, expiry_s))
        rows, lowest, highest, floor = more, low, high, least
        if entry.expiry_s < expiry_s:
            expiry_s = entry.expiry_s
        count += 1
    options.append(Heads(count, rows, lowest, highest, expiry_s))
    return options


def _most_accurate(view: View, entry: Entry) -> int | None:
    """Return the most accurate point whose tail is in time, if there is one."""
    tables = view.tables
    budget_ms = MS * (entry.expiry_s - view.now) / view.factor
    fits = bisect_right(tables.tail_ms[entry.request.rows - 1], budget_ms) - 1
    if fits < entry.lowest:
        return None
    return max(entry.lowest, tables.best[min(fits, entry.highest)])


def _balanced(
    view: View, heads: Heads, limit_ms: float, worth: Callable[[int, int, int], float]
) -> tuple[float, int]:
    """Return the best worth of a batch within a limit that `lowest` keeps, and its point."""
    lowest, highest, factor = heads.lowest, heads.highest, view.factor
    column, most_accurate = view.tables.tail_ms[heads.rows - 1], view.tables.best
    best, last, best_worth = lowest, -1, -math.inf
    for share in SHARES:
        fits = bisect_right(column, share * limit_ms / factor) - 1
        if fits > highest:
            fits = highest
        point = most_accurate[fits] if fits >= lowest else lowest
        if point < lowest:
            point = lowest
        if point == last:
            continue
        last, value = point, worth(heads.count, heads.rows, point)
        if value > best_worth:
            best, best_worth = point, value
    return best_worth, best


def _is_likely_in_time(view: View, heads: Heads, took_ms: float) -> bool:
    """Return whether nine in ten such batches are in time, which usually take `took_ms`."""
    tail_ms = max(took_ms, view.factor * view.tables.tail_ms[heads.rows - 1][heads.lowest])
    likely_ms = took_ms + NINE_IN_TEN * (tail_ms - took_ms)
    return likely_ms <= MS * (heads.expiry_s - view.now)


def _saved(view: View, heads: Heads) -> float:
    """Return the rows of a batch less what full batches would get through in its time."""
    took_ms = view.tables.p50_ms[heads.rows - 1][heads.lowest]
    return heads.rows - took_ms / view.tables.unit_ms[0]


def most_on_time(view: View) -> Choice:
    """Return the batch when not all can be on time: the one that wastes the least time.

    Heads that only allow a small batch are passed over where more can be served without them.
    """
    best, chosen = -math.inf, Choice(1, view.waiting.entries[0].lowest)
    start, step = 0, 1
    while start < len(view.waiting.entries):
        for heads in sharing(view, start):
            took_ms = view.level * view.tables.p50_ms[heads.rows - 1][heads.lowest]
            if not _is_likely_in_time(view, heads, took_ms):
                break
            saved = _saved(view, heads) - 1e-9 * start
            if saved > best:
                best, chosen = saved, Choice(heads.count, heads.lowest, start)
            if heads.rows >= view.tables.full_batch[0]:
                return chosen
        start, step = start + step, step + 1
    return chosen
