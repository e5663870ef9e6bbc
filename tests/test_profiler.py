"""The profiler in virtual time: a fake runner moves a fake clock."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.effort import (
    FULL,
    QUICK,
    CancelledError,
    Precision,
    Progress,
    TooLittleTimeError,
)
from benchmarks.profiler import Measured, Turn, measure, summary
from benchmarks.smoothing import dominated_rows, isotonic, isotonic_grid, smooth
from maestro_core.profile import Latency
from server.interrupt import Interrupt, InterruptedRunError

BATCHES = (1, 2, 4)
LOOSE = Precision(min_runs=20)


class FakeHost:
    """A clock that only running moves; latency is (point + 1) × batch ms, times noise."""

    def __init__(self, noise: float = 0.0, speed: Callable[[float], float] = lambda _: 1.0) -> None:
        self.now_s = 0.0
        self.ran: list[tuple[int, int]] = []
        self.in_turn = False
        self.turns_s: list[float] = []
        self._noise, self._speed = noise, speed
        self._rng = random.Random(1)

    def clock(self) -> float:
        return self.now_s

    def run(self, point: int, batch: int, interrupt: Interrupt) -> None:
        if interrupt.is_set:
            raise InterruptedRunError
        self.ran.append((point, batch))
        noise = 1 + self._noise * self._rng.random()
        self.now_s += 1e-3 * (point + 1) * batch * noise * self._speed(self.now_s)

    @contextmanager
    def turn(self, expected_s: float, most_s: float) -> Iterator[Interrupt]:
        assert not self.in_turn
        self.in_turn = True
        began_s = self.now_s
        yield Interrupt()
        self.turns_s.append(self.now_s - began_s)
        self.in_turn = False
        assert expected_s >= 0
        assert most_s >= 0


def measured(
    host: FakeHost, budget_s: float = 60.0, precision: Precision = LOOSE, **options: Any
) -> Measured:
    return measure(
        host.run,
        range(4),
        BATCHES,
        budget_s=budget_s,
        precision=precision,
        rng=random.Random(0),
        clock=host.clock,
        **{"turn": host.turn, **options},
    )


def test_a_steady_host_is_measured_exactly_and_stops_on_precision() -> None:
    latencies, stopped_on = measured(FakeHost())

    assert stopped_on == "precision"
    assert [(x.point, x.batch) for x in latencies] == [(p, b) for p in range(4) for b in BATCHES]
    for x in latencies:
        assert x.p50_ms == pytest.approx((x.point + 1) * x.batch)
        assert x.p99_ms == pytest.approx(x.p50_ms)
        assert x.n >= LOOSE.min_runs


def test_every_interval_is_as_narrow_as_asked() -> None:
    latencies, stopped_on = measured(FakeHost(noise=0.3))

    assert stopped_on == "precision"
    assert all(LOOSE.is_met(x) for x in latencies)
    assert all(x.p50_low_ms <= x.p50_ms <= x.p50_high_ms for x in latencies)
    errors = [x.p50_ms / (1.15 * (x.point + 1) * x.batch) - 1 for x in latencies]
    assert max(map(abs, errors)) < 3 * LOOSE.relative


def test_a_budget_that_runs_out_is_kept_and_reported() -> None:
    host = FakeHost(noise=0.3)

    latencies, stopped_on = measured(host, budget_s=0.5, precision=Precision(relative=1e-6))

    assert stopped_on == "time"
    assert host.now_s <= 0.5
    assert len(latencies) == 4 * len(BATCHES)


@given(st.floats(1e-3, 2.0), st.integers(0, 9))
@settings(max_examples=20)
def test_no_more_than_the_budget_is_spent(budget_s: float, seed: int) -> None:
    """But for the smallest batch, which is warmed up and run once on every point."""
    host = FakeHost(noise=0.5)
    least_s = 1.5 * 2 * sum(1e-3 * (point + 1) for point in range(16))

    measure(
        host.run,
        range(16),
        (1, 2, 4, 8, 16),
        budget_s=budget_s,
        precision=Precision(relative=0.0, absolute_ms=0.0, min_runs=10**6),
        rng=random.Random(seed),
        clock=host.clock,
    )

    assert host.now_s <= max(budget_s * 1.1, least_s)


def test_what_is_spent_before_the_trials_is_taken_from_them() -> None:
    assert QUICK.after(5.0).budget_s == QUICK.budget_s - 5.0
    assert FULL.after(5.0).precision == FULL.precision
    assert 0 < QUICK.after(60.0).budget_s <= 1.0
    searching = replace(QUICK, search=True)
    assert searching.search_s + searching.after(60.0).budget_s == QUICK.budget_s


def test_batches_too_large_for_the_budget_are_left_out() -> None:
    host = FakeHost()

    latencies, _ = measured(host, budget_s=0.13)

    assert {x.batch for x in latencies} == {1, 2}
    assert len(latencies) == 8


def test_a_host_that_changes_speed_gets_a_wide_interval() -> None:
    host = FakeHost(speed=lambda now_s: 2.0 if now_s > 1.0 else 1.0)

    latencies, stopped_on = measured(host, budget_s=2.5, precision=Precision(min_runs=10**6))

    assert stopped_on == "time"
    slow = [x for x in latencies if x.batch == 4]
    assert all(x.p50_high_ms / x.p50_low_ms > 1.5 for x in slow)


def test_trials_are_interleaved_in_random_order() -> None:
    host = FakeHost(noise=0.1)
    measured(host, precision=Precision(min_runs=200))

    rest = host.ran[len(host.ran) // 4 :]
    repeats = sum(a == b for a, b in pairwise(rest)) / len(rest)
    followers = Counter(b for a, b in pairwise(rest) if a == (3, 4) and b != a)
    assert repeats < 0.5
    assert len(followers) > 4


def test_the_last_cell_is_not_measured_with_warm_caches() -> None:
    host = FakeHost()
    rng = random.Random(2)

    def run(point: int, batch: int, interrupt: Interrupt) -> None:
        """Take a tenth right after the same cell; all but one cell are known long before it."""
        warm = host.ran[-1:] == [(point, batch)]
        host.run(point, batch, interrupt)
        if (point, batch) == (3, 4):
            host.now_s += 1e-3 * (0.0 if warm else rng.uniform(100, 200))

    precision = Precision(relative=0.05, min_runs=20)
    latencies, stopped_on = measure(
        run,
        range(4),
        BATCHES,
        budget_s=600.0,
        precision=precision,
        rng=random.Random(0),
        clock=host.clock,
    )

    (last,) = (x for x in latencies if (x.point, x.batch) == (3, 4))
    alone = max(x.n for x in latencies if x is not last)
    assert stopped_on == "precision"
    assert last.n > 2 * alone
    assert last.p50_ms == pytest.approx(16 + 150, rel=0.1)


def test_a_turn_holds_one_short_trial() -> None:
    host = FakeHost()
    measured(host)

    longest_run_s = 1e-3 * 4 * 4
    assert max(host.turns_s) <= longest_run_s + 1e-9
    assert not host.in_turn


def test_a_trial_that_is_interrupted_is_made_again_and_not_counted() -> None:
    host, rng, interrupted = FakeHost(), random.Random(2), 0

    @contextmanager
    def turn(expected_s: float, most_s: float) -> Iterator[Interrupt]:
        nonlocal interrupted
        with host.turn(expected_s, most_s):
            interrupt = Interrupt()
            if rng.random() < 0.5:
                interrupt.set()
                interrupted += 1
                host.now_s += 1e-4
            yield interrupt

    found = measured(host, turn=turn)

    assert interrupted > len(host.ran) / 2
    for x in found.latencies:
        assert x.p50_ms == pytest.approx((x.point + 1) * x.batch)
        assert x.n >= LOOSE.min_runs


def waits(host: FakeHost, times: float) -> Turn:
    """Return a turn that leaves requests so many times what a trial is said to take."""

    def turn(expected_s: float, most_s: float) -> AbstractContextManager[Interrupt]:
        host.now_s += times * expected_s
        return host.turn(expected_s, most_s)

    return turn


def test_waiting_for_turns_is_not_taken_for_computing() -> None:
    host = FakeHost()
    busy_s = 2 * 1e-3 * sum(p * b for p in range(1, 5) for b in BATCHES)

    found = measured(host, 40 * busy_s, turn=waits(host, 9.0))

    assert {x.batch for x in found.latencies} == set(BATCHES)
    assert host.now_s <= 41 * busy_s


def test_where_requests_never_pause_all_batches_are_measured_in_time() -> None:
    host = FakeHost()
    busy_s = 2 * 1e-3 * sum(p * b for p in range(1, 5) for b in BATCHES)

    def turn(expected_s: float, most_s: float) -> AbstractContextManager[Interrupt]:
        host.now_s += min(most_s, 50 * expected_s)
        return host.turn(expected_s, most_s)

    found = measured(host, 6 * busy_s, turn=turn, largest_in_use=max(BATCHES))

    assert {x.batch for x in found.latencies} == set(BATCHES)
    assert host.now_s <= 7 * busy_s


def test_a_calibration_that_would_leave_out_batches_in_use_fails() -> None:
    host = FakeHost()

    with pytest.raises(TooLittleTimeError, match="batches of 4, which are in use"):
        measured(host, 0.12, largest_in_use=4)


def test_progress_rises_to_the_total() -> None:
    host, seen = FakeHost(), list[Progress]()

    measure(
        host.run,
        range(2),
        (1, 2),
        budget_s=60,
        precision=LOOSE,
        rng=random.Random(0),
        clock=host.clock,
        progress=seen.append,
    )

    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total == 4
    assert all(p.left_s is not None and 0 <= p.left_s <= 60 for p in seen)


def test_cancelling_stops_before_the_next_trial() -> None:
    host = FakeHost()

    with pytest.raises(CancelledError):
        measured(host, cancelled=lambda: len(host.ran) >= 10)
    assert len(host.ran) == 10


def test_summary_gives_the_quantiles_of_all_runs() -> None:
    times = np.random.default_rng(0).lognormal(size=(40, 5))

    x = summary(0, 1, times.tolist(), random.Random(0))

    assert x.n == 200
    assert x.p95_ms == pytest.approx(np.quantile(times, 0.95))
    assert x.p50_low_ms < x.p50_ms < x.p50_high_ms


def test_the_interval_covers_the_true_median_nineteen_times_in_twenty() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        # Rounds that differ as much as their runs: runs alone would give intervals far too narrow.
        times = np.exp(0.1 * draw.standard_normal((30, 1)) + 0.1 * draw.standard_normal((30, 5)))
        x = summary(0, 1, times.tolist(), random.Random(i))
        covered += x.p50_low_ms <= 1.0 <= x.p50_high_ms
    assert covered >= 180


RISING = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # accuracy along a chain


def grid(table: list[list[float]]) -> tuple[Latency, ...]:
    return tuple(
        Latency(point, batch, ms, ms * 1.1, ms * 1.2, ms * 1.3, 10, ms * 0.9, ms * 1.1)
        for point, row in enumerate(table)
        for batch, ms in zip(BATCHES, row, strict=True)
    )


def test_smoothing_leaves_monotone_latencies_alone() -> None:
    table = grid([[1, 2, 4], [2, 3, 5], [3, 6, 9]])

    smoothed, dominated = smooth(table, RISING[: len(table) // 3])

    assert dominated == ()
    assert [x.p50_ms for x in smoothed] == pytest.approx([x.p50_ms for x in table])


def test_a_point_on_a_plateau_below_a_faster_one_is_dominated() -> None:
    smoothed, dominated = smooth(grid([[1, 2, 4], [3, 5, 9], [2, 4, 8]]), RISING[:3])

    assert dominated == (1,)
    assert [x.p50_ms for x in smoothed if x.point == 2] == pytest.approx([2, 4, 8])


tables = st.lists(
    st.lists(st.floats(0.01, 100), min_size=3, max_size=3), min_size=1, max_size=6
).map(grid)


@given(tables)
def test_smoothed_latencies_are_monotone(table: tuple[Latency, ...]) -> None:
    smoothed, dominated = smooth(table, RISING[: len(table) // 3])

    p50 = np.array([x.p50_ms for x in smoothed]).reshape(-1, 3)
    chain = np.delete(p50, dominated, axis=0)
    assert (np.diff(p50, axis=1) >= -1e-12).all()
    assert (np.diff(chain, axis=0) >= -1e-12).all()
    assert len(chain) >= 1


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_isotonic_is_the_min_max_formula(y: list[float]) -> None:
    """fit[i] = max over j <= i of min over k >= i of mean(y[j..k]) (Barlow et al., 1972)."""
    n = len(y)
    oracle = [
        max(min(float(np.mean(y[j : k + 1])) for k in range(i, n)) for j in range(i + 1))
        for i in range(n)
    ]

    assert isotonic(np.array(y)) == pytest.approx(oracle, abs=1e-9)


def test_a_monotone_grid_is_its_own_fit() -> None:
    table = np.add.outer(np.arange(4.0), np.arange(3.0))

    assert np.array_equal(isotonic_grid(table), table)


def test_the_dearest_row_is_never_dominated() -> None:
    assert dominated_rows(np.ones((3, 2)), RISING[:3]) == (0, 1)


def test_a_point_that_is_more_accurate_than_a_faster_one_is_not_dominated() -> None:
    assert dominated_rows(np.array([[1.0, 2.0], [3.0, 5.0], [2.0, 4.0]]), [0.7, 0.9, 0.8]) == ()
