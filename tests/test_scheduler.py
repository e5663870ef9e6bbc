import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.latencies import Latencies
from server.outlook import View
from server.preemption import MOST_PREEMPTED
from server.requests import Admitted, Batch, Refusal, Request
from server.scheduler import Scheduler
from server.selector import Choice, Policy, choose, reserve

ACCURACY = (0.6, 0.7, 0.75, 0.78)


def make_latencies(overhead_ms: float = 0.0, max_batch: int = 4) -> Latencies:
    """Points of 1, 2, 4 and 8 ms at batch 1; each further row costs half of that."""
    p50 = tuple(tuple(ms * (1 + b) / 2 for b in range(1, max_batch + 1)) for ms in (1, 2, 4, 8))
    tail = tuple(tuple(1.25 * ms for ms in row) for row in p50)
    return Latencies(ACCURACY, p50, tail, overhead_ms)


def make_request(
    name: str = "a", target_ms: float | None = 20.0, at: float = 0.0, **wishes: object
) -> Request:
    deadline_s = None if target_ms is None else at + target_ms / 1e3
    return Request(name, at, deadline_s, **wishes)  # type: ignore[arg-type]


def run_now(scheduler: Scheduler, now: float = 0.0) -> Batch:
    batch = scheduler.plan(now).batch
    assert batch is not None
    return batch


def test_idle_runs_the_most_accurate_point_in_time() -> None:
    for target_ms, point in ((1.3, 0), (2.6, 1), (5.1, 2), (9.9, 2), (10.1, 3), (500, 3)):
        scheduler = Scheduler(make_latencies())
        scheduler.submit(make_request(target_ms=target_ms), 0.0)

        assert run_now(scheduler).point == point


def test_idle_runs_the_most_accurate_point_whatever_came_before() -> None:
    latencies = make_latencies(max_batch=16)
    scheduler, now = Scheduler(latencies), 0.0
    for burst in range(30):  # of eight at once, each gap just long enough to serve them
        now = max(now, 0.02 * burst)
        for i in range(8):
            scheduler.submit(make_request(f"{burst}.{i}", 14.0, now), now)
        while (batch := scheduler.plan(now).batch) is not None:
            took_ms = latencies.p50_ms[batch.point][batch.rows - 1]
            now += took_ms / 1e3
            scheduler.done(batch.id, took_ms, now)

    scheduler.submit(make_request("alone", 14.0, now + 0.01), now + 0.01)

    assert run_now(scheduler, now + 0.01).point == 3


def test_explain_holds_a_degraded_request_to_its_own_target() -> None:
    scheduler = Scheduler(make_latencies())

    explanation = scheduler.explain(make_request(target_ms=0.5), 0.0)

    assert explanation.point == 0
    assert explanation.budget_ms == pytest.approx(0.5)
    assert [verdict.why for verdict in explanation.points] == ["too slow"] * 4


def test_explain_says_that_a_less_accurate_point_needs_a_target() -> None:
    explanation = Scheduler(make_latencies()).explain(make_request(target_ms=None), 0.0)

    assert [verdict.why for verdict in explanation.points] == [
        *("less accurate",) * 3,
        "feasible",
    ]


def test_a_request_that_is_refused_for_what_it_is_leaves_no_trace_in_the_forecast() -> None:
    scheduler = Scheduler(make_latencies())
    for i in range(100):
        with pytest.raises(ValueError, match="samples"):
            scheduler.submit(make_request(f"large {i}", 4.0, rows=1000), 0.0)

    scheduler.submit(make_request("floor", min_accuracy=0.99), 0.0)

    assert scheduler._forecast.envelopes == []


def test_overhead_counts_against_the_target() -> None:
    scheduler = Scheduler(make_latencies(overhead_ms=1.0))
    scheduler.submit(make_request(target_ms=10.5), 0.0)

    assert run_now(scheduler).point == 2


def test_without_a_target_the_most_accurate_point_runs() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request(target_ms=None), 0.0)

    assert run_now(scheduler).point == 3


def test_without_a_target_a_dearer_point_that_is_less_accurate_does_not_run() -> None:
    ms = ((1.0, 1.0), (2.0, 2.0), (4.0, 4.0))
    scheduler = Scheduler(Latencies((0.6, 0.8, 0.7), ms, ms))
    for i in range(50):  # so many come that time is dear, and batches are to be large
        scheduler.submit(make_request(f"gone {i}", None), 0.0)
        scheduler.cancel(f"gone {i}", 0.0)
    scheduler.submit(make_request("named", None, point=2), 0.0)
    scheduler.submit(make_request("any", None), 0.0)

    named = run_now(scheduler)
    scheduler.done(named.id, 4.0, 0.004)

    assert [request.id for request in named.requests] == ["named"]
    assert run_now(scheduler, 0.004).point == 1


