"""Each rival against what its paper or source says, on queues small enough to work out by hand."""

import math

import pytest

from benchmarks.simulator import rivals
from server.latencies import Latencies
from server.outlook import Finished, View
from server.requests import Request
from server.scheduler import Scheduler
from server.selector import Choice, Policy
from server.tables import Tables

# Points of 1, 2 and 4 ms at batch 1; each further row costs half of that.
P50 = tuple(tuple(ms * (1 + b) / 2 for b in range(1, 5)) for ms in (1, 2, 4))
LATENCIES = Latencies((0.6, 0.7, 0.8), P50, P50)
TABLES = Tables(LATENCIES)


def first_choice(policy: Policy, targets_ms: list[float], now: float = 0.0) -> Choice:
    """Return what a policy says first of requests that came at 0."""
    seen: list[Choice] = []

    def spy(view: View) -> Choice:
        choice = policy(view)
        seen.append(choice)
        return choice

    scheduler = Scheduler(LATENCIES, policy=spy, sheds=False)
    for i, target_ms in enumerate(targets_ms):
        scheduler.submit(Request(str(i), 0.0, target_ms / 1e3), 0.0)
    scheduler.plan(now)
    return seen[0]


def shape(choice: Choice) -> tuple[int, int]:
    return choice.point, choice.count


def test_a_fixed_point_takes_the_batch_that_its_head_allows() -> None:
    assert shape(first_choice(rivals.fixed(1), [3.5] * 4)) == (1, 2)
    assert shape(first_choice(rivals.fixed(1), [2.5] * 4)) == (1, 1)


def test_maxacc_takes_the_dearest_point_and_then_the_batch() -> None:
    assert shape(first_choice(rivals.max_acc, [7.0] * 4)) == (2, 2)
    assert shape(first_choice(rivals.max_acc, [3.5] * 4)) == (1, 2)


def test_maxbatch_takes_the_largest_batch_and_then_the_point() -> None:
    assert shape(first_choice(rivals.max_batch, [5.5] * 4)) == (1, 4)
    assert shape(first_choice(rivals.max_batch, [1.6] * 4)) == (0, 2)


def test_maxbatch_does_not_look_at_how_few_wait() -> None:
    assert shape(first_choice(rivals.max_batch, [5.5])) == (1, 1)


def test_slackfit_takes_its_bucket_whatever_waits() -> None:
    policy = rivals.slack_fit(TABLES, buckets=10)  # edges 1, 2, ..., 10 ms

    assert shape(first_choice(policy, [10.5] * 4)) == (2, 4)
    assert shape(first_choice(policy, [5.5] * 4)) == (1, 4)
    assert shape(first_choice(policy, [4.5])) == (0, 1)  # the tuple of its bucket: (0, 4)


def test_slackfit_with_less_of_its_slack_is_cheaper() -> None:
    whole, half = (rivals.slack_fit(TABLES, share, buckets=10) for share in (1.0, 0.5))

    assert first_choice(whole, [10.5] * 4).point == 2
    assert first_choice(half, [10.5] * 4).point == 1


def test_infaas_gives_each_request_its_own_variant() -> None:
    assert shape(first_choice(rivals.infaas, [4.5, 4.6, 4.7])) == (2, 1)
    assert shape(first_choice(rivals.infaas, [3.1, 3.2, 9.0])) == (1, 2)


def test_heads_that_a_run_of_their_own_makes_late_are_dropped_by_all() -> None:
    several = (rivals.max_acc, rivals.max_batch, rivals.infaas, rivals.slack_fit(TABLES))
    alone = (rivals.fixed(0), rivals.nexus(0), rivals.Clockwork(0), rivals.Clipper(0))
    for policy in (*several, *alone):
        assert first_choice(policy, [2.5, 9.0], now=0.002).drop == 1
        assert first_choice(policy, [2.5], now=0.002) == Choice(0, drop=1)
    assert first_choice(rivals.fixed(1), [3.5, 9.0], now=0.002).drop == 1


