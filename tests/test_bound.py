"""The upper bound: dynamic programming against trying everything, and against policies."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulator.bound import best_value
from benchmarks.simulator.events import Replica, simulate
from benchmarks.simulator.host import Host, Quantiles
from benchmarks.simulator.workloads import Workload, gamma, one_target
from server.latencies import Latencies
from server.scheduler import Scheduler

LATENCIES = Latencies(
    (0.6, 0.7, 0.8),
    ((1.0, 1.5, 2.0), (2.0, 3.0, 4.0), (4.0, 7.0, 10.0)),
    ((1.0, 1.5, 2.0), (2.0, 3.0, 4.0), (4.0, 7.0, 10.0)),
    overhead_ms=0.2,
)
GAPS_MS = st.lists(st.sampled_from((0.0, 0.3, 0.9, 2.0, 5.0)), min_size=1, max_size=6)


def workload(gaps_ms: list[float], targets_ms: list[float]) -> Workload:
    return Workload("drawn", np.cumsum(gaps_ms) / 1e3, np.array(targets_ms))


def exhaustive_value(drawn: Workload, latencies: Latencies) -> float:
    """Return the value of the best schedule on one slot, by trying every set for every batch."""
    arrivals_ms = 1e3 * drawn.arrivals_s
    due_ms = arrivals_ms + drawn.targets_ms - latencies.overhead_ms
    n = len(arrivals_ms)
    # What is served -> when the slot is free, and what that is worth.
    reached: dict[frozenset[int], set[tuple[float, float]]] = {frozenset(): {(0.0, 0.0)}}
    sizes = range(1, latencies.max_batch + 1)
    for served in (frozenset(c) for k in range(n) for c in combinations(range(n), k)):
        for batch in (c for k in sizes for c in combinations(set(range(n)) - served, k)):
            ready_ms, until_ms = arrivals_ms[list(batch)].max(), due_ms[list(batch)].min()
            after = reached.setdefault(served.union(batch), set())
            for free_ms, worth in undominated(reached.get(served, set())):
                for accuracy, took_ms in zip(latencies.accuracy, latencies.p50_ms, strict=True):
                    end_ms = max(free_ms, ready_ms) + took_ms[len(batch) - 1]
                    if end_ms <= until_ms:
                        after.add((end_ms, worth + len(batch) * accuracy))
    return max(worth for pairs in reached.values() for _, worth in pairs) / n


def undominated(pairs: set[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the pairs than which no other is both earlier free and worth more."""
    return [
        (free_ms, worth)
        for free_ms, worth in pairs
        if not any(f <= free_ms and w >= worth and (f, w) != (free_ms, worth) for f, w in pairs)
    ]


@settings(max_examples=40)
@given(GAPS_MS, st.sampled_from((0.9, 1.3, 3.0, 5.1, 9.0)))
def test_the_best_schedule_is_what_trying_all_finds(gaps_ms: list[float], target_ms: float) -> None:
    drawn = workload(gaps_ms, [target_ms] * len(gaps_ms))

    assert best_value(drawn, LATENCIES) == pytest.approx(exhaustive_value(drawn, LATENCIES))


def test_a_policy_in_the_simulator_stays_below_the_bound() -> None:
    rng = np.random.default_rng(1)
    rows = LATENCIES.p50_ms
    quantiles = Quantiles(LATENCIES.accuracy, (1, 2, 3), rows, rows, rows, rows, 0.2)
    bursty = Workload("bursty", gamma(900, 4, 300, rng), one_target(9.0, 300))

    outcome = simulate(bursty, [Replica(Scheduler(LATENCIES), Host(quantiles, rng), LATENCIES)])

    value = outcome.accuracy[outcome.met].sum() / 300
    assert 0.5 < value <= best_value(bursty, LATENCIES) + 1e-9


def test_targets_that_differ_are_refused_where_order_is_assumed() -> None:
    mixed = Workload("mixed", np.array([0.0, 0.001]), np.array([3.0, 4.0]))

    with pytest.raises(ValueError, match="targets_ms must be one"):
        best_value(mixed, LATENCIES)
