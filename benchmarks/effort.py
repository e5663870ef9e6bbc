"""What a calibration may cost, and how far it is: words for those who ask for one.

Apart from `profiler`, so that a process that only asks does not load a runtime.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from maestro_core.profile import Kind, Latency

SEARCH_SHARE = 0.5
_LEAST_S = 1.0


class CancelledError(Exception):
    """The calibration was cancelled; nothing of it is kept."""


class TooLittleTimeError(Exception):
    """A calibration would have left out batches that are in use; nothing of it is kept."""


@dataclass(frozen=True, slots=True)
class Precision:
    """When a median is known well enough: half its 95 % interval is within the larger of both."""

    relative: float = 0.02
    absolute_ms: float = 0.005
    min_runs: int = 100  # a p95 needs that many

    def is_met(self, latency: Latency) -> bool:
        """Return whether a latency is known well enough."""
        half_ms = (latency.p50_high_ms - latency.p50_low_ms) / 2
        wanted_ms = max(self.relative * latency.p50_ms, self.absolute_ms)
        return latency.n >= self.min_runs and half_ms <= wanted_ms


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a calibration may cost; with `search`, points for the host are looked for first.

    `budget_s` is for all there is to do: choosing threads, baking, loading, and the trials. A
    search takes what it needs to judge a few points, however little that is, and the trials that
    follow have their share in any case.
    """

    kind: Kind
    budget_s: float
    precision: Precision
    search: bool = False

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Effort":
        """Return the effort that `dataclasses.asdict` made `fields` of."""
        return cls(**{**fields, "precision": Precision(**fields["precision"])})

    @property
    def search_s(self) -> float:
        """Return the seconds for a search, of those for all."""
        return SEARCH_SHARE * self.budget_s if self.search else 0.0

    @property
    def most_s(self) -> float | None:
        """Return the seconds that it takes at most; None where a search takes what it needs."""
        return None if self.search else self.budget_s

    def after(self, spent_s: float) -> "Effort":
        """Return what is left for the trials when so much is spent."""
        least_s = self.budget_s - self.search_s if self.search else _LEAST_S
        return replace(self, budget_s=max(least_s, self.budget_s - spent_s))


# A process that starts, and one that writes its profile, takes the rest of 15 s and of 120 s.
QUICK = Effort("quick", 12.0, Precision(min_runs=20))
FULL = Effort("full", 115.0, Precision())


class Progress(NamedTuple):
    """How far a calibration is: cells (point × batch size) known well enough, of all.

    `left_s` is the most seconds that it still takes; None in a search, which takes what it needs.
    """

    done: int
    total: int
    left_s: float | None
