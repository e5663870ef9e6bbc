"""How much slower the host is now than when it was profiled, learnt from each finished batch."""

import math
from dataclasses import dataclass

# Weight of the newest batch: a step in the host's speed is followed within about ten batches.
GAIN = 0.1
# Deviations above the mean that the estimate covers: as far as profiled tails reach, which one
# run in ten thousand exceeds. That is 3.7 for a normal spread and 8.2 for an exponential one.
DEVIATIONS = 5.0
# One batch that stalled moves the mean as if it had been this many times too slow, no more.
LARGEST_STEP = 3.0
# And the spread as if it had been this many times slower than is covered: it alone says nothing of
# the next, and a host that is much slower says so again.
UNCOVERED = 1.5
# Without new batches the estimate returns to the profile: else a host that looked too slow for
# every request, and so runs none, would never be measured again.
FORGET_S = 10.0

# What profiled tails and medians are multiplied by now.
Speed = tuple[float, float]


@dataclass(slots=True)
class Slowdown:
    """Mean and spread of measured / profiled, by exponential averages (after ALERT, ATC 2020).

    `level` compares with the median the time for which a batch keeps its slot, from decision to
    result: receiving and answering requests is in it, where that delays the engine. What the
    profiled tail is multiplied by also covers spread that the profile hasn't seen. A median that
    rises within the profiled tail, as where a host wakes up for each of few requests, leaves that
    tail as it was: the spread says where it is now.
    """

    level: float = 1.0
    tail: float = 1.0
    variance: float = 0.0
    batches: int = 0
    updated_s: float = -math.inf

    def observe(
        self, measured_ms: float, kept_ms: float, p50_ms: float, tail_ms: float, now: float
    ) -> None:
        """Take in one finished batch: what the engine took, and for how long it kept its slot.

        A reading that is no time is left out.
        """
        if not (math.isfinite(measured_ms) and measured_ms > 0):
            return
        gain = max(GAIN, 1 / (2 + self.batches))
        self.batches += 1
        self.level += gain * (min(kept_ms / p50_ms, LARGEST_STEP * self.level) - self.level)
        if self.batches == 1:
            self.tail = min(1.0, measured_ms / tail_ms)
        error = min(measured_ms / tail_ms, UNCOVERED * self._covered()) - self.tail
        self.tail += gain * error
        self.variance = (1 - gain) * (self.variance + gain * error * error)
        self.updated_s = max(self.updated_s, now)

    def both(self, now: float) -> Speed:
        """Return what to multiply profiled tails by, and what to multiply profiled medians by.

        Both 1 when calm, less on a faster host.
        """
        if self.batches == 0:
            return 1.0, 1.0
        kept = math.exp(-max(0.0, now - self.updated_s) / FORGET_S)
        factor = 1.0 + (max(min(1.0, self.level), self._covered()) - 1.0) * kept
        return factor, 1.0 + (self.level - 1.0) * kept

    def _covered(self) -> float:
        """Return how many times the profiled tail batches take at most, for all we have seen."""
        return self.tail + DEVIATIONS * math.sqrt(self.variance)
