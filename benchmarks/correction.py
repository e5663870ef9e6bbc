"""From the latencies of layers alone to that of a whole point: a line, and how far off it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Correction:
    """whole = fixed_ms + factor × sum of layers.

    `error` is the mean relative error on points that were left out of the fit (one at a time), and
    `rank_correlation` Spearman's, of sums and wholes.
    """

    fixed_ms: float
    factor: float
    error: float
    rank_correlation: float


def fit(sums_ms: Sequence[float], wholes_ms: Sequence[float]) -> Correction:
    """Return the line with the least relative squared error through at least three points."""
    x, y = np.array(sums_ms), np.array(wholes_ms)
    fixed_ms, factor = _line(x, y)
    errors = []
    for i in range(len(x)):
        a, b = _line(np.delete(x, i), np.delete(y, i))
        errors.append(abs(a + b * x[i] - y[i]) / y[i])
    ranks = np.corrcoef(_ranks(x), _ranks(y))[0, 1]
    return Correction(fixed_ms, factor, float(np.mean(errors)), float(ranks))


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    (a, b), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    return float(a), float(b)


def _ranks(values: Floats) -> Floats:
    return np.argsort(np.argsort(values)).astype(float)
