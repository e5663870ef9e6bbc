"""The event loop against what can be worked out by hand, and the laws of any run."""

import math
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from benchmarks.simulator import reach
from benchmarks.simulator.events import Outcome, Replica, simulate
from benchmarks.simulator.figures import figures, over_seeds
from benchmarks.simulator.host import Host, Quantiles, SlowSpell, mean_ms
from benchmarks.simulator.rivals import fixed
from benchmarks.simulator.scenarios import Scenario, policies, run
from benchmarks.simulator.workloads import Workload, one_target, poisson
from server.scheduler import Scheduler
from server.tables import Tables

BATCHES = (1, 2, 4, 8)


def quantiles(spread: float = 1.1, overhead_ms: float = 0.0) -> Quantiles:
    """Points of 2, 4, 8 and 16 ms; each further row costs a third; p99 is spread² times p50."""
    p50 = [[ms * (2 + b) / 3 for b in BATCHES] for ms in (2.0, 4.0, 8.0, 16.0)]
    p90 = [[spread * ms for ms in row] for row in p50]
    p99 = [[spread * ms for ms in row] for row in p90]
    return Quantiles((0.6, 0.7, 0.76, 0.8), BATCHES, p50, p90, p90, p99, overhead_ms)


def replica(host: Quantiles, point: int | None = None, seed: int = 0) -> Replica:
    latencies = host.latencies()
    scheduler = Scheduler(latencies)
    if point is not None:
        scheduler = Scheduler(latencies, policy=fixed(point), sheds=False)
    return Replica(scheduler, Host(host, np.random.default_rng(seed)), latencies)


def workload(arrivals_ms: list[float], target_ms: float) -> Workload:
    return Workload("given", np.array(arrivals_ms) / 1e3, one_target(target_ms, len(arrivals_ms)))


def test_a_steady_host_gives_the_times_that_follow_by_hand() -> None:
    outcome = simulate(
        workload([0, 1, 2, 30], 40), [replica(quantiles(1.0, overhead_ms=0.5), point=2)]
    )

    # 0 runs alone; 1 and 2 wait for it and share a batch; 30 finds the host idle.
    batch_ms = 8 * 4 / 3
    assert outcome.batch_rows == [1, 2, 1]
    assert outcome.latency_ms.tolist() == pytest.approx(
        [8.5, 7 + batch_ms + 0.5, 6 + batch_ms + 0.5, 8.5]
    )
    assert outcome.accuracy.tolist() == [0.76] * 4


def test_who_is_refused_delays_the_others_by_what_that_takes() -> None:
    host = quantiles(1.0)
    full = replace(
        replica(host),
        scheduler=Scheduler(host.latencies(), policy=fixed(2), sheds=False, max_queue=1),
        request_ms=1.0,
    )

    outcome = simulate(workload([0, 1, 2], 40), [full])

    # Half a ms to receive each, and to refuse the last: 1.5 ms of the first batch, which takes 8.
    assert outcome.latency_ms.tolist() == pytest.approx([10.5, 18.0, math.nan], nan_ok=True)


def test_receiving_and_answering_delay_the_engine_by_what_they_take() -> None:
    alone = replica(quantiles(1.0, overhead_ms=0.5), point=2)

    outcome = simulate(workload([0, 1], 40), [replace(alone, request_ms=1.0)])

    # Half a ms to receive the first; 8 to compute, and half more for receiving the second
    # meanwhile; half to answer. The second computes once the first is answered.
    assert outcome.latency_ms.tolist() == pytest.approx([9.5, 17.0])


def test_a_batch_takes_of_the_same_core_before_and_after_it_computes() -> None:
    alone = replica(quantiles(1.0, overhead_ms=0.5), point=2)

    outcome = simulate(workload([0, 1], 60), [replace(alone, request_ms=1.0, batch_ms=2.0)])

    # Half a ms to receive the first, one to hand it on; 8 to compute, and half more for receiving
    # the second; one to take the result, half to answer. The second: one, eight, one, half.
    assert outcome.latency_ms.tolist() == pytest.approx([11.5, 21.0])


