"""What no policy can beat: schedules that know every arrival in advance, on a steady host.

The value of a schedule is the mean accuracy over all requests, where a missed one counts 0.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulator.workloads import Array, Workload
from server.latencies import Latencies

MAX_EXHAUSTIVE = 9


@dataclass(frozen=True, slots=True)
class _Frontier:
    """Partial schedules none of which is both earlier free and worth more: both (S,) rise."""

    free_ms: Array
    worth: Array

    @classmethod
    def of(cls, free_ms: Array, worth: Array) -> "_Frontier":
        order = np.lexsort((-worth, free_ms))
        free_ms, worth = free_ms[order], worth[order]
        best_before = np.concatenate(([-math.inf], np.maximum.accumulate(worth)[:-1]))
        kept = worth > best_before + 1e-12
        return cls(free_ms[kept], worth[kept])

    def from_ms(self, start_ms: float) -> "_Frontier":
        """Return the same schedules where nothing starts before `start_ms`."""
        first = max(0, int(np.searchsorted(self.free_ms, start_ms, "right")) - 1)
        return _Frontier(np.maximum(self.free_ms[first:], start_ms), self.worth[first:])


@dataclass(frozen=True, slots=True)
class _Instance:
    """arrivals_ms, due_ms (n,): due is when the engine must be done. took_ms (P, max_batch)."""

    arrivals_ms: Array
    due_ms: Array
    accuracy: Array
    took_ms: Array

    @classmethod
    def of(cls, workload: Workload, latencies: Latencies) -> "_Instance":
        arrivals_ms = 1e3 * workload.arrivals_s
        due_ms = arrivals_ms + workload.targets_ms - latencies.overhead_ms
        took_ms = np.array(latencies.p50_ms)
        return cls(arrivals_ms, due_ms, np.array(latencies.accuracy), took_ms)

    def run(
        self, frontier: _Frontier, rows: int, due_ms: float, resolution_ms: float
    ) -> tuple[Array, Array] | None:
        """Return (free_ms, worth) after one more batch that is on time, None if none is."""
        ends_ms = frontier.free_ms[:, None] + self.took_ms[:, rows - 1]  # (S, P)
        on_time = ends_ms <= due_ms
        if not on_time.any():
            return None
        worth = frontier.worth[:, None] + rows * self.accuracy
        ends_ms = ends_ms[on_time]
        if resolution_ms:
            ends_ms = np.floor(ends_ms / resolution_ms) * resolution_ms
        return ends_ms, worth[on_time]


def best_value(workload: Workload, latencies: Latencies, resolution_ms: float = 0.0) -> float:
    """Return the value of the best schedule on one slot, for requests with one target for all.

    Exact at resolution 0. Else the ends of batches are rounded down to it: an upper bound, in
    time that grows with the number of requests only. With one target some best schedule runs
    batches of consecutive arrivals, in order (an exchange argument), so dynamic programming over
    (next request, when the slot is free) finds it; of those pairs only the undominated are kept.

    Raises:
        ValueError: the targets differ.
    """
    if len(np.unique(workload.targets_ms)) > 1:
        raise ValueError("targets_ms must be one for all requests")
    instance = _Instance.of(workload, latencies)
    n = len(instance.arrivals_ms)
    reached: list[list[tuple[Array, Array]]] = [[] for _ in range(n + 1)]
    reached[0].append((np.zeros(1), np.zeros(1)))
    for i in range(n):
        frontier = _Frontier.of(*(np.concatenate(part) for part in zip(*reached[i], strict=True)))
        frontier = frontier.from_ms(instance.arrivals_ms[i])
        reached[i] = []
        reached[i + 1].append((frontier.free_ms, frontier.worth))
        for rows in range(1, min(latencies.max_batch, n - i) + 1):
            ready = frontier.from_ms(instance.arrivals_ms[i + rows - 1])
            after = instance.run(ready, rows, instance.due_ms[i], resolution_ms)
            if after is None:
                break
            reached[i + rows].append(after)
    return max(float(worth.max()) for _, worth in reached[n]) / n


def exhaustive_value(workload: Workload, latencies: Latencies) -> float:
    """Return the value of the best schedule on one slot, whatever the targets, by trying all.

    Raises:
        ValueError: there are more requests than can be tried.
    """
    instance = _Instance.of(workload, latencies)
    n = len(instance.arrivals_ms)
    if n > MAX_EXHAUSTIVE:
        raise ValueError(f"at most {MAX_EXHAUSTIVE} requests can be tried, not {n}")
    reached: dict[int, list[tuple[Array, Array]]] = {0: [(np.zeros(1), np.zeros(1))]}
    best = 0.0
    for done in range(1 << n):
        if done not in reached:
            continue
        parts = zip(*reached.pop(done), strict=True)
        frontier = _Frontier.of(*(np.concatenate(part) for part in parts))
        best = max(best, float(frontier.worth.max()))
        for batch in _subsets(((1 << n) - 1) & ~done):
            members = [i for i in range(n) if batch >> i & 1]
            if len(members) > latencies.max_batch:
                continue
            ready = frontier.from_ms(float(instance.arrivals_ms[members].max()))
            after = instance.run(ready, len(members), float(instance.due_ms[members].min()), 0.0)
            if after is not None:
                reached.setdefault(done | batch, []).append(after)
    return best / n


def _subsets(mask: int) -> list[int]:
    """Return every subset of a bit mask but the empty one."""
    subsets, subset = [], mask
    while subset:
        subsets.append(subset)
        subset = (subset - 1) & mask
    return subsets


def fluid_value(workload: Workload, latencies: Latencies, slots: int = 1) -> float:
    """Return an upper bound on the value, whatever the targets, for any number of requests.

    Each request costs its share of the batch size that is cheapest a row, and may be split;
    those that arrive within a window have its time and that of the last one's target. The
    least over several window lengths.
    """
    instance = _Instance.of(workload, latencies)
    single_ms = instance.took_ms[:, 0]
    allowed = single_ms <= (instance.due_ms - instance.arrivals_ms)[:, None]  # (n, P)
    caps = np.where(allowed.any(axis=1), allowed.sum(axis=1) - 1, -1)
    longest_ms = float(workload.targets_ms.max())
    span_ms = float(instance.arrivals_ms[-1] - instance.arrivals_ms[0])
    lengths_ms = [longest_ms * 2**k for k in range(8)] + [span_ms + longest_ms]
    return min(_windows_value(instance, caps, ms, slots) for ms in lengths_ms)


def _windows_value(
    instance: _Instance, caps: NDArray[np.int_], length_ms: float, slots: int
) -> float:
    starts_ms = instance.arrivals_ms - instance.arrivals_ms[0]
    windows = np.floor(starts_ms / length_ms).astype(int)
    hulls = [_hull(instance, cap) for cap in range(len(instance.accuracy))]
    total = 0.0
    for window in np.unique(windows):
        members = windows == window
        time_ms = slots * float(instance.due_ms[members].max() - instance.arrivals_ms[members][0])
        total += _filled(np.bincount(caps[members] + 1)[1:].tolist(), hulls, time_ms)
    return total / len(caps)


def _hull(instance: _Instance, cap: int) -> list[tuple[float, float, float]]:
    """Return (gain a ms, ms, gain) of each step up from nothing to points 0..cap, best first."""
    rows = np.arange(1, instance.took_ms.shape[1] + 1)
    unit_ms = (instance.took_ms / rows).min(axis=1)
    steps, at_ms, at = [], 0.0, 0.0
    left = list(range(cap + 1))
    while left:
        extra = [(max(unit_ms[p] - at_ms, 1e-9), instance.accuracy[p] - at) for p in left]
        best = int(np.argmax([gain / ms for ms, gain in extra]))
        ms, gain = (float(part) for part in extra[best])
        if gain <= 0:
            break
        steps.append((gain / ms, ms, gain))
        at_ms, at = at_ms + ms, at + gain
        left = left[best + 1 :]
    return steps


def _filled(
    counts: list[int], hulls: list[list[tuple[float, float, float]]], time_ms: float
) -> float:
    """Return the accuracy that requests gain in a time; `counts` of them stop at each cap."""
    steps = sorted(
        ((step, n) for n, hull in zip(counts, hulls, strict=False) for step in hull if n),
        reverse=True,
    )
    total = 0.0
    for (_, ms, gain), count in steps:
        share = min(1.0, time_ms / (count * ms))
        total += share * count * gain
        time_ms -= share * count * ms
    return total
