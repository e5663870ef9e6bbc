import math
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.forecast import Envelope
from server.latencies import TAIL_REACH, Latencies
from server.outlook import Expected, View
from server.requests import Request
from server.selector import choose, reserve
from server.slowdown import LARGEST_STEP, Slowdown
from server.tables import MS, Tables
from server.waiting import Entry, WaitingList

ACCURACY = (0.6, 0.7, 0.75, 0.78)
MAX_BATCH = 4
# No spread: tails are medians, so that a brute force is exact.
P50_MS = tuple(tuple(ms * (1 + b) / 2 for b in range(1, MAX_BATCH + 1)) for ms in (1, 2, 4, 8))
TABLES = Tables(Latencies(ACCURACY, P50_MS, P50_MS))

DUES_MS = st.lists(st.floats(1.0, 30.0), min_size=1, max_size=6).map(sorted)


def make_view(dues_ms: list[float], lowest: int = 0, tables: Tables = TABLES) -> View:
    waiting = WaitingList()
    for i, due_ms in enumerate(dues_ms):
        request = Request(str(i), 0.0, due_ms / MS if due_ms < 1e6 else None)
        order = (due_ms / MS, 2, i)
        work_ms = TABLES.unit_ms[lowest]
        waiting.add(Entry(request, order, due_ms / MS, lowest, 3, ACCURACY[lowest], work_ms, 1.0))
    return View(0.0, waiting, tables)


def is_schedulable(dues_ms: tuple[float, ...], start_ms: float) -> bool:
    """Return whether some split into batches at the cheapest point has all on time."""

    @cache
    def fits(first: int, at_ms: float) -> bool:
        if first == len(dues_ms):
            return True
        for rows in range(1, min(MAX_BATCH, len(dues_ms) - first) + 1):
            end_ms = at_ms + P50_MS[0][rows - 1]
            if end_ms <= dues_ms[first] + 1e-9 and fits(first + rows, end_ms):
                return True
        return False

    return fits(0, start_ms)


def has_room(dues_ms: list[float], count: int, point: int) -> bool:
    """Return whether a batch is on time and batches of one size then serve all others so."""
    took_ms = P50_MS[point][count - 1]
    behind = dues_ms[count:]
    return took_ms <= dues_ms[0] and (
        not behind
        or any(
            all(
                took_ms + (j / size + 1) * P50_MS[0][size - 1] <= due_ms
                for j, due_ms in enumerate(behind)
            )
            for size in (1, 2, 4)
        )
    )


@given(DUES_MS)
def test_all_stay_on_time_when_brute_force_finds_room(dues_ms: list[float]) -> None:
    options = [
        (count, point)
        for count in (1, 2, 4, min(len(dues_ms), MAX_BATCH))
        for point in range(4)
        if count <= len(dues_ms) and has_room(dues_ms, count, point)
    ]
    choice = choose(make_view(dues_ms))

    if options:
        assert choice.start == 0
        took_ms = P50_MS[choice.point][choice.count - 1]
        assert took_ms <= dues_ms[0]
        assert is_schedulable(tuple(dues_ms[choice.count :]), took_ms)


@given(st.floats(1.0, 30.0), st.integers(0, 3))
def test_alone_the_choice_is_the_best_of_every_point(due_ms: float, lowest: int) -> None:
    in_time = [p for p in range(lowest, 4) if P50_MS[p][0] <= due_ms]

    choice = choose(make_view([due_ms], lowest))

    assert choice.count == 1
    assert choice.point == (in_time[-1] if in_time else lowest)


@given(DUES_MS, st.integers(0, 3))
def test_no_floor_is_broken(dues_ms: list[float], lowest: int) -> None:
    assert choose(make_view(dues_ms, lowest)).point >= lowest


