"""The arrival curve against a plain statement of what it is."""

import numpy as np
import pytest

from server.forecast import FADING, PASSED, WINDOWS, Envelope

WINDOWS_S = [0.001 * 2**j for j in range(WINDOWS)]
GAPS_S = (0.0, 0.0003, 0.0011, 0.009, 0.07)


def curve(arrivals: list[tuple[float, int]]) -> list[float]:
    """Return for each window the most rows that came within it, faded with each one since."""
    bursts = [0.0] * WINDOWS
    for i, (now, _) in enumerate(arrivals):
        for j, window_s in enumerate(WINDOWS_S):
            within = sum(rows for at, rows in arrivals[: i + 1] if at > now - window_s)
            bursts[j] = max(within, FADING * bursts[j])
    return bursts


@pytest.mark.parametrize("likely_gaps", [5, 4, 3, 2])
def test_bursts_are_the_most_rows_that_came_within_each_window(likely_gaps: int) -> None:
    rng = np.random.default_rng(likely_gaps)
    times_s = np.cumsum(rng.choice(GAPS_S[:likely_gaps], 4 * PASSED)).tolist()
    arrivals = list(zip(times_s, rng.integers(1, 4, 4 * PASSED).tolist(), strict=True))
    envelope = Envelope(10.0)

    for now, rows in arrivals:
        envelope.observe(now, rows, WINDOWS_S)

    assert envelope.bursts == curve(arrivals)