def test_a_named_point_is_used() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request(point=1), 0.0)

    assert run_now(scheduler).point == 1


def test_infeasible_and_reject_says_what_is_feasible() -> None:
    scheduler = Scheduler(make_latencies(overhead_ms=0.5))

    answer = scheduler.submit(make_request(target_ms=1.0, on_miss="reject"), 0.0)

    assert isinstance(answer, Refusal)
    assert answer.reason == "infeasible"
    assert answer.detail.endswith(f"the fastest needs {answer.min_feasible_ms:.3f} ms")
    assert answer.min_feasible_ms == pytest.approx(1.75)


def test_what_is_feasible_counts_the_time_that_is_gone() -> None:
    scheduler = Scheduler(make_latencies(overhead_ms=0.5))

    late = scheduler.submit(make_request(target_ms=2.0, on_miss="reject"), 0.001)
    in_time = scheduler.submit(make_request("b", target_ms=2.76, on_miss="reject"), 0.001)

    assert isinstance(late, Refusal)
    assert late.min_feasible_ms == pytest.approx(2.75)
    assert isinstance(in_time, Admitted)


def test_what_is_feasible_counts_how_long_a_batch_usually_keeps_its_slot() -> None:
    scheduler, now = Scheduler(make_latencies()), 0.0
    for i in range(60):  # the engine takes what was profiled, and is waited for as long again
        scheduler.submit(make_request(f"w{i}", target_ms=None, at=now), now)
        batch = run_now(scheduler, now)
        now += 0.016
        scheduler.done(batch.id, 8.0, now)

    refused = scheduler.submit(make_request("a", 1.5, now, on_miss="reject"), now)
    assert isinstance(refused, Refusal)
    assert refused.reason == "infeasible"
    assert refused.min_feasible_ms is not None
    assert refused.min_feasible_ms == pytest.approx(2.0, abs=0.01)
    explanation = scheduler.explain(make_request("b", 1.5, now), now)
    taken = scheduler.submit(make_request("b", 1.5, now), now)

    assert isinstance(taken, Admitted)
    assert not any(verdict.feasible for verdict in explanation.points)
    assert explanation.point == run_now(scheduler, now).point == 0
    scheduler.done(61, 1.0, now)
    in_time = make_request("c", refused.min_feasible_ms + 0.001, now, on_miss="reject")
    assert isinstance(scheduler.submit(in_time, now), Admitted)


def test_infeasible_and_degrade_runs_at_the_fastest_point() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request(target_ms=1.0), 0.0)

    assert run_now(scheduler, 0.0).point == 0


def test_a_degraded_request_keeps_its_floor() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request(target_ms=1.0, min_accuracy=0.65), 0.0)

    assert run_now(scheduler).point == 1


def test_a_floor_above_every_point_is_refused() -> None:
    answer = Scheduler(make_latencies()).submit(make_request(min_accuracy=0.9), 0.0)

    assert isinstance(answer, Refusal)
    assert answer.reason == "floor"
    assert "0.78" in answer.detail


def test_a_named_point_below_the_floor_is_refused() -> None:
    answer = Scheduler(make_latencies()).submit(make_request(point=0, min_accuracy=0.7), 0.0)

    assert isinstance(answer, Refusal)
    assert answer.reason == "floor"


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler = Scheduler(make_latencies(), max_queue=2)
    for name in "ab":
        scheduler.submit(make_request(name, target_ms=None), 0.0)

    answer = scheduler.submit(make_request("c", target_ms=None), 0.0)

    assert isinstance(answer, Refusal)
    assert answer.reason == "full"
    assert answer.retry_after_s is not None
    assert answer.retry_after_s > 0


def test_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    scheduler = Scheduler(make_latencies(), max_queue=2)
    scheduler.submit(make_request("a", target_ms=None), 0.0)
    scheduler.submit(make_request("b", target_ms=None, priority=3), 0.0)

    answer = scheduler.submit(make_request("c", target_ms=None, priority=1), 0.0)

    assert isinstance(answer, Admitted)
    assert [request.id for request in answer.displaced] == ["b"]
    assert scheduler.waiting == 2


