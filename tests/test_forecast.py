"""The arrival curve against plain statements of what it is."""

from itertools import combinations

import numpy as np
import pytest

from server.forecast import FADING, PASSED, WINDOWS, Envelope, Forecast

WINDOWS_S = [0.001 * 2**j for j in range(WINDOWS)]
GAPS_S = (0.0, 0.0003, 0.0011, 0.009, 0.07)

Arrivals = list[tuple[float, int]]


def envelope_of(arrivals: Arrivals) -> Envelope:
    envelope = Envelope(10.0)
    for now, rows in arrivals:
        envelope.observe(now, rows, WINDOWS_S)
    return envelope


def twice(arrivals: Arrivals, window_s: float) -> int:
    """Return the most rows that came within the window before two arrivals that are apart."""
    counts = [
        (now, sum(rows for at, rows in arrivals[: i + 1] if at > now - window_s))
        for i, (now, _) in enumerate(arrivals)
    ]
    pairs = combinations(counts, 2)
    apart = [min(a, b) for (x, a), (y, b) in pairs if y - x >= 2 * window_s]
    return max(apart, default=0)


@pytest.mark.parametrize("likely_gaps", [5, 4, 3])
def test_no_more_is_expected_than_came_within_each_window_twice(likely_gaps: int) -> None:
    rng = np.random.default_rng(likely_gaps)
    times_s = np.cumsum(rng.choice(GAPS_S[:likely_gaps], 4 * PASSED)).tolist()
    arrivals = list(zip(times_s, rng.integers(1, 4, 4 * PASSED).tolist(), strict=True))

    bursts = envelope_of(arrivals).bursts

    for burst, window_s in zip(bursts, WINDOWS_S, strict=True):
        assert 0 <= burst <= twice(arrivals, window_s)


def test_the_second_largest_of_bursts_apart_is_expected() -> None:
    sizes = [3, 1, 9, 20, 2, 7]
    arrivals = [(float(i), 1) for i, size in enumerate(sizes) for _ in range(size)]

    bursts = envelope_of(arrivals).bursts

    np.testing.assert_allclose(bursts, 9, rtol=1e-3)
    assert max(bursts) <= 9


def test_a_burst_that_came_once_is_not_expected_until_it_comes_again() -> None:
    alone = [(0.5 * i, 1) for i in range(10)]
    burst = [(6.0, 1)] * 12
    again = [(9.0, 1)] * 12

    assert max(envelope_of(alone + burst).bursts) == pytest.approx(1, rel=1e-3)
    assert max(envelope_of(alone + burst + again).bursts) == pytest.approx(12, rel=1e-3)


def test_a_burst_fades_as_others_come() -> None:
    burst = [(float(i), 1) for i in range(2) for _ in range(10)]
    others = [(10.0 + i, 1) for i in range(5_000)]

    bursts = envelope_of(burst + others).bursts

    np.testing.assert_allclose(bursts, 10 * FADING**5_000, rtol=1e-2)


def overloaded(lost: list[tuple[float, float]], now: float) -> bool:
    """Return whether what was lost, at so many ms with such targets, is an overload at `now`."""
    forecast = Forecast(1.0, 64.0)
    for at_ms, target_ms in lost:
        forecast.lost(at_ms / 1e3, target_ms)
    return forecast.overloaded(now / 1e3)


def test_losses_without_a_pause_for_the_time_of_a_target_are_an_overload() -> None:
    lasting = [(4.0 * i, 10.0) for i in range(4)]

    assert not overloaded([], 0.0)
    assert not overloaded(lasting[:3], 8.0)
    assert overloaded(lasting, 12.0)
    assert overloaded(lasting, 21.9)
    assert not overloaded(lasting, 22.1)


def test_it_is_the_target_of_the_last_that_was_lost_whose_time_counts() -> None:
    mixed = [(4.0 * i, 10.0 if i % 2 else 40.0) for i in range(6)]

    assert not overloaded(mixed[:3], 8.0)
    assert overloaded(mixed[:4], 12.0)
    assert not overloaded(mixed[:5], 16.0)
    assert overloaded(mixed[:6], 20.0)


def test_bursts_are_none() -> None:
    bursts = [(20.0 * i + j, 10.0) for i in range(5) for j in range(9)]

    assert not any(overloaded(bursts[: i + 1], at_ms) for i, (at_ms, _) in enumerate(bursts))
