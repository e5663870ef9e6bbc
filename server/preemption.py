"""Whether to interrupt the batch that runs, and have its requests wait again.

What it has computed is lost. So that is done where somebody who waits, or may yet come, would be
late behind it, and nobody who waits need be without it, its own requests included. Pure functions
of a view of the scheduler.
"""

from dataclasses import dataclass

from server.outlook import (
    View,
    burst_limits_ms,
    due_by_place,
    due_with_bursts,
    limits_behind_ms,
    load,
)
from server.selector import CARRIED

# Nobody's batch is interrupted more often.
MOST_PREEMPTED = 3
# The runtime ends a run between two operators: after so much of its time, at most.
STOP_SHARE = 0.1


@dataclass(slots=True)
class Remaining:
    """What a running batch takes yet, ms: usually; until it stops when it is interrupted; and then
    again, at the cheapest point that its requests allow."""

    usual_ms: float
    stop_ms: float
    again_ms: float

    @property
    def gains_time(self) -> bool:
        """Return whether its requests can be done sooner if it is interrupted."""
        return self.stop_ms + self.again_ms < self.usual_ms


def delays(view: View, remaining: Remaining) -> bool:
    """Return whether somebody who waits may be late behind the batch.

    Or with a burst that may come meanwhile, where to compute again takes less than the rest.
    """
    due = due_by_place(view)
    if not remaining.gains_time:
        (limit_ms,) = limits_behind_ms(view, due, [0])
        return limit_ms < remaining.usual_ms
    (limit_ms,) = limits_behind_ms(view, due_with_bursts(view, due), [0])
    if limit_ms >= remaining.usual_ms:
        (limit_ms,) = burst_limits_ms(view, [0], [limit_ms])
    return limit_ms < remaining.usual_ms


def pays(view: View, remaining: Remaining) -> bool:
    """Return whether all can be on time if the batch is interrupted.

    In `view` those of its requests wait that can be late, too.
    Computing again what is nearly done adds work: only where the cheapest point carries the load
    well.
    """
    due = due_by_place(view)
    (limit_ms,) = limits_behind_ms(view, due, [0])
    if limit_ms < remaining.stop_ms:
        return False
    if remaining.gains_time:
        return True
    return load(view, due).per_ms * view.tables.unit_ms[0] <= CARRIED