def test_those_of_lower_priority_give_way_where_one_would_be_late() -> None:
    scheduler = Scheduler(make_latencies())
    for i in range(100):
        scheduler.submit(make_request(str(i), 20.0, priority=3), 0.0)
    taken = scheduler.waiting

    equal = scheduler.submit(make_request("equal", 10.0, priority=3), 0.0)
    above = scheduler.submit(make_request("above", 10.0, priority=1), 0.0)

    assert isinstance(equal, Refusal)
    assert isinstance(above, Admitted)
    assert scheduler.waiting == taken + 1 - len(above.displaced)
    assert 28 <= scheduler.waiting <= 32  # as many as can be in time

    again = scheduler.submit(make_request("again", 10.0, priority=1), 0.0)

    assert isinstance(again, Admitted)
    assert len(again.displaced) <= 4  # a batch


def test_an_equal_priority_displaces_nobody() -> None:
    scheduler = Scheduler(make_latencies(), max_queue=1)
    scheduler.submit(make_request("a", target_ms=None), 0.0)

    assert isinstance(scheduler.submit(make_request("b", target_ms=None), 0.0), Refusal)


def test_one_with_a_target_takes_the_place_of_the_last_without() -> None:
    scheduler = Scheduler(make_latencies(), max_queue=2)
    for name in ("first", "last"):
        assert scheduler.submit(make_request(name, target_ms=None), 0.0) == Admitted()

    untimed = scheduler.submit(make_request("more", target_ms=None), 0.0)
    explanation = scheduler.explain(make_request("timed"), 0.0)
    timed = scheduler.submit(make_request("timed"), 0.0)

    assert isinstance(untimed, Refusal)
    assert explanation.refusal is None
    assert isinstance(timed, Admitted)
    assert [request.id for request in timed.displaced] == ["last"]
    assert scheduler.waiting == 2


def test_who_would_be_taken_for_another_is_not_explained_as_refused() -> None:
    scheduler = Scheduler(make_latencies(), max_queue=1)
    scheduler.submit(make_request("low", priority=5), 0.0)

    explanation = scheduler.explain(make_request("high", priority=1), 0.0)

    assert explanation.refusal is None
    assert scheduler.waiting == 1
    assert scheduler.submit(make_request("high", priority=1), 0.0) != Admitted()


def test_one_that_can_only_be_late_is_waited_for_but_not_forever() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("runs"), 0.0)
    run_now(scheduler)
    scheduler.submit(make_request("late", target_ms=1e-6), 0.0)

    assert scheduler.plan(0.09).expired == ()
    assert [request.id for request in scheduler.plan(0.2).expired] == ["late"]


def test_who_is_late_is_told_whoever_waits_before() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("patient", target_ms=None), 0.0)
    scheduler.submit(make_request("runs", at=9.9), 9.9)
    assert [request.id for request in run_now(scheduler, 9.9).requests] == ["runs"]
    for name, target_ms in (("soon", 200.0), ("later", 400.0)):
        scheduler.submit(make_request(name, target_ms=target_ms, at=9.9), 9.9)

    wakes_s = [scheduler.plan(9.91).wake_s]
    plan = scheduler.plan(10.15)

    assert [request.id for request in plan.expired] == ["soon"]
    wakes_s.append(plan.wake_s)
    assert wakes_s == [pytest.approx(10.1 - 1e-3), pytest.approx(10.3 - 1e-3)]
    assert scheduler.waiting == 2


def test_what_would_be_late_after_half_of_its_wait_is_refused_at_once() -> None:
    scheduler = Scheduler(make_latencies())
    for i in range(100):
        scheduler.submit(make_request(str(i), target_ms=20), 0.0)

    assert 40 <= scheduler.waiting <= 64  # four rows take 2.5 ms at the cheapest point


def test_what_makes_others_late_is_refused_at_once() -> None:
    scheduler = Scheduler(make_latencies())
    for i in range(27):
        assert isinstance(scheduler.submit(make_request(str(i), target_ms=20), 0.0), Admitted)

    answers = [scheduler.submit(make_request(f"tight {i}", 10.0), 0.0) for i in range(4)]

    assert isinstance(answers[0], Admitted)
    assert isinstance(answers[-1], Refusal)


def hoping() -> tuple[Scheduler, Batch]:
    """Return a scheduler with one request that would be late behind others, and what runs."""
    scheduler = Scheduler(make_latencies())
    for i in range(31):
        scheduler.submit(make_request(str(i), target_ms=20), 0.0)
    batch = run_now(scheduler)
    explanation = scheduler.explain(make_request("hopes"), 0.0)

    assert isinstance(scheduler.submit(make_request("hopes"), 0.0), Admitted)
    assert explanation.refusal is None
    assert "only if some of those before it are given up" in explanation.why
    return scheduler, batch