def test_a_batch_is_interrupted_at_the_end_of_an_operator() -> None:
    alone = replica(quantiles(1.0))
    alone = replace(alone, scheduler=Scheduler(alone.latencies, preempts=True))
    arrivals = Workload("given", np.array([0, 0.004]), np.array([1000.0, 6.0]))

    outcome = simulate(arrivals, [alone])

    # The first computes for 4 ms of 16 and stops after a twentieth of them, at 4.8. The tight one
    # then takes 4, and the first 16 again.
    assert outcome.batch_rows == [1, 1, 1]
    assert outcome.latency_ms.tolist() == pytest.approx([24.8, 4.8])
    assert outcome.accuracy.tolist() == [0.8, 0.7]


def test_what_was_received_during_an_interrupted_batch_does_not_delay_the_next() -> None:
    alone = replica(quantiles(1.0))
    alone = replace(alone, scheduler=Scheduler(alone.latencies, preempts=True), request_ms=1.0)
    arrivals = Workload("given", np.array([0, 0.004]), np.array([1000.0, 6.0]))

    outcome = simulate(arrivals, [alone])

    # The tight one is received at 4.5 and the first stops at 5.3. The tight one then takes 4, and
    # half a ms to answer; the first 16 again, and as much to answer.
    assert outcome.latency_ms.tolist() == pytest.approx([26.3, 5.8])


def test_the_next_batch_is_planned_once_the_last_is_answered() -> None:
    alone = replica(quantiles(1.0, overhead_ms=0.5))

    outcome = simulate(workload([0, 0], 32.6), [replace(alone, request_ms=1.0)])

    # Received after 0.5 and 1 ms; the first computes until 17, at 16 ms, and is answered at 17.5.
    # Then 15.6 are left to the second: 8 of computing, though at 17 it had time for 16.
    assert outcome.latency_ms.tolist() == pytest.approx([17.5, 26.0])
    assert outcome.accuracy.tolist() == [0.8, 0.76]


def test_who_is_not_served_has_no_latency_and_does_not_count_as_met() -> None:
    outcome = simulate(workload([0, 0.5, 1], 2.5), [replica(quantiles(1.0))])

    assert outcome.met.tolist() == [True, False, False]
    assert math.isnan(outcome.latency_ms[1])


def test_decisions_are_timed_by_the_clock_that_is_given() -> None:
    ticks = (s for i in count() for s in (float(i), i + 2e-6))
    crowd = workload([0, 0.5, 1], 40)

    timed = simulate(crowd, [replica(quantiles(1.0))], clock=lambda: next(ticks))
    untimed = simulate(crowd, [replica(quantiles(1.0))])

    assert timed.decision_us == pytest.approx([2.0] * len(timed.batch_rows))
    assert untimed.decision_us == []
    assert timed.latency_ms.tolist() == untimed.latency_ms.tolist()


def test_draws_follow_the_quantiles_that_they_are_made_from() -> None:
    host = Host(quantiles(1.2), np.random.default_rng(0))
    drawn = np.array([host.draw_ms(1, 4, 0.0) for _ in range(40_000)])

    assert np.quantile(drawn, 0.5) == pytest.approx(8.0, rel=0.01)
    assert np.quantile(drawn, 0.9) == pytest.approx(9.6, rel=0.01)
    assert np.quantile(drawn, 0.99) == pytest.approx(11.52, rel=0.02)
    assert drawn.min() > 0


def test_the_mean_of_what_a_host_draws_is_known_beforehand() -> None:
    spread = quantiles(1.2)
    host = Host(spread, np.random.default_rng(0))

    drawn_ms = [host.draw_ms(1, 4, 0.0) for _ in range(40_000)]

    at = [table[1][2] for table in (spread.p50_ms, spread.p90_ms, spread.p95_ms, spread.p99_ms)]
    assert np.mean(drawn_ms) == pytest.approx(mean_ms(*at), rel=0.003)