def test_nexus_drops_heads_for_a_batch_that_is_in_time() -> None:
    assert first_choice(rivals.nexus(0), [1.6, 2.6, 2.6, 2.6]) == Choice(3, 0, drop=1)
    assert first_choice(rivals.nexus(0), [1.1]) == Choice(1, 0)


def test_clockwork_counts_on_the_longest_of_the_last_ten_batches() -> None:
    clockwork = rivals.Clockwork(0)
    assert clockwork(view_after(None, waiting=4, target_ms=2.6)).count == 4

    for batch_id in range(1, 12):  # of four rows: 9 ms once, 2.5 ms since
        took_ms = 9.0 if batch_id == 1 else 2.5
        choice = clockwork(view_after(Finished(batch_id, 4, 0, 0.0, took_ms), 4, target_ms=2.6))
        assert choice.count == (4 if batch_id == 11 else 3)


def test_clockwork_gives_up_heads_where_enough_others_fill_a_larger_batch() -> None:
    assert first_choice(rivals.Clockwork(0), [1.2, 9, 9, 9, 9]) == Choice(4, 0, drop=1)
    assert first_choice(rivals.Clockwork(0), [1.6, 1.6, 9]) == Choice(2, 0)


def view_after(finished: Finished | None, waiting: int, target_ms: float = 100.0) -> View:
    scheduler = Scheduler(LATENCIES, sheds=False)
    for i in range(waiting):
        scheduler.submit(Request(str(i), 0.0, target_ms / 1e3), 0.0)
    return View(0.0, scheduler._waiting, TABLES, finished=finished)


def test_clipper_grows_by_one_and_backs_off_by_a_tenth() -> None:
    clipper = rivals.Clipper(point=0, cap=3.0)
    counts = []
    for batch_id, measured_ms in ((1, 5.0), (2, 500.0)):
        clipper(view_after(Finished(batch_id - 1, 0, 0, 0.0, 1.0), waiting=4))
        finished = Finished(batch_id, int(clipper.cap), 0, 0.0, measured_ms)
        counts.append(clipper(view_after(finished, waiting=4)).count)

    assert counts == [4, 3]
    assert clipper.cap == pytest.approx(0.9 * 4)


def test_bentoml_cancels_heads_that_the_whole_queue_would_make_late() -> None:
    bentoml = rivals.BentoML(point=0, slope_ms=10.0)
    choice = bentoml(view_after(None, waiting=4, target_ms=25.0))

    assert choice.drop == 2  # two are left: 20 ms of work


def test_bentoml_waits_while_that_costs_less_than_usual() -> None:
    patient = rivals.BentoML(point=0, slope_ms=1.0, usual_wait_ms=100.0)
    hasty = rivals.BentoML(point=0, slope_ms=1.0, usual_wait_ms=1.0)
    view = view_after(None, waiting=2)

    assert patient(view) == Choice(0, wait_until_s=0.001)
    assert hasty(view).count == 2


def test_bentoml_learns_slope_and_base_from_its_batches() -> None:
    bentoml = rivals.BentoML(point=0)
    for batch_id, rows in enumerate((1, 2, 4, 8), 1):
        bentoml(view_after(Finished(batch_id, rows, 0, 3.0, 5.0 + 2.0 * rows), waiting=1))

    assert bentoml.slope_ms == pytest.approx(2.0)
    assert bentoml.base_ms == pytest.approx(5.0)
    assert bentoml.usual_wait_ms == pytest.approx(3.0)


def test_the_operator_deploys_what_carries_the_load() -> None:
    capacity = 1e3 / TABLES.unit_ms[1]

    assert rivals.carrying_point(TABLES, 0.7 * capacity) == 1
    assert rivals.carrying_point(TABLES, 0.9 * capacity) == 0
    assert rivals.carrying_point(TABLES, math.inf) == 0