def test_one_that_may_be_late_is_served_where_those_before_it_leave() -> None:
    scheduler, running = hoping()
    for i in range(4, 20):
        scheduler.cancel(str(i), 0.0)

    scheduler.done(running.id, 2.5, 0.0025)
    now, served = 0.0025, []
    while scheduler.waiting:
        batch = run_now(scheduler, now)
        now += 0.0025
        served += [request.id for request in scheduler.done(batch.id, 2.5, now)]

    assert served[-1] == "hopes"
    assert now < 0.02


def test_else_it_is_given_up_before_it_is_late() -> None:
    scheduler, running = hoping()

    plan = scheduler.plan(0.0195)

    assert "hopes" in [request.id for request in plan.expired]
    assert scheduler.done(running.id, 19.5, 0.0195)


def test_who_is_refused_for_what_runs_is_told_to_come_back_when_that_ends() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("runs", None), 0.0)
    run_now(scheduler)

    answer = scheduler.submit(make_request("late", 4.0, 0.001), 0.001)

    assert isinstance(answer, Refusal)
    assert answer.retry_after_s == pytest.approx(0.007)
    assert answer.min_feasible_ms is None  # that hangs on who waits by then


def test_draining_serves_what_waits_and_refuses_the_rest() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("a"), 0.0)
    scheduler.drain()

    answer = scheduler.submit(make_request("b"), 0.0)

    assert isinstance(answer, Refusal)
    assert answer.reason == "draining"
    assert [r.id for r in run_now(scheduler).requests] == ["a"]


def test_a_doomed_request_is_never_run() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("a", target_ms=20), 0.0)

    plan = scheduler.plan(0.0195)

    assert plan.batch is None
    assert [request.id for request in plan.expired] == ["a"]


def test_the_plan_wakes_when_the_head_is_doomed() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("a", target_ms=None), 0.0)
    run_now(scheduler)
    scheduler.submit(make_request("b", target_ms=20), 0.0)

    wake_s = scheduler.plan(0.0).wake_s

    assert wake_s == pytest.approx(0.019)
    assert not scheduler.plan(0.0189).expired
    assert scheduler.plan(0.0191).expired


def test_only_free_slots_are_used() -> None:
    scheduler = Scheduler(make_latencies(), slots=2)
    for i in range(9):
        scheduler.submit(make_request(str(i), target_ms=None), 0.0)

    assert run_now(scheduler).rows == 4
    assert run_now(scheduler).rows == 4
    assert scheduler.plan(0.0).batch is None


def test_rows_fill_a_batch() -> None:
    scheduler = Scheduler(make_latencies())
    for i in range(3):
        scheduler.submit(make_request(str(i), target_ms=None, rows=2), 0.0)

    assert run_now(scheduler).rows == 4


def test_a_cancelled_request_leaves_the_queue() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("a"), 0.0)

    assert scheduler.cancel("a", 0.0)
    assert not scheduler.cancel("a", 0.0)
    assert scheduler.is_idle


def test_a_cancelled_request_that_runs_is_not_answered() -> None:
    scheduler = Scheduler(make_latencies())
    for name in "ab":
        scheduler.submit(make_request(name, target_ms=None), 0.0)
    batch = run_now(scheduler)
    scheduler.cancel("a", 0.001)

    answered = scheduler.done(batch.id, 5.0, 0.005)

    assert [request.id for request in answered] == ["b"]
    assert scheduler.is_idle


def test_a_failed_batch_frees_its_slot() -> None:
    scheduler = Scheduler(make_latencies())
    for i in range(5):
        scheduler.submit(make_request(str(i), target_ms=None), 0.0)
    batch = run_now(scheduler)

    assert len(scheduler.failed(batch.id, 0.1)) == 4
    assert run_now(scheduler, 0.1).rows == 1
    with pytest.raises(KeyError):
        scheduler.done(batch.id, 1.0, 0.1)


def test_a_slow_host_makes_cheaper_choices_and_recovers() -> None:
    scheduler = Scheduler(make_latencies())
    for i in range(30):
        scheduler.submit(make_request(f"w{i}", target_ms=None, at=float(i)), float(i))
        batch = run_now(scheduler, float(i))
        scheduler.done(batch.id, 16.0, float(i))
    scheduler.submit(make_request("a", target_ms=12, at=29.0), 29.0)

    assert scheduler.slowdown(29.0) == pytest.approx(2.0, abs=0.2)
    assert run_now(scheduler, 29.0).point == 2
    assert scheduler.slowdown(300.0) == pytest.approx(1.0, abs=0.01)


def test_a_clock_that_jumps_back_is_read_as_standing_still() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("a", at=100.0), 100.0)
    batch = run_now(scheduler, 50.0)

    assert batch.started_s == 100.0
    assert scheduler.done(batch.id, math.nan, math.nan)
    assert scheduler.slowdown(0.0) == 1.0


