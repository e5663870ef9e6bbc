"""What no policy can beat: schedules that know every arrival in advance, on a steady host.

The value of a schedule is the mean accuracy over all requests, where a missed one counts 0.
"""

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.simulator.workloads import Array, Workload
from server.latencies import Latencies


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

    def run(self, frontier: _Frontier, rows: int, due_ms: float) -> tuple[Array, Array] | None:
        """Return (free_ms, worth) after one more batch that is on time, None if none is."""
        ends_ms = frontier.free_ms[:, None] + self.took_ms[:, rows - 1]  # (S, P)
        on_time = ends_ms <= due_ms
        if not on_time.any():
            return None
        worth = frontier.worth[:, None] + rows * self.accuracy
        return ends_ms[on_time], worth[on_time]


def best_value(workload: Workload, latencies: Latencies) -> float:
    """Return the value of the best schedule on one slot, for requests with one target for all.

    With one target some best schedule runs batches of consecutive arrivals, in order (an exchange
    argument), so dynamic programming over (next request, when the slot is free) finds it; of those
    pairs only the undominated are kept.

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
            after = instance.run(ready, rows, instance.due_ms[i])
            if after is None:
                break
            reached[i + rows].append(after)
    return max(float(worth.max()) for _, worth in reached[n]) / n
