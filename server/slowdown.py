"""How much slower the host is now than when it was profiled, learnt from each finished batch."""

import math
from dataclasses import dataclass

# Weight of the newest batch: a step in the host's speed is followed within about ten batches.
GAIN = 0.1
# Deviations above the mean that the estimate covers: the tail, not the mean, must fit.
DEVIATIONS = 2.33
# One batch that stalled moves the estimate as if it had been this many times too slow, no more.
LARGEST_STEP = 3.0
# Without new batches the estimate returns to the profile: else a host that looked too slow for
# every request, and so runs none, would never be measured again.
FORGET_S = 10.0


@dataclass(slots=True)
class Slowdown:
    """Mean and spread of measured / profiled, by exponential averages (after ALERT, ATC 2020).

    `level` compares with the median, and is what a batch usually takes; `factor` is what
    the profiled tail is multiplied by, and covers spread that the profile hasn't seen.
    """

    level: float = 1.0
    tail: float = 1.0
    variance: float = 0.0
    batches: int = 0
    updated_s: float = -math.inf

    def observe(self, measured_ms: float, p50_ms: float, tail_ms: float, now: float) -> None:
        """Take in one finished batch. A reading that is no time is left out."""
        if not (math.isfinite(measured_ms) and measured_ms > 0):
            return
        gain = max(GAIN, 1 / (2 + self.batches))
        self.batches += 1
        self.level += gain * (min(measured_ms / p50_ms, LARGEST_STEP * self.level) - self.level)
        if self.batches == 1:
            self.tail = min(1.0, measured_ms / tail_ms)
        error = min(measured_ms / tail_ms, LARGEST_STEP * self.tail) - self.tail
        self.tail += gain * error
        self.variance = (1 - gain) * (self.variance + gain * error * error)
        self.updated_s = max(self.updated_s, now)

    def factor(self, now: float) -> float:
        """Return what to multiply profiled tails by, at least the level; near 1 when calm."""
        covered = self.tail + DEVIATIONS * math.sqrt(self.variance)
        return self._faded(max(self.level, covered), now)

    def typical(self, now: float) -> float:
        """Return what to multiply profiled medians by."""
        return self._faded(self.level, now)

    def _faded(self, value: float, now: float) -> float:
        if self.batches == 0:
            return 1.0
        age_s = max(0.0, now - self.updated_s)
        return 1.0 + (value - 1.0) * math.exp(-age_s / FORGET_S)