@pytest.mark.parametrize(
    "wishes",
    [
        {"target_ms": 0.0},
        {"target_ms": -1.0},
        {"target_ms": math.nan},
        {"target_ms": 1e9},
        {"at": math.inf},
        {"min_accuracy": 1.5},
        {"min_accuracy": math.nan},
        {"on_miss": "ignore"},
        {"priority": -1},
        {"point": -1},
        {"rows": 0},
    ],
)
def test_a_request_out_of_range_is_an_error(wishes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        make_request(**wishes)  # type: ignore[arg-type]


@pytest.mark.parametrize("wishes", [{"point": 4}, {"rows": 5}])
def test_what_the_model_cannot_run_is_an_error(wishes: dict[str, object]) -> None:
    scheduler = Scheduler(make_latencies())

    with pytest.raises(ValueError, match=r"must be in|samples"):
        scheduler.submit(make_request(**wishes), 0.0)  # type: ignore[arg-type]
    assert scheduler.is_idle


def test_an_id_that_is_here_already_is_an_error() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("a"), 0.0)

    with pytest.raises(ValueError, match="'a' is here already"):
        scheduler.submit(make_request("a"), 0.0)


def test_explain_names_the_point_that_then_runs() -> None:
    for target_ms in (1.3, 3.0, 6.0, 12.0):
        scheduler = Scheduler(make_latencies())
        request = make_request(target_ms=target_ms, min_accuracy=0.5)

        explanation = scheduler.explain(request, 0.0)
        scheduler.submit(request, 0.0)

        assert explanation.point == run_now(scheduler).point
        assert [v.feasible for v in explanation.points] == [
            1.25 * ms <= target_ms for ms in (1, 2, 4, 8)
        ]


def test_explain_names_the_point_that_runs_for_the_sake_of_others() -> None:
    scheduler = Scheduler(make_latencies())
    for i in range(8):  # it expects as many at once from now on
        scheduler.submit(make_request(f"gone {i}", 5.9), 0.0)
        scheduler.cancel(f"gone {i}", 0.0)
    for i in range(3):
        scheduler.submit(make_request(f"{i}", 6.0, 1.0), 1.0)
    request = make_request("first", 5.9, 1.0)

    explanation = scheduler.explain(request, 1.0)
    scheduler.submit(request, 1.0)
    batch = run_now(scheduler, 1.0)

    assert request in batch.requests
    assert explanation.point == batch.point < 2
    assert "others" in explanation.why
    assert scheduler.waiting == 4 - batch.rows


def test_explain_expects_what_the_request_would_be_the_first_of() -> None:
    scheduler = Scheduler(make_latencies(max_batch=16), policy=reserve)
    for second in (0.0, 1.0):  # twelve at once, twice; then nothing for long
        for i in range(12):
            scheduler.submit(make_request(f"{second}.{i}", 14.0, second), second)
            scheduler.cancel(f"{second}.{i}", second)
    request = make_request("first", 14.0, 60.0)

    explanation = scheduler.explain(request, 60.0)
    scheduler.submit(request, 60.0)

    assert explanation.point == run_now(scheduler, 60.0).point == 2
    assert "others" in explanation.why


def test_explain_takes_its_place_behind_those_of_the_same_deadline() -> None:
    scheduler = Scheduler(make_latencies())
    scheduler.submit(make_request("runs", None), 0.0)
    run_now(scheduler)
    scheduler.submit(make_request("before", rows=4), 0.0)

    explanation = scheduler.explain(make_request("behind"), 0.0)

    assert explanation.wait_ms == pytest.approx(8 + 2.5)


def test_explain_counts_neither_who_gives_way_nor_who_will_be_too_late() -> None:
    scheduler = Scheduler(make_latencies(), max_queue=2)
    scheduler.submit(make_request("runs", None), 0.0)
    running = run_now(scheduler)
    scheduler.submit(make_request("too late", 9.5), 0.0)
    scheduler.submit(make_request("gives way", 13.0, priority=3), 0.0)
    request = make_request("first", 12.0, 0.0086, priority=1)

    explanation = scheduler.explain(request, 0.0086)
    scheduler.submit(request, 0.0086)
    scheduler.done(running.id, 8.6, 0.0086)
    batch = run_now(scheduler, 0.0086)

    assert batch.requests == (request,)
    assert explanation.point == batch.point == 3
    assert explanation.waiting == 2


def preempting(first_target_ms: float | None = None) -> tuple[Scheduler, Batch]:
    """Return a scheduler whose idle host has begun a batch of 8 ms."""
    scheduler = Scheduler(make_latencies(), preempts=True)
    scheduler.submit(make_request("runs", first_target_ms), 0.0)
    return scheduler, run_now(scheduler)


