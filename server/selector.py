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
    limits_behind_ms,
    load,
    rows_between,
    worth,
)
from server.tables import MS

# Batch sizes that are weighed against each other, besides the largest possible one.
COUNTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Parts of the time limit that a batch is tried with.
SHARES = (1.0, 0.8, 0.6, 0.4)
# Somebody may be late by the time of so many rows before heads are passed over for the others:
# estimates are no better, and requests that hang up or finish early make room.
LATE = 3.0
_WEIGHED = frozenset(COUNTS)


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


@dataclass(frozen=True, slots=True)
class Heads:
    """Entries that can share a batch: what they allow together."""

    count: int
    rows: int
    lowest: int
    highest: int
    expiry_s: float


def choose(view: View) -> Choice:
    """Return the batch to run now: the most accurate that leaves nobody late.

    A request that finds the host idle gets the most accurate point in time, whatever may come.

    A batch is some of the earliest deadlines. Its time is limited by the tightest of them, by
    those left behind and by a burst that may come meanwhile; within the limit the point is the
    one with the best mean accuracy of the batch and of what will wait when it ends. Where no
    batch is short enough for the burst, the one that gets most through; where none is for
    those that wait, `_tight` or `most_on_time`.
    """
    options = sharing(view, 0)
    if len(view.waiting) == 1 and not view.running:
        point = _most_accurate(view, options[0])
        if point is not None:
            return Choice(1, point)
    due = due_by_place(view)
    counts = [heads.count for heads in options]
    behind_ms = limits_behind_ms(view, due, counts, rows_between(view, due))
    burst_limits = burst_limits_ms(view, [heads.rows for heads in options])
    now = load(view, due)
    best, best_pressed = (-math.inf, Choice(0)), (-math.inf, Choice(0))
    for heads, behind, burst_ms in zip(options, behind_ms, burst_limits, strict=True):
        limit_ms = min(MS * (heads.expiry_s - view.now), behind)
        quickest_ms = view.factor * view.tables.tail_ms[heads.rows - 1][heads.lowest]
        if quickest_ms > limit_ms:
            continue
        if burst_ms >= quickest_ms:
            score, point = _balanced(view, heads, min(limit_ms, burst_ms), now)
            best = max(best, (score + 1e-9 * heads.count, Choice(heads.count, point)), key=_score)
        else:
            pressed = (_saved(view, heads), Choice(heads.count, heads.lowest))
            best_pressed = max(best_pressed, pressed, key=_score)
    chosen = best[1] if best[1].count else best_pressed[1]
    return chosen if chosen.count else _tight(view, due, options) or most_on_time(view)


def _tight(view: View, due: Due, options: Sequence[Heads]) -> Choice | None:
    """Return the batch that leaves those behind the most time where times are as usual, not as
    the tail has them; None if even so somebody would be late by more than LATE rows' time."""
    counts = [heads.count for heads in options]
    best_ms, chosen = -LATE * view.level * view.tables.unit_ms[0], None
    for heads, behind_ms in zip(
        options, limits_behind_ms(view, due, counts, tail=False), strict=True
    ):
        took_ms = view.level * view.tables.p50_ms[heads.rows - 1][heads.lowest]
        if took_ms <= MS * (heads.expiry_s - view.now) and behind_ms - took_ms >= best_ms:
            best_ms, chosen = behind_ms - took_ms, Choice(heads.count, heads.lowest)
    return chosen


def _score(option: tuple[float, Choice]) -> float:
    return option[0]


def sharing(view: View, start: int) -> list[Heads]:
    """Return what the entries from place `start` allow, for each count that is weighed and for
    the largest that can share a batch."""
    tables, entries = view.tables, view.waiting.entries
    max_batch, accuracy = tables.latencies.max_batch, tables.latencies.accuracy
    rows, lowest, highest = 0, 0, len(accuracy) - 1
    floor, expiry_s = 0.0, math.inf
    options: list[Heads] = []
    count = 0
    for entry in entries[start : start + max_batch]:
        more = rows + entry.request.rows
        low, high = max(lowest, entry.lowest), min(highest, entry.highest)
        least = max(floor, entry.floor)
        if more > max_batch or low > high or accuracy[low] < least:
            break
        if count in _WEIGHED:
            options.append(Heads(count, rows, lowest, highest, expiry_s))
        rows, lowest, highest, floor = more, low, high, least
        expiry_s = min(expiry_s, entry.expiry_s)
        count += 1
    options.append(Heads(count, rows, lowest, highest, expiry_s))
    return options


def _most_accurate(view: View, heads: Heads) -> int | None:
    """Return the most accurate point whose tail is in time, if there is one."""
    budget_ms = MS * (heads.expiry_s - view.now) / view.factor
    fits = bisect_right(view.tables.tail_ms[heads.rows - 1], budget_ms) - 1
    if fits < heads.lowest:
        return None
    return max(heads.lowest, view.tables.best[min(fits, heads.highest)])


def _balanced(view: View, heads: Heads, limit_ms: float, now: Load) -> tuple[float, int]:
    """Return the best worth of a batch within a limit that `lowest` keeps, and its point."""
    tables, lowest = view.tables, heads.lowest
    column = tables.tail_ms[heads.rows - 1]
    best, last, best_worth = lowest, -1, -math.inf
    for share in SHARES:
        fits = min(bisect_right(column, share * limit_ms / view.factor) - 1, heads.highest)
        point = max(lowest, tables.best[fits]) if fits >= lowest else lowest
        if point == last:
            continue
        last, value = point, worth(view, heads.count, heads.rows, point, now)
        if value > best_worth:
            best, best_worth = point, value
    return best_worth, best


def _saved(view: View, heads: Heads) -> float:
    """Return the rows of a batch less what full batches would get through in its time."""
    took_ms = view.tables.p50_ms[heads.rows - 1][heads.lowest]
    return heads.rows - took_ms / view.tables.unit_ms[0]


def most_on_time(view: View) -> Choice:
    """Return the batch when not all can be on time: the one that wastes the least time.

    Heads that only allow a small batch are passed over where more can be served without them.
    """
    best = (-math.inf, Choice(1, view.waiting.entries[0].lowest))
    start, step = 0, 1
    while start < len(view.waiting):
        for heads in sharing(view, start):
            took_ms = view.level * view.tables.p50_ms[heads.rows - 1][heads.lowest]
            if took_ms > MS * (heads.expiry_s - view.now):
                break
            saved = _saved(view, heads) - 1e-9 * start
            best = max(best, (saved, Choice(heads.count, heads.lowest, start)), key=_score)
            if heads.rows >= view.tables.full_batch[0]:
                return best[1]
        start, step = start + step, step + 1
    return best[1]
