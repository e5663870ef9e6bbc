"""What the scheduler is asked, and what it answers. Values only.

Clock readings are seconds of one monotonic clock, which the caller reads. What is made for each
request or batch is not frozen, as that takes time for each field.
"""

import math
from dataclasses import dataclass
from typing import Literal

MAX_TARGET_S = 3600.0
# Priority 0 means the default (Open Inference Protocol, schedule policy); 1 is the highest.
DEFAULT_PRIORITY = 2
MAX_PRIORITY = 2**32 - 1

OnMiss = Literal["degrade", "reject"]
Reason = Literal["infeasible", "floor", "full", "overloaded", "draining"]


@dataclass(slots=True)
class Request:
    """One request: `rows` samples that run in the same batch.

    `deadline_s` None means no target: the most accurate point, no hurry. `point` forces one.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    id: str
    arrival_s: float
    deadline_s: float | None = None
    min_accuracy: float | None = None
    on_miss: OnMiss = "degrade"
    priority: int = 0
    point: int | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.arrival_s):
            raise ValueError(f"arrival_s must be finite, not {self.arrival_s!r}")
        if self.deadline_s is not None and not (  # a difference would be rounded
            self.arrival_s < self.deadline_s <= self.arrival_s + MAX_TARGET_S
        ):
            target_ms = 1e3 * (self.deadline_s - self.arrival_s)
            raise ValueError(f"the target must be in (0, {1e3 * MAX_TARGET_S:g}] ms: {target_ms:g}")
        if self.min_accuracy is not None and not 0 <= self.min_accuracy <= 1:
            raise ValueError(f"min_accuracy must be in 0..1, not {self.min_accuracy!r}")
        if self.on_miss not in ("degrade", "reject"):
            raise ValueError(f"on_miss must be 'degrade' or 'reject', not {self.on_miss!r}")
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise ValueError(f"priority must be in 0..{MAX_PRIORITY}, not {self.priority!r}")
        if self.point is not None and self.point < 0:
            raise ValueError(f"point must be at least 0, not {self.point!r}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, not {self.rows!r}")

    @property
    def level(self) -> int:
        """Return the priority with the default filled in: 1 is given up last."""
        return self.priority or DEFAULT_PRIORITY


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not taken in, and what would help."""

    reason: Reason
    detail: str
    min_feasible_ms: float | None = None
    retry_after_s: float | None = None


@dataclass(slots=True)
class Admitted:
    """The request waits. `displaced` lost their places to it: answer them as overloaded."""

    displaced: tuple[Request, ...] = ()


@dataclass(slots=True)
class Batch:
    """Requests to run together now, in this order, at one point."""

    id: int
    requests: tuple[Request, ...]
    point: int
    rows: int
    predicted_ms: float  # tail of the engine call, slow-down included
    started_s: float


@dataclass(slots=True)
class Plan:
    """What to do now. `expired` ran out of time; `wake_s` is when to plan again if nothing comes.

    `preempt` is a batch to interrupt: `Scheduler.preempted` hears that it ended early, or `done`
    that it was done before. A plan with a batch may leave room for another: plan again until there
    is none.
    """

    batch: Batch | None = None
    expired: tuple[Request, ...] = ()
    wake_s: float | None = None
    preempt: int | None = None


@dataclass(frozen=True, slots=True)
class PointVerdict:
    """One point, as it looks for one request now. `total_ms` = wait + tail + overhead."""

    point: int
    accuracy: float
    tail_ms: float
    total_ms: float
    feasible: bool
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would be chosen for a request now, and why.

    interrupts: the batch that runs would be interrupted for it.
    """

    point: int | None
    why: str
    refusal: Refusal | None
    budget_ms: float | None
    wait_ms: float
    interrupts: bool
    slowdown: float
    waiting: int
    points: tuple[PointVerdict, ...]