def test_a_batch_is_interrupted_for_one_that_would_be_late_behind_it() -> None:
    scheduler, running = preempting()
    tight = make_request("tight", 6.0, 0.002)

    assert isinstance(scheduler.submit(tight, 0.002), Admitted)
    assert scheduler.plan(0.002).preempt == running.id
    assert scheduler.plan(0.002).preempt is None  # it was said
    assert scheduler.preempted(running.id, 0.003) == running.requests

    assert scheduler.waiting == 2
    batch = run_now(scheduler, 0.003)
    assert batch.requests[0] == tight
    assert scheduler.done(batch.id, 2.0, 0.005) == batch.requests


def test_a_batch_that_is_done_before_it_stops_is_answered() -> None:
    scheduler, running = preempting()
    scheduler.submit(make_request("tight", 6.0, 0.002), 0.002)
    assert scheduler.plan(0.002).preempt == running.id

    assert scheduler.done(running.id, 2.0, 0.002) == running.requests
    assert scheduler.waiting == 1


@pytest.mark.parametrize(
    ("target_ms", "at"),
    [
        (20.0, 0.002),  # in time behind it
        (5.0, 0.0076),  # it is as good as done
        (None, 0.002),  # never late
    ],
)
def test_a_batch_runs_on_where_nobody_is_late_behind_it(target_ms: float | None, at: float) -> None:
    scheduler, _ = preempting()

    scheduler.submit(make_request("behind", target_ms, at), at)

    assert scheduler.plan(at).preempt is None


def test_a_batch_runs_on_where_its_own_requests_would_be_late() -> None:
    scheduler, _ = preempting(10.1)

    answer = scheduler.submit(make_request("tight", 3.0, 0.0075), 0.0075)

    assert isinstance(answer, Admitted)  # the rest is 0.5 ms
    scheduler, _ = preempting(10.1)
    scheduler.submit(make_request("larger", 5.0, 0.005, rows=4), 0.005)
    assert scheduler.plan(0.005).preempt is None


def test_a_batch_is_interrupted_for_a_burst_that_has_begun() -> None:
    def begun(expected: int) -> Scheduler:
        scheduler = Scheduler(make_latencies(), preempts=True)
        for second in (0.0, 1.0):
            for i in range(expected):
                scheduler.submit(make_request(f"{second}.{i}", 12.0, second), second)
                scheduler.cancel(f"{second}.{i}", second)
        scheduler.submit(make_request("first", 12.0, 2.0), 2.0)
        assert run_now(scheduler, 2.0).point == 3  # idle
        scheduler.submit(make_request("second", 12.0, 2.0001), 2.0001)
        return scheduler

    assert begun(expected=12).plan(2.0001).preempt is not None
    assert begun(expected=2).plan(2.0001).preempt is None


def test_nobody_is_interrupted_for_ever() -> None:
    scheduler, batch = preempting()
    now = 0.0
    for i in range(MOST_PREEMPTED + 1):
        now += 0.001
        scheduler.submit(make_request(f"tight {i}", 6.0, now), now)
        found = scheduler.plan(now).preempt
        if i == MOST_PREEMPTED:
            assert found is None
            break
        assert found == batch.id
        scheduler.preempted(batch.id, now)
        tight = run_now(scheduler, now)
        while "runs" not in {request.id for request in tight.requests}:
            took_ms = make_latencies().p50_ms[tight.point][tight.rows - 1]
            now += took_ms / 1e3
            scheduler.done(tight.id, took_ms, now)
            tight = run_now(scheduler, now)
        batch = tight


def test_those_of_a_batch_that_is_being_interrupted_wait_already_for_who_comes() -> None:
    scheduler = Scheduler(
        Latencies((0.7, 0.8), ((10.0,), (100.0,)), ((10.0,), (100.0,))), preempts=True
    )
    scheduler.submit(Request("bulk", 0.0, 0.105), 0.0)
    batch = scheduler.plan(0.0).batch
    scheduler.submit(Request("tight", 0.01, 0.045), 0.01)
    assert batch is not None
    assert scheduler.plan(0.01).preempt == batch.id

    explained = scheduler.explain(Request("later", 0.011, 0.411), 0.011)
    taken = [scheduler.submit(Request(f"b{i}", 0.013, 0.1049), 0.013) for i in range(10)]

    assert explained.wait_ms == pytest.approx(9 + 10 + 10), "it stops, then tight, then bulk again"
    assert sum(isinstance(one, Admitted) for one in taken) == 6
    now = 0.02
    scheduler.preempted(batch.id, now)
    while scheduler.waiting:
        plan = scheduler.plan(now)
        assert not plan.expired
        assert plan.batch is not None
        now += 0.01
        scheduler.done(plan.batch.id, 10.0, now)


