"""Whole points from sums of layers: a line is found again, and noise is admitted."""

import numpy as np
import pytest

from benchmarks.correction import fit

SUMS = [0.5, 1.0, 2.0, 3.5, 5.0, 8.0]


def test_a_line_is_found_and_fits_what_was_left_out() -> None:
    found = fit(SUMS, [0.2 + 0.8 * x for x in SUMS])

    assert found.fixed_ms == pytest.approx(0.2)
    assert found.factor == pytest.approx(0.8)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.fixed_ms + 10.0 * found.factor == pytest.approx(8.2)


def test_noise_shows_in_the_error() -> None:
    noise = np.random.default_rng(0).uniform(0.8, 1.2, len(SUMS))

    found = fit(SUMS, [x * n for x, n in zip(SUMS, noise.tolist(), strict=True)])

    assert 0.02 < found.error < 0.5
    assert found.rank_correlation <= 1.0
