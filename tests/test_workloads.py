"""Arrivals and targets: their means, their burstiness, their order."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulator.scenarios import ARRIVALS, Scenario
from benchmarks.simulator.workloads import (
    Workload,
    gamma,
    mixed_targets,
    on_off,
    one_target,
    poisson,
    ramp,
    replay,
)
from server.latencies import Latencies

COUNT = 20_000
LATENCIES = Latencies((0.5, 0.8), ((1.0, 1.5), (4.0, 6.0)), ((1.2, 1.8), (5.0, 7.0)), 0.5)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.txt"
    path.write_text("0.0\n0.5\n0.6\n2.0\n")
    return path


@pytest.mark.parametrize("name", ARRIVALS)
def test_every_kind_of_arrivals_rises_at_the_mean_rate_asked_for(name: str, trace: Path) -> None:
    scenario = Scenario(name, load=1.5)
    workload = scenario.workload(LATENCIES, COUNT, seed=3, trace=trace)

    assert len(workload.arrivals_s) == COUNT
    assert (np.diff(workload.arrivals_s) >= 0).all()
    assert COUNT / workload.arrivals_s[-1] == pytest.approx(1.5 * 2000 / 6.0, rel=0.08)


def test_the_same_seed_gives_the_same_requests_and_another_others() -> None:
    scenario = Scenario("gamma4", 1.0, mixed=True)
    first, again, other = (scenario.workload(LATENCIES, 100, seed) for seed in (1, 1, 2))

    assert (first.arrivals_s == again.arrivals_s).all()
    assert (first.targets_ms == again.targets_ms).all()
    assert (first.arrivals_s != other.arrivals_s).any()


@pytest.mark.parametrize("cv2", [2.0, 4.0, 8.0])
def test_gamma_gaps_have_the_burstiness_asked_for(cv2: float) -> None:
    gaps = np.diff(gamma(100.0, cv2, 10 * COUNT, rng()))

    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(cv2, rel=0.1)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(poisson(100.0, COUNT, rng()))

    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1.0, rel=0.1)


def test_a_ramp_ends_faster_than_it_began() -> None:
    gaps = np.diff(ramp(50.0, 200.0, COUNT, rng()))

    assert 1 / gaps[:500].mean() == pytest.approx(50, rel=0.2)
    assert 1 / gaps[-500:].mean() == pytest.approx(200, rel=0.2)


def test_nothing_comes_in_the_off_part_of_a_period() -> None:
    arrivals_s = on_off(100.0, 2.0, 0.25, COUNT, rng())

    assert (arrivals_s % 2.0 <= 0.5).all()


def test_a_trace_keeps_its_gaps_in_their_cycle(trace: Path) -> None:
    gaps = np.diff(replay(trace, 10.0, 300, rng()))

    cycle = np.array([0.5, 0.1, 1.4]) * 0.1 / (2.0 / 3)
    assert any(np.allclose(gaps, np.tile(np.roll(cycle, k), 100)[:299]) for k in range(3))


def test_a_trace_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    for text in ("1.0\n", "2.0\n1.0\n", "1.0\n1.0\n", "1.0\ninf\n", "1 2\n3 4\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"short\.txt must hold at least two times"):
            replay(path, 1.0, 10, rng())
    path.write_text("time\n1.0\n")
    with pytest.raises(ValueError, match=r"short\.txt must hold one time in seconds a line: could"):
        replay(path, 1.0, 10, rng())
    with pytest.raises(ValueError, match="trace: give a file"):
        Scenario("trace", 1.0).workload(LATENCIES, 10, 0)


def test_targets_stay_in_their_range() -> None:
    targets_ms = mixed_targets(5.0, 80.0, COUNT, rng())

    assert targets_ms.min() >= 5
    assert targets_ms.max() <= 80
    assert np.median(targets_ms) == pytest.approx(20, rel=0.05)
    assert (one_target(7.0, 3) == 7.0).all()


def test_a_workload_that_falls_or_has_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="must not fall"):
        Workload("w", np.array([1.0, 0.5]), np.array([1.0, 1.0]))
    with pytest.raises(ValueError, match="one and the same length"):
        Workload("w", np.array([1.0, 2.0]), np.array([1.0]))