def test_who_hung_up_does_not_wait_again() -> None:
    scheduler, running = preempting()
    scheduler.submit(make_request("tight", 6.0, 0.002), 0.002)
    scheduler.plan(0.002)

    assert scheduler.cancel("runs", 0.002)
    assert scheduler.preempted(running.id, 0.003) == ()
    assert scheduler.waiting == 1
    assert not scheduler.cancel("runs", 0.003)


def test_explain_counts_on_the_interruption_and_says_so() -> None:
    scheduler, running = preempting()
    request = make_request("tight", 6.0, 0.002)

    assert not scheduler.explain(make_request("loose", None, 0.002), 0.002).interrupts

    explanation = scheduler.explain(request, 0.002)
    scheduler.submit(request, 0.002)
    assert scheduler.plan(0.002).preempt == running.id
    stopped_s = 0.002 + explanation.wait_ms / 1e3
    scheduler.preempted(running.id, stopped_s)

    assert explanation.interrupts
    assert explanation.wait_ms < 1.0
    assert explanation.refusal is None
    assert explanation.point == run_now(scheduler, stopped_s).point


def test_explain_says_why_not() -> None:
    scheduler = Scheduler(make_latencies())

    explanation = scheduler.explain(make_request(target_ms=1, on_miss="reject"), 0.0)

    assert explanation.point is None
    assert explanation.refusal is not None
    assert explanation.refusal.reason == "infeasible"
    assert scheduler.is_idle


@dataclass
class Ledger:
    """What became of each request."""

    submitted: dict[str, Request] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)

    def end(self, requests: tuple[Request, ...], how: str) -> None:
        for request in requests:
            assert request.id not in self.ended, f"{request.id}: {self.ended[request.id]}, {how}"
            self.ended[request.id] = how


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["submit", "submit", "submit", "plan", "plan", "done", "failed", "cancel", "preempted"]
        ),
        st.integers(0, 10**6),
        st.floats(-0.002, 0.02),
    ),
    max_size=120,
)


