"""Published policies, in our words, for the same scheduler (built with `sheds=False`).

Each gets more than it was published with: exact latency tables for every batch size, and
requests that even a batch of their own would answer late are dropped before it is asked. None
knows the tail, the host's slow-down or the arrivals.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from server.outlook import View
from server.selector import Choice, Policy
from server.tables import MS, Tables
from server.waiting import Entry


def doomed(view: View, point: int = 0) -> int:
    """Return how many heads a run of their own at `point`, begun now, would answer too late."""
    entries, count = view.waiting.entries, 0
    p50_ms = view.tables.latencies.p50_ms[point]
    while count < len(entries):
        entry = entries[count]
        if entry.expiry_s >= view.now + p50_ms[entry.request.rows - 1] / MS:
            break
        count += 1
    return count


def _largest_batch(tables: Tables, point: int, budget_ms: float) -> int:
    """Return the largest batch that one point runs within a budget, 0 if none."""
    return bisect_right(tables.latencies.p50_ms[point], budget_ms)


def _largest_point(tables: Tables, rows: int, budget_ms: float) -> int:
    """Return the dearest point that runs `rows` within a budget, -1 if none."""
    return bisect_right(tables.p50_ms[rows - 1], budget_ms) - 1


def _start(view: View, drop: int, point: int, rows: int) -> Choice:
    """Return a batch of the first that is not dropped, and of the next up to so many rows."""
    filled = count = 0
    for entry in islice(view.waiting.entries, drop, drop + max(1, rows)):
        filled += entry.request.rows
        if count and filled > rows:
            break
        count += 1
    return Choice(count, point, drop=drop)


def _slack_ms(view: View, drop: int) -> float:
    return MS * (view.waiting.entries[drop].expiry_s - view.now)


def fixed(point: int) -> Policy:
    """Return Clipper+ of the SuperServe paper: one point, the batch as large as the head allows."""

    def choose(view: View) -> Choice:
        drop = doomed(view, point)
        if drop == len(view.waiting):
            return Choice(0, drop=drop)
        rows = _largest_batch(view.tables, point, _slack_ms(view, drop))
        return _start(view, drop, point, rows)

    return choose


def nexus(point: int) -> Policy:
    """Return the early drop of Nexus (SOSP 2019): one model, a window that slides over the queue.

    The batch is as large as what waits allows; heads that would be late in it are dropped for it,
    and it is made anew of what is left.
    """

    def choose(view: View) -> Choice:
        entries, tables = view.waiting.entries, view.tables
        drop = doomed(view, point)
        while drop < len(entries):
            choice = _start(view, drop, point, tables.latencies.max_batch)
            batch = entries[drop : drop + choice.count]
            rows = sum(entry.request.rows for entry in batch)
            end_s = view.now + tables.latencies.p50_ms[point][rows - 1] / MS
            if batch[0].expiry_s >= end_s:
                return choice
            drop += 1
        return Choice(0, drop=drop)

    return choose


@dataclass(slots=True)
class Clockwork:
    """Clockwork (OSDI 2020): one model; the largest batch that enough requests are in time for.

    A queue for each batch size holds those that have the time left that such a batch is thought to
    take, the most of the last ten of its size. Who comes before those that run is given up.
    """

    point: int
    _seen: int = 0
    _took_ms: dict[int, deque[float]] = field(default_factory=dict)

    def __call__(self, view: View) -> Choice:
        last = view.finished
        if last is not None and last.batch_id != self._seen:
            self._seen = last.batch_id
            self._took_ms.setdefault(last.rows, deque(maxlen=10)).append(last.measured_ms)
        entries, tables = view.waiting.entries, view.tables
        drop = self._first_in_time(view, doomed(view, self.point), 1)
        if drop == len(entries):
            return Choice(0, drop=drop)
        rows = 1
        while rows < tables.max_batch:
            first = self._first_in_time(view, drop, rows + 1)
            if len(entries) - first <= rows:
                break
            drop, rows = first, rows + 1
        return _start(view, drop, self.point, rows)

    def _first_in_time(self, view: View, first: int, rows: int) -> int:
        """Return the first place from `first` on that a batch of so many rows is in time for."""
        entries = view.waiting.entries
        while first < len(entries) and _slack_ms(view, first) < self._estimate_ms(
            view.tables, max(rows, entries[first].request.rows)
        ):
            first += 1
        return first

    def _estimate_ms(self, tables: Tables, rows: int) -> float:
        seen = self._took_ms.get(rows)
        return max(seen) if seen else tables.latencies.p50_ms[self.point][rows - 1]


def max_acc(view: View) -> Choice:
    """MaxAcc (SuperServe, NSDI 2025): the dearest point for one, then the largest batch for it."""
    drop = doomed(view)
    if drop == len(view.waiting):
        return Choice(0, drop=drop)
    slack_ms = _slack_ms(view, drop)
    point = max(0, _largest_point(view.tables, 1, slack_ms))
    return _start(view, drop, point, _largest_batch(view.tables, point, slack_ms))


def max_batch(view: View) -> Choice:
    """MaxBatch (same paper): the largest batch at the cheapest point, then the dearest point."""
    drop = doomed(view)
    if drop == len(view.waiting):
        return Choice(0, drop=drop)
    slack_ms = _slack_ms(view, drop)
    rows = max(1, _largest_batch(view.tables, 0, slack_ms))
    return _start(view, drop, max(0, _largest_point(view.tables, rows, slack_ms)), rows)


def slack_fit(tables: Tables, share: float = 1.0, buckets: int = 64) -> Policy:
    """Return SlackFit (same paper): evenly spaced latency buckets, each with its largest batch.

    share: part of the slack that is used; 1 as published. Less trades accuracy for targets met.
    """
    p50 = tables.latencies.p50_ms
    edges = np.linspace(p50[0][0], p50[-1][-1], buckets).tolist()
    controls = []
    for edge in edges:
        rows = _largest_batch(tables, 0, edge)
        controls.append((max(0, _largest_point(tables, max(1, rows), edge)), max(1, rows)))

    def choose(view: View) -> Choice:
        drop = doomed(view)
        if drop == len(view.waiting):
            return Choice(0, drop=drop)
        bucket = max(0, bisect_right(edges, share * _slack_ms(view, drop)) - 1)
        point, rows = controls[bucket]
        return _start(view, drop, point, rows)

    return choose


def infaas(view: View) -> Choice:
    """INFaaS (ATC 2021): each request's variant by its own target, the queue left out of account.

    Of the variants within the target, the one that leaves the least; requests of one variant
    share a batch.
    """
    drop = doomed(view)
    if drop == len(view.waiting):
        return Choice(0, drop=drop)
    entries = view.waiting.entries
    point = _variant(view.tables, entries[drop])
    most = max(1, _largest_batch(view.tables, point, _slack_ms(view, drop)))
    rows = 0
    for entry in entries[drop : drop + most]:
        if _variant(view.tables, entry) != point:
            break
        rows += entry.request.rows
    return _start(view, drop, point, min(rows, most))


def _variant(tables: Tables, entry: Entry) -> int:
    return max(0, _largest_point(tables, 1, _target_ms(entry)))


def _target_ms(entry: Entry) -> float:
    request = entry.request
    return MS * (entry.expiry_s - request.arrival_s)


@dataclass(slots=True)
class Clipper:
    """Clipper (NSDI 2017): one model; batch cap +1 while batches are in time, x 0.9 when not."""

    point: int
    cap: float = 1.0
    _seen: int = 0
    _budgets_ms: dict[int, float] = field(default_factory=dict)

    def __call__(self, view: View) -> Choice:
        last = view.finished
        if last is not None and last.batch_id != self._seen:
            self._seen = last.batch_id
            budget_ms = self._budgets_ms.pop(last.batch_id, last.measured_ms)
            if last.measured_ms > budget_ms:
                self.cap = max(1.0, 0.9 * self.cap)
            elif last.rows >= int(self.cap):
                self.cap = min(self.cap + 1, float(view.tables.latencies.max_batch))
        drop = doomed(view, self.point)
        if drop == len(view.waiting):
            return Choice(0, drop=drop)
        self._budgets_ms[self._seen + 1] = 0.92 * _slack_ms(view, drop)
        return _start(view, drop, self.point, int(self.cap))


@dataclass(slots=True)
class BentoML:
    """BentoML's CorkDispatcher: one model; waits for more while that costs less than usual.

    duration(n) = slope n + base over the last 50 batches; heads are cancelled when the whole
    queue would not be done within the target.
    """

    point: int
    tick_ms: float = 1.0
    slope_ms: float = 0.0
    base_ms: float = 0.0
    usual_wait_ms: float = 0.0
    _seen: int = 0
    _batches: deque[tuple[int, float, float]] = field(default_factory=lambda: deque(maxlen=50))

    def __call__(self, view: View) -> Choice:
        self._learn(view)
        entries, drop = view.waiting.entries, 0
        while len(entries) - drop > 1 and self._is_hopeless(view, drop):
            drop += 1
        queued = len(entries) - drop
        last_wait_ms = MS * (view.now - entries[-1].request.arrival_s)
        worth_waiting = (
            queued * (last_wait_ms + self.tick_ms + self.slope_ms) <= 0.95 * self.usual_wait_ms
        )
        if queued < view.tables.latencies.max_batch and worth_waiting:
            return Choice(0, drop=drop, wait_until_s=view.now + self.tick_ms / MS)
        return _start(view, drop, self.point, view.tables.latencies.max_batch)

    def _is_hopeless(self, view: View, drop: int) -> bool:
        head, queued = view.waiting.entries[drop], len(view.waiting) - drop
        waited_ms = MS * (view.now - head.request.arrival_s)
        return waited_ms + self.slope_ms * queued + self.base_ms >= _target_ms(head)

    def _learn(self, view: View) -> None:
        last = view.finished
        if last is None or last.batch_id == self._seen:
            return
        self._seen = last.batch_id
        self._batches.append((last.rows, last.measured_ms, last.waited_ms))
        rows, took_ms, waited_ms = (np.array(column) for column in zip(*self._batches, strict=True))
        self.usual_wait_ms = float(waited_ms.mean())
        spread = float(((rows - rows.mean()) ** 2).sum())
        covariance = float(((rows - rows.mean()) * (took_ms - took_ms.mean())).sum())
        self.slope_ms = max(0.0, covariance / spread) if spread else float((took_ms / rows).mean())
        self.base_ms = max(0.0, float(took_ms.mean() - self.slope_ms * rows.mean()))


def carrying_point(tables: Tables, rate: float, slots: int = 1) -> int:
    """Return the dearest point that carries a mean rate with a quarter to spare (else 0).

    What an operator who knew the load would have deployed, for systems with one model.
    """
    affordable = [p for p, ms in enumerate(tables.unit_ms) if 1.25 * rate * ms / MS <= slots]
    return affordable[-1] if affordable else 0


# Name -> policy, new for each run as some of them learn, from the tables and the point that
# systems with one model have deployed.
RIVALS: dict[str, Callable[[Tables, int], Policy]] = {
    "largest": lambda tables, _: fixed(len(tables.unit_ms) - 1),
    "middle": lambda tables, _: fixed(len(tables.unit_ms) // 2),
    "smallest": lambda _tables, _: fixed(0),
    "infaas": lambda _tables, _: infaas,
    "maxacc": lambda _tables, _: max_acc,
    "maxbatch": lambda _tables, _: max_batch,
    "slackfit": lambda tables, _: slack_fit(tables),
    "clipper": lambda _, point: Clipper(point),
    "clockwork": lambda _, point: Clockwork(point),
    "nexus": lambda _, point: nexus(point),
    "nexus-smallest": lambda _tables, _: nexus(0),
    "bentoml": lambda _, point: BentoML(point),
}
