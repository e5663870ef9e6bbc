"""Tails of few runs lean on those of cells alike."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.profiler import summary
from benchmarks.tails import Floats, steadied
from maestro_core.profile import Latency


def cell(point: int, runs_ms: Floats) -> Latency:
    return summary(point, 1, [[ms] for ms in runs_ms.tolist()], random.Random(0))


def drawn(cells: int, n: int, scale: float = 1.0) -> list[Floats]:
    rng = np.random.default_rng(0)
    return [scale * rng.lognormal(0, 0.3, n) for _ in range(cells)]


def test_few_runs_give_a_steadier_p99_than_alone() -> None:
    runs = drawn(cells=40, n=20)
    alone = [cell(i, r) for i, r in enumerate(runs)]

    together = steadied(alone, runs)

    truth = np.exp(0.3 * 2.326)
    errors = [abs(x.p99_ms / x.p50_ms / truth - 1) for x in together]
    errors_alone = [abs(x.p99_ms / x.p50_ms / truth - 1) for x in alone]
    assert np.median(errors) < np.median(errors_alone) / 2


def test_many_runs_keep_their_own_tail() -> None:
    runs = [np.linspace(1, 2, 20_000), *drawn(cells=20, n=20)]
    own = cell(0, runs[0])

    kept = steadied([own, *(cell(i + 1, r) for i, r in enumerate(runs[1:]))], runs)[0]

    assert kept.p99_ms == pytest.approx(own.p99_ms, rel=0.01)


def test_cells_of_other_lengths_do_not_count() -> None:
    short, long = np.linspace(1, 3, 50), np.linspace(100, 110, 50)
    cells = [cell(0, short), cell(1, long)]

    assert steadied(cells, [short, long])[1].p99_ms == pytest.approx(cells[1].p99_ms)


@given(st.lists(st.lists(st.floats(0.1, 100), min_size=2, max_size=9), min_size=1, max_size=5))
def test_quantiles_stay_in_order(table: list[list[float]]) -> None:
    runs = [np.array(row) for row in table]

    for x in steadied([cell(i, r) for i, r in enumerate(runs)], runs):
        assert x.p50_ms <= x.p90_ms <= x.p95_ms <= x.p99_ms