@settings(max_examples=150)
@given(
    STEPS,
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([choose, reserve]),
    st.booleans(),
)
def test_no_request_is_lost_or_answered_twice_or_wronged(
    steps: list[tuple[str, int, float]],
    slots: int,
    max_queue: int,
    policy: Policy,
    preempts: bool,
) -> None:
    latencies = make_latencies()
    scheduler = Scheduler(
        latencies, policy=policy, slots=slots, max_queue=max_queue, preempts=preempts
    )
    ledger, running, now = Ledger(), {}, 0.0
    to_stop = set[int]()
    for step, (act, pick, elapsed_s) in enumerate(steps):
        now += elapsed_s
        if act == "submit":
            request = make_request(
                str(step),
                (None, 0.5, 3.0, 10.0, 40.0)[pick % 5],
                now,
                min_accuracy=(None, 0.0, 0.7, 0.78)[pick // 5 % 4],
                on_miss=("degrade", "reject")[pick // 20 % 2],
                priority=pick // 40 % 4,
                rows=1 + pick // 160 % 3,
                point=(None, None, None, 2)[pick // 480 % 4],
            )
            answer = scheduler.submit(request, now)
            ledger.submitted[request.id] = request
            if isinstance(answer, Refusal):
                ledger.end((request,), "refused")
            else:
                ledger.end(answer.displaced, "displaced")
        elif act == "plan":
            plan = scheduler.plan(now)
            ledger.end(plan.expired, "expired")
            if plan.batch is not None:
                check_batch(plan.batch, latencies)
                running[plan.batch.id] = plan.batch
            if plan.preempt is not None:
                assert preempts
                assert len(running) == slots
                assert plan.preempt in running.keys() - to_stop
                to_stop.add(plan.preempt)
        elif act == "preempted" and (stopping := sorted(to_stop & running.keys())):
            batch = running.pop(stopping[pick % len(stopping)])
            wait_again = scheduler.preempted(batch.id, now)
            assert not {request.id for request in wait_again} & ledger.ended.keys()
        elif act in ("done", "failed") and running:
            batch = running.pop(sorted(running)[pick % len(running)])
            if act == "done":
                ledger.end(scheduler.done(batch.id, batch.predicted_ms * 1.1, now), "done")
            else:
                ledger.end(scheduler.failed(batch.id, now), "failed")
        elif act == "cancel" and ledger.submitted:
            name = sorted(ledger.submitted)[pick % len(ledger.submitted)]
            if scheduler.cancel(name, now):
                ledger.end((ledger.submitted[name],), "cancelled")
    while not scheduler.is_idle:
        now += 0.001
        for batch_id in list(running):
            ledger.end(scheduler.done(batch_id, 1.0, now), "done")
            del running[batch_id]
        plan = scheduler.plan(now)
        ledger.end(plan.expired, "expired")
        if plan.batch is not None:
            check_batch(plan.batch, latencies)
            running[plan.batch.id] = plan.batch

    assert ledger.ended.keys() == ledger.submitted.keys()


def check_batch(batch: Batch, latencies: Latencies) -> None:
    assert 1 <= batch.rows <= latencies.max_batch
    assert batch.rows == sum(request.rows for request in batch.requests)
    for request in batch.requests:
        assert latencies.accuracy[batch.point] >= (request.min_accuracy or 0.0)
        assert request.point in (None, batch.point)
        is_feasible = request.deadline_s is None or request.deadline_s - request.arrival_s > 0.02
        if request.deadline_s is not None and is_feasible:
            assert batch.started_s < request.deadline_s


@given(st.floats(1.3, 100), st.floats(1.0, 3.0), st.floats(0, 0.78))
def test_more_budget_never_gives_a_less_accurate_point_when_idle(
    target_ms: float, more: float, min_accuracy: float
) -> None:
    points = []
    for budget_ms in (target_ms, target_ms * more):
        scheduler = Scheduler(make_latencies())
        scheduler.submit(make_request(target_ms=budget_ms, min_accuracy=min_accuracy), 0.0)
        points.append(run_now(scheduler).point)

    assert points[0] <= points[1]


def test_who_comes_after_an_interruption_waits_until_the_batch_stops() -> None:
    scheduler, running = preempting()
    scheduler.submit(make_request("tight", 6.0, 0.002), 0.002)
    assert scheduler.plan(0.002).preempt == running.id

    tighter = scheduler.submit(make_request("tighter", 4.0, 0.002), 0.002)

    assert isinstance(tighter, Admitted)  # 0.8 ms, though the batch had 6 to go


def test_a_batch_that_ends_before_it_could_stop_runs_on() -> None:
    scheduler, _ = preempting(1000.0)
    now = 0.00722  # 0.78 ms to go; to stop takes up to 0.8

    scheduler.submit(make_request("tight", 5.01, now, min_accuracy=0.75), now)

    assert scheduler.plan(now).preempt is None
    assert scheduler.waiting == 1


@pytest.mark.parametrize(("floor", "is_interrupted"), [(None, True), (0.78, False)])
def test_computing_again_counts_at_the_lowest_point_that_the_batch_allows(
    floor: float | None, is_interrupted: bool
) -> None:
    scheduler = Scheduler(make_latencies(), preempts=True)
    for second in (0.0, 1.0):  # twelve at once, twice
        for i in range(12):
            scheduler.submit(make_request(f"{second}.{i}", 12.0, second), second)
            scheduler.cancel(f"{second}.{i}", second)
    scheduler.submit(make_request("first", 100.0, 2.0, min_accuracy=floor), 2.0)
    assert run_now(scheduler, 2.0).point == 3

    scheduler.submit(make_request("second", 12.0, 2.0001), 2.0001)

    assert (scheduler.plan(2.0001).preempt is not None) == is_interrupted


@pytest.mark.parametrize(("own_target_ms", "is_interrupted"), [(10.1, False), (1000.0, True)])
def test_a_batch_runs_on_where_only_its_own_request_would_be_late(
    own_target_ms: float, is_interrupted: bool
) -> None:
    scheduler = Scheduler(make_latencies(), preempts=True)
    scheduler.submit(make_request("runs", own_target_ms, point=3), 0.0)
    run_now(scheduler)

    scheduler.submit(make_request("behind", 13.0, 0.002, point=3), 0.002)

    # 6 ms to go, and 8 of its own
    assert (scheduler.plan(0.002).preempt is not None) == is_interrupted


def test_the_policy_is_told_once_requests_were_lost_for_the_time_of_a_target() -> None:
    told = []

    def policy(view: View) -> Choice:
        told.append(view.expected.overloaded)
        return choose(view)

    scheduler = Scheduler(make_latencies(), policy=policy)
    for now in (0.0, 0.006, 0.012, 0.018, 0.024):
        for i in range(80):
            scheduler.submit(make_request(f"{now}.{i}", 20.0, now), now)
        batch = run_now(scheduler, now)
        scheduler.done(batch.id, 2.5, now)

    assert told == [False, False, False, False, True]