def test_a_slow_spell_is_slow_only_while_it_lasts() -> None:
    host = Host(quantiles(1.0), np.random.default_rng(0), SlowSpell(1.0, 2.0, 1.5))

    assert [host.draw_ms(0, 1, now) for now in (0.5, 1.0, 1.9, 2.0)] == [2.0, 3.0, 3.0, 2.0]


def test_two_replicas_carry_what_one_cannot() -> None:
    rng = np.random.default_rng(0)
    crowded = Workload("crowded", poisson(1800.0, 2000, rng), one_target(20.0, 2000))

    one = simulate(crowded, [replica(quantiles())]).met.mean()
    two = simulate(crowded, [replica(quantiles(), seed=i) for i in range(2)]).met.mean()

    assert one < 0.9
    assert two > 0.99


def outcome_of(name: str, load: float, seed: int) -> Outcome:
    host = quantiles()
    latencies = host.latencies()
    tables = Tables(latencies)
    scenario = Scenario("gamma4", load, mixed=True)
    policy = policies(tables, scenario.rate(tables))[name]
    return run(host, scenario.workload(latencies, 400, seed), policy, seed)


@pytest.mark.parametrize("name", list(policies(Tables(quantiles().latencies()), 1.0)))
def test_every_policy_serves_at_an_accuracy_that_exists(name: str) -> None:
    outcome = outcome_of(name, 2.0, 0)
    served = np.isfinite(outcome.latency_ms)

    assert set(outcome.accuracy[served]) <= {0.6, 0.7, 0.76, 0.8}
    assert np.isnan(outcome.accuracy[~served]).all()
    assert sum(outcome.batch_rows) >= served.sum()
    assert (outcome.latency_ms[served] > 0).all()


def test_the_same_seed_gives_the_same_outcome() -> None:
    first, again = (outcome_of("ours", 1.5, 7) for _ in range(2))

    np.testing.assert_array_equal(first.latency_ms, again.latency_ms)


def test_figures_count_each_request_once() -> None:
    outcome = Outcome(
        workload([0, 1, 2, 3], 10.0),
        latency_ms=np.array([5.0, 9.0, 12.0, math.nan]),
        accuracy=np.array([0.6, 0.8, 0.8, math.nan]),
        batch_rows=[1, 2],
    )
    found = figures(outcome, quantiles().latencies())

    assert (found["met"], found["late"], found["shed"]) == (0.5, 0.25, 0.25)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["value"] == pytest.approx(0.35)
    assert found["p50_ms"] == 9.0


def test_intervals_over_seeds_are_students() -> None:
    found = over_seeds([{"met": 1.0, "p": 1.0}, {"met": 2.0, "p": math.nan}])

    assert found["met"] == pytest.approx((1.5, 12.71 * 0.5), rel=1e-3)
    assert found["p"] is None
    assert over_seeds([{"met": 0.5}]) == {"met": (0.5, 0.0)}


def test_ours_is_near_the_best_schedule_and_never_above() -> None:
    gaps = [reach.near_bound(quantiles(), 4.0, 1.5, seed)["gap"] for seed in range(4)]

    assert min(gaps) >= 0
    assert np.mean(gaps) < 0.02


def test_a_slowed_host_is_followed() -> None:
    found = reach.slowed(reach.Served(quantiles()), Scenario("poisson", 0.8), 3000, seed=0)

    assert found["during"] > 0.98
    assert found["after"] > 0.98


def test_far_too_much_load_does_not_lower_the_goodput() -> None:
    found = reach.overloaded(reach.Served(quantiles()), 1.0, 4000, seed=0)

    assert found["goodput"] >= 0.95
    assert found["on_time"] > 0.99
