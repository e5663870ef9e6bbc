"""Which point, which batch: pure functions of what waits, what may come and the tables.

A `Policy` sees a `View` and answers with a `Choice`; `choose` is ours (docs/scheduling.md).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.outlook import View, burst_limit_ms, limits_behind_ms, load, worth, Load
from server.tables import MS, Tables

# Batch sizes that are weighed against each other, besides the largest possible one.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# Parts of the time limit that a batch is tried with.
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)


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
    floor: float
    expiry_s: float


def choose(view: View) -> Choice:
    """Return the batch to run now: the most accurate that leaves nobody late.

    A batch is some of the earliest deadlines. Its time is limited by the tightest of them, by
    those left behind and by a burst that may come meanwhile; within the limit the point is the
    one with the best mean accuracy of the batch and of what will wait when it ends.
    """
    heads = [h for h in prefixes(view, 0) if h.count in _WEIGHED]
    largest = _last(prefixes(view, 0))
    if largest.count not in _WEIGHED:
        heads.append(largest)
    behind_ms = limits_behind_ms(view, [h.count for h in heads])
    now = load(view)
    best_score, chosen = -math.inf, None
    for head, behind in zip(heads, behind_ms, strict=True):
        limit_ms = min(MS * (head.expiry_s - view.now), behind)
        option = _balanced(view, head, limit_ms, now)
        if option is not None and option[1] >= best_score - 1e-9:
            best_score, chosen = option[1], Choice(head.count, option[0])
    return chosen or most_on_time(view)


_WEIGHED = frozenset(COUNTS)


def prefixes(view: View, start: int) -> Iterator[Heads]:
    """Yield what the first one, two, ... entries from place `start` allow, while they can share."""
    tables = view.tables
    max_batch, accuracy = tables.latencies.max_batch, tables.latencies.accuracy
    rows, lowest, highest = 0, 0, len(accuracy) - 1
    floor, expiry_s = 0.0, math.inf
    for count, entry in enumerate(view.waiting.entries[start : start + max_batch], 1):
        rows += entry.request.rows
        lowest, highest = max(lowest, entry.lowest), min(highest, entry.highest)
        floor, expiry_s = max(floor, entry.floor), min(expiry_s, entry.expiry_s)
        if rows > max_batch or lowest > highest or accuracy[lowest] < floor:
            return
        yield Heads(count, rows, lowest, highest, floor, expiry_s)


def _last(heads: Iterator[Heads]) -> Heads:
    *_, last = heads
    return last


def most_accurate(
    tables: Tables, rows: int, budget_ms: float, lowest: int, highest: int
) -> int | None:
    """Return the most accurate of the points lowest..highest whose tail fits, or None."""
    fits = bisect_right(tables.tail_ms[rows - 1], budget_ms) - 1
    return max(lowest, tables.best[min(fits, highest)]) if fits >= lowest else None


def _balanced(view: View, heads: Heads, limit_ms: float, now: Load) -> tuple[int, float] | None:
    """Return the point for a batch and the mean accuracy that follows, None if none is in time."""
    tables, rows, lowest = view.tables, heads.rows, heads.lowest
    if most_accurate(tables, rows, limit_ms / view.factor, lowest, heads.highest) is None:
        return None
    quickest_ms = view.factor * tables.tail_ms[rows - 1][lowest]
    limit_ms = max(quickest_ms, min(limit_ms, burst_limit_ms(view, rows)))
    best, score, last = lowest, -math.inf, -1
    for share in SHARES:
        budget_ms = max(quickest_ms, share * limit_ms) / view.factor
        point = most_accurate(tables, rows, budget_ms, lowest, heads.highest)
        if point is None or point == last:
            continue
        accuracy, last = worth(view, (heads.count, rows), point, now), point
        if accuracy > score:
            best, score = point, accuracy
    return best, score


def most_on_time(view: View) -> Choice:
    """Return the batch when not all can be on time: the one that wastes the least.

    Time is what is short now, and a full batch at the lowest point the best use of it. So a
    batch is worth its rows less what full batches would get through in its time, and heads that
    only allow a small one are passed over where more can be served without them.
    """
    tables = view.tables
    unit_ms = view.level * tables.unit_ms[0]
    best_worth, chosen = -math.inf, Choice(1, view.waiting.entries[0].lowest)
    start, step = 0, 1
    while start < len(view.waiting):
        fitting = None
        for heads in prefixes(view, start):
            took_ms = view.level * tables.p50_ms[heads.rows - 1][heads.lowest]
            if took_ms > MS * (heads.expiry_s - view.now):
                break
            fitting = heads
        if fitting is not None:
            took_ms = view.level * tables.p50_ms[fitting.rows - 1][fitting.lowest]
            worth = fitting.rows - took_ms / unit_ms
            if worth > best_worth + 1e-9:
                best_worth, chosen = worth, Choice(fitting.count, fitting.lowest, start)
            if fitting.rows >= tables.full_batch[0]:
                break
        start, step = start + step, step + 1
    return chosen
