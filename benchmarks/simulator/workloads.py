"""When requests come and what they ask for. Times in seconds from 0, targets in milliseconds."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Workload:
    """arrivals_s (n,), rising; targets_ms (n,)."""

    name: str
    arrivals_s: Array
    targets_ms: Array

    def __post_init__(self) -> None:
        if self.arrivals_s.shape != self.targets_ms.shape or self.arrivals_s.ndim != 1:
            raise ValueError("arrivals_s and targets_ms must have one and the same length")
        if len(self.arrivals_s) and (np.diff(self.arrivals_s) < 0).any():
            raise ValueError("arrivals_s must not fall")


def poisson(rate: float, count: int, rng: np.random.Generator) -> Array:
    """Return arrivals that know nothing of each other."""
    return np.cumsum(rng.exponential(1 / rate, count))


def gamma(rate: float, cv2: float, count: int, rng: np.random.Generator) -> Array:
    """Return arrivals whose gaps have a squared coefficient of variation `cv2` (bursty above 1)."""
    return np.cumsum(rng.gamma(1 / cv2, cv2 / rate, count))


def ramp(low: float, high: float, count: int, rng: np.random.Generator) -> Array:
    """Return Poisson arrivals whose rate rises linearly from `low` to `high`."""
    unit = np.cumsum(rng.exponential(1.0, count))
    slope = (high * high - low * low) / (2 * unit[-1])
    return np.asarray((np.sqrt(low * low + 2 * slope * unit) - low) / slope)


def on_off(
    rate: float, period_s: float, share_on: float, count: int, rng: np.random.Generator
) -> Array:
    """Return Poisson arrivals of mean `rate` that come only in the first part of each period."""
    busy_s = np.cumsum(rng.exponential(share_on / rate, count))
    on_s = share_on * period_s
    return np.asarray(busy_s // on_s * period_s + busy_s % on_s)


def replay(path: Path, rate: float, count: int, rng: np.random.Generator) -> Array:
    """Return arrivals with the gaps of a trace, scaled to a mean rate.

    The file has one time in seconds a line. Where the trace is shorter than `count` it starts
    over; the seed sets where it begins.

    Raises:
        ValueError: the file holds fewer than two times, times that fall, or what is no time.
    """
    try:
        gaps = np.diff(np.loadtxt(path, ndmin=1))
    except ValueError as error:
        raise ValueError(f"{path} must hold one time in seconds a line: {error}") from None
    if gaps.ndim > 1 or len(gaps) == 0 or (gaps < 0).any() or not 0 < gaps.sum() < math.inf:
        raise ValueError(f"{path} must hold at least two times in seconds that rise")
    turned = np.roll(gaps, -int(rng.integers(len(gaps))))
    repeated = np.tile(turned, math.ceil(count / len(gaps)))[:count]
    mean_s = float(repeated.mean()) or float(gaps.mean())  # few gaps of a bursty trace may all be 0
    return np.cumsum(repeated) * (1 / rate) / mean_s


def one_target(target_ms: float, count: int) -> Array:
    """Return the same target for all."""
    return np.full(count, target_ms)


def mixed_targets(low_ms: float, high_ms: float, count: int, rng: np.random.Generator) -> Array:
    """Return targets drawn per request, uniform in their logarithm."""
    return np.exp(rng.uniform(math.log(low_ms), math.log(high_ms), count))