def test_reserve_leaves_time_for_a_burst_where_choose_does_not() -> None:
    view = make_view([30.0])
    envelope = Envelope(6.0, [1.0, 1.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    view.expected = Expected(100.0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [envelope])

    assert choose(view).point == 3
    assert reserve(view).point < 3


@pytest.mark.parametrize(("rate", "count"), [(100.0, 2), (900.0, 4)])
def test_where_small_batches_do_not_carry_the_load_a_larger_one_may_be_late(
    rate: float, count: int
) -> None:
    tails_ms = tuple(tuple(ms * (1 if b < 2 else 3) for b, ms in enumerate(row)) for row in P50_MS)
    view = make_view([6.0] * 4, tables=Tables(Latencies(ACCURACY, P50_MS, tails_ms)))
    view.expected = Expected(rate, [1.0] * 7, [Envelope(6.0, [1.0] * 7)])

    # Two rows get 1.3 a ms through, four 1.6: with a tail of 7.5 ms, but in 2.5 as a rule.
    choice = reserve(view)

    assert choice.count == count
    assert (choice.point == 0) == (count == 4)


@pytest.mark.parametrize("is_overloaded", [False, True])
def test_under_overload_heads_that_only_allow_small_batches_are_passed_over(
    is_overloaded: bool,
) -> None:
    view = make_view([1.2, 3.2, 3.2, 3.2, 3.2])
    view.expected.overloaded = is_overloaded

    choice = reserve(view)

    assert (choice.start, choice.count, choice.point) == ((1, 4, 0) if is_overloaded else (0, 1, 0))


@given(st.integers(1, 12), st.integers(0, 3), st.floats(0, 5_000), st.integers(0, 1))
def test_without_targets_the_choice_is_that_of_targets_far_off(
    count: int, lowest: int, rate: float, running: int
) -> None:
    free, far = (make_view([due_ms] * count, lowest) for due_ms in (math.inf, 1e15))
    free.expected.rate = far.expected.rate = rate
    free.running = far.running = running

    assert choose(free) == choose(far)


def test_the_tightest_request_sets_the_point() -> None:
    choice = choose(make_view([4.5, 1e4, 1e4, 1e4]))

    assert P50_MS[choice.point][choice.count - 1] <= 4.5


def test_accuracy_is_given_up_before_requests_are() -> None:
    relaxed, crowded = choose(make_view([11.0])), choose(make_view([11.0] * 12))

    assert relaxed.point == 3
    assert crowded.point < relaxed.point


def test_heads_that_only_allow_small_batches_are_passed_over_when_all_cannot_be_on_time() -> None:
    choice = choose(make_view([1.0] + [3.0] * 30))

    assert choice.start >= 1
    assert choice.count == MAX_BATCH


def test_noisy_tables_are_raised_until_they_never_fall() -> None:
    latencies = Latencies.from_quantiles(
        (0.6, 0.7), (1, 4), [[2.0, 3.0], [1.9, 6.0]], [[2.2, 3.0], [2.0, 6.6]], 0.1
    )

    assert latencies.p50_ms[1][0] == 2.0
    assert latencies.p50_ms[1][2] == pytest.approx(1.9 + 2 / 3 * 4.1)
    assert latencies.tail_ms[0][0] == pytest.approx(2.0 + TAIL_REACH * 0.2)
    for table in (latencies.p50_ms, latencies.tail_ms):
        assert all(a <= b for row in table for a, b in pairwise(row))
        assert all(a <= b for low, high in pairwise(table) for a, b in zip(low, high, strict=True))


def test_a_tail_that_rounding_puts_below_its_median_is_raised_to_it() -> None:
    latencies = Latencies.from_quantiles(
        (0.6,), (1, 4), [[0.3, 4.2]], [[math.nextafter(0.3, 1.0), 4.2]]
    )

    assert latencies.tail_ms[0][1:] == latencies.p50_ms[0][1:]


@pytest.mark.parametrize(
    ("accuracy", "p50_ms", "tail_ms", "message"),
    [
        ((), (), (), "at least one point"),
        ((1.2,), ((1.0,),), ((1.0,),), "accuracy of point 0 is 1.2"),
        ((0.5,), ((2.0, 1.0),), ((2.0, 2.0),), "falls as the batch grows"),
        ((0.5, 0.6), ((2.0,), (1.0,)), ((2.0,), (2.0,)), "below that of point 0"),
        ((0.5,), ((2.0,),), ((1.0,),), "tail_ms of point 0 is below"),
        ((0.5,), ((math.nan,),), ((1.0,),), "must be times above 0"),
        ((0.5,), ((1.0,), (2.0,)), ((1.0,),), "has 2 points"),
    ],
)
def test_tables_that_cannot_be_used_are_named(
    accuracy: tuple[float, ...],
    p50_ms: tuple[tuple[float, ...], ...],
    tail_ms: tuple[tuple[float, ...], ...],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        Latencies(accuracy, p50_ms, tail_ms)


def observe(slowdown: Slowdown, measured_ms: float, tail_ms: float, now: float) -> None:
    """Take in a batch that usually takes 1 ms, and keeps its slot while the engine has it."""
    slowdown.observe(measured_ms, measured_ms, 1.0, tail_ms, now)


def test_time_around_the_engine_raises_the_median_and_leaves_the_tail() -> None:
    slowdown = Slowdown()
    for i in range(400):
        slowdown.observe((1.0, 1.02, 0.98)[i % 3], 1.5, 1.0, 1.3, float(i))

    tail, median = slowdown.both(399.0)
    assert median == pytest.approx(1.5, abs=0.01)
    assert tail == pytest.approx(1.0, abs=0.03)


def test_a_calm_host_is_not_slowed_down() -> None:
    slowdown = Slowdown()
    for i in range(200):
        observe(slowdown, (1.0, 1.02, 0.98)[i % 3], 1.3, float(i))

    tail, _ = slowdown.both(199.0)
    assert tail == pytest.approx(1.0, abs=0.03)


def test_spread_that_the_profile_has_not_seen_is_covered() -> None:
    slowdown = Slowdown()
    for i in range(400):
        observe(slowdown, (1.0, 2.0)[i % 2], 1.1, float(i))

    tail, _ = slowdown.both(399.0)
    assert tail * 1.1 >= 2.0


def test_a_median_that_rises_within_the_tail_does_not_stretch_the_tail() -> None:
    slowdown = Slowdown()
    for i in range(400):
        observe(slowdown, (1.4, 1.45, 1.35)[i % 3], 2.0, float(i))

    tail, median = slowdown.both(399.0)
    assert median == pytest.approx(1.4, abs=0.03)
    assert tail == pytest.approx(1.0, abs=0.01)


def test_a_host_of_another_speed_scales_the_tail() -> None:
    for speed in (0.7, 2.0):
        slowdown = Slowdown()
        for i in range(400):
            observe(slowdown, speed * (1.0, 1.1, 1.2)[i % 3], 1.3, float(i))

        tail, _ = slowdown.both(399.0)
        assert speed <= tail <= 1.25 * speed


def test_one_stall_moves_the_estimate_by_one_step_only() -> None:
    slowdown = Slowdown()
    for i in range(100):
        observe(slowdown, 1.0, 1.1, float(i))
    observe(slowdown, 1e6, 1.1, 100.0)

    tail, median = slowdown.both(100.0)
    assert median <= 1 + 0.1 * LARGEST_STEP
    assert tail <= 1.7


def test_a_host_three_times_slower_is_covered_after_three_batches() -> None:
    slowdown = Slowdown()
    for i in range(100):
        observe(slowdown, 1.0, 1.1, float(i))
    for i in range(100, 103):
        observe(slowdown, 3.0, 1.1, float(i))

    tail, _ = slowdown.both(102.0)
    assert tail * 1.1 >= 3.0


def test_a_head_that_would_be_late_one_time_in_two_is_passed_over_when_it_is_tight() -> None:
    tail_ms = tuple(tuple(2 * ms for ms in row) for row in P50_MS)
    spread = Tables(Latencies(ACCURACY, P50_MS, tail_ms))
    view = make_view([1.05, 3.0])

    choice = choose(View(0.0, view.waiting, spread))

    assert (choice.start, choice.count) == (1, 1)
