"""What a request may run at on this host, and whether any point can answer it in time.

Looks at the request alone; who else waits is the scheduler's business (scheduler.py).
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

from server.requests import Refusal, Request
from server.slowdown import Speed
from server.tables import MS, Tables
from server.waiting import Entry

# A request without a target is in no hurry, but not behind everybody for ever: it takes its place
# as if it had this long, times its priority level.
PATIENCE_S = 5.0
# And one that can only be late is waited for at least so long.
LATE_MS = 100.0


@dataclass(frozen=True, slots=True)
class Admission:
    """Turns requests into entries. `sheds`: refuse what no point makes."""

    tables: Tables
    sheds: bool

    def entry(
        self, request: Request, speed: Speed, number: int, now: float
    ) -> tuple[Entry, Refusal | None]:
        """Return the entry of the `number`th request, and why it can be refused, if it can.

        Raises:
            ValueError: its point doesn't exist, or its rows fill more than a batch.
        """
        tables = self.tables
        self._check(request)
        top = len(tables.best) - 1
        lowest, highest = 0, top
        if request.min_accuracy is not None:
            lowest = bisect_left(tables.reached, request.min_accuracy)
        if request.point is not None:
            below = tables.accuracy[request.point] < (request.min_accuracy or 0.0)
            lowest = highest = request.point
            lowest += below * (top + 1)
        if lowest > top:
            return self._between(request, top, top, number), _below_floor(request, tables.accuracy)
        if request.deadline_s is None and request.point is None:
            lowest = highest = tables.best[top]
        entry = self._between(request, lowest, highest, number)
        if request.deadline_s is None or not self.sheds:
            return entry, None
        factor, level = speed
        column = request.rows - 1
        quickest_ms = max(
            factor * tables.tail_ms[column][lowest], level * tables.p50_ms[column][lowest]
        )
        if MS * (entry.expiry_s - now) >= quickest_ms:
            return entry, None
        if request.on_miss == "reject":
            return entry, self._infeasible(request, quickest_ms, now)
        return self._late(entry, quickest_ms, factor, now), None

    def expiry_s(self, request: Request) -> float:
        """Return when the engine must be done with a request; inf without a target."""
        if request.deadline_s is None:
            return math.inf
        return request.deadline_s - self.tables.overhead_s

    def _check(self, request: Request) -> None:
        tables = self.tables
        if request.point is not None and request.point >= len(tables.best):
            raise ValueError(f"point must be in 0..{len(tables.best) - 1}, not {request.point}")
        if request.rows > tables.max_batch:
            raise ValueError(f"a request has 1..{tables.max_batch} samples, not {request.rows}")

    def _between(self, request: Request, lowest: int, highest: int, number: int) -> Entry:
        expiry_s = self.expiry_s(request)
        place_s = expiry_s
        if request.deadline_s is None:
            place_s = request.arrival_s + PATIENCE_S * request.level
        return Entry(
            request,
            (place_s, request.level, number),
            expiry_s,
            lowest,
            highest,
            request.min_accuracy or 0.0,
            request.rows * self.tables.unit_ms[lowest],
            self.tables.p50_ms[request.rows - 1][lowest],
        )

    def _late(self, entry: Entry, quickest_ms: float, factor: float, now: float) -> Entry:
        """Return the entry for a target that no point makes: as soon as may be, at its lowest.

        It may have to wait for one running batch, the longest there is, before its own; or for a
        trial of a calibration.
        """
        longest_ms = max(LATE_MS, factor * self.tables.tail_ms[-1][-1])
        return replace(
            entry,
            order=(now + quickest_ms / MS, *entry.order[1:]),
            expiry_s=now + (longest_ms + 2 * quickest_ms) / MS,
            highest=entry.lowest,
            late=True,
        )

    def _infeasible(self, request: Request, quickest_ms: float, now: float) -> Refusal:
        """Return the refusal, with the least target that would do: reading it took time, too."""
        spent_ms = MS * max(0.0, now - request.arrival_s)
        least_ms = spent_ms + quickest_ms + self.tables.overhead_ms
        target_ms = MS * ((request.deadline_s or math.inf) - request.arrival_s)
        return Refusal(
            "infeasible",
            f"no allowed point answers within {target_ms:.3f} ms here; the fastest needs "
            f"{math.ceil(1e3 * least_ms) / 1e3:.3f} ms",
            min_feasible_ms=least_ms,
        )


def _below_floor(request: Request, accuracy: tuple[float, ...]) -> Refusal:
    best = max(accuracy) if request.point is None else accuracy[request.point]
    return Refusal("floor", f"min_accuracy is {request.min_accuracy}; the best is {best:.4g}")
