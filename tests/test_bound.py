"""The upper bound: dynamic programming against trying everything, and against policies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulator.bound import best_value, exhaustive_value, fluid_value
from benchmarks.simulator.events import Replica, simulate
from benchmarks.simulator.host import Host, Quantiles
from benchmarks.simulator.workloads import Workload, gamma, mixed_targets, one_target
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


@settings(max_examples=40)
@given(GAPS_MS, st.sampled_from((0.9, 1.3, 3.0, 5.1, 9.0)))
def test_the_best_schedule_is_what_trying_all_finds(gaps_ms: list[float], target_ms: float) -> None:
    drawn = workload(gaps_ms, [target_ms] * len(gaps_ms))

    assert best_value(drawn, LATENCIES) == pytest.approx(exhaustive_value(drawn, LATENCIES))


@settings(max_examples=40)
@given(st.data(), GAPS_MS)
def test_the_fluid_bound_is_above_every_schedule(data: st.DataObject, gaps_ms: list[float]) -> None:
    targets_ms = [data.draw(st.floats(0.5, 12.0)) for _ in gaps_ms]
    drawn = workload(gaps_ms, targets_ms)

    assert fluid_value(drawn, LATENCIES) >= exhaustive_value(drawn, LATENCIES) - 1e-9


def test_rounding_only_raises_the_bound_and_not_by_much() -> None:
    arrivals_s = gamma(900, 4, 200, np.random.default_rng(0))
    bursty = Workload("bursty", arrivals_s, one_target(9.0, 200))

    exact = best_value(bursty, LATENCIES)
    assert exact <= best_value(bursty, LATENCIES, resolution_ms=0.1) <= exact + 0.01
    assert exact <= fluid_value(bursty, LATENCIES)


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
    many = Workload("many", np.zeros(10), mixed_targets(1, 9, 10, np.random.default_rng(0)))

    with pytest.raises(ValueError, match="targets_ms must be one"):
        best_value(mixed, LATENCIES)
    with pytest.raises(ValueError, match="at most 9 requests"):
        exhaustive_value(many, LATENCIES)
