"""What would be chosen for a request, point by point, and why. Decides nothing."""

import math
from dataclasses import dataclass, replace

from server.latencies import Latencies
from server.requests import Explanation, PointVerdict, Refusal
from server.tables import MS
from server.waiting import Entry


@dataclass(frozen=True, slots=True)
class Planned:
    """What the next batch means for a request: it runs at `point`, it is given up, or neither."""

    point: int | None = None
    gives_up: bool = False


def explained(
    entry: Entry,
    refusal: Refusal | None,
    latencies: Latencies,
    *,
    expiry_s: float,
    planned: Planned,
    is_own: bool,
    wait_ms: float,
    interrupts: bool,
    slowdown: float,
    waiting: int,
    now: float,
) -> Explanation:
    """Return the explanation of an entry that would wait for `wait_ms` from now.

    expiry_s: when the request wants the engine to be done, whatever its entry settles for.
    is_own: whether the policy is ours: a published one keeps none of our rules, and what it does
    is known of its next batch alone.
    """
    if not is_own:
        entry = replace(entry, lowest=0, highest=len(latencies.accuracy) - 1)
    budget_ms = MS * (expiry_s - now)
    late = entry.late or (refusal is not None and refusal.reason == "infeasible")
    verdicts = tuple(
        _verdict(entry, point, latencies, wait_ms, slowdown, -math.inf if late else budget_ms)
        for point in range(len(latencies.accuracy))
    )
    if refusal is not None:
        point, why = None, refusal.detail
    elif is_own:
        point, why = _by_our_rules(entry, verdicts, planned)
    else:
        point, why = planned.point, _of_another(planned)
    return Explanation(
        point=point,
        why=why,
        refusal=refusal,
        budget_ms=budget_ms if math.isfinite(budget_ms) else None,
        wait_ms=wait_ms,
        interrupts=interrupts,
        slowdown=slowdown,
        waiting=waiting,
        points=verdicts,
    )


def _verdict(
    entry: Entry,
    point: int,
    latencies: Latencies,
    wait_ms: float,
    slowdown: float,
    budget_ms: float,
) -> PointVerdict:
    accuracy = latencies.accuracy[point]
    tail_ms = slowdown * latencies.tail_ms[point][entry.request.rows - 1]
    why = "feasible"
    if accuracy < (entry.request.min_accuracy or 0.0):
        why = "below min_accuracy"
    elif wait_ms + tail_ms > budget_ms:
        why = "too slow"
    elif not entry.lowest <= point <= entry.highest:
        why = "less accurate" if entry.request.point is None else "not asked for"
    total_ms = wait_ms + tail_ms + latencies.overhead_ms
    return PointVerdict(point, accuracy, tail_ms, total_ms, why == "feasible", why)


def _by_our_rules(
    entry: Entry, verdicts: tuple[PointVerdict, ...], planned: Planned
) -> tuple[int, str]:
    """Return the point and why."""
    allowed = [verdict for verdict in verdicts if verdict.feasible]
    best = max(allowed, key=lambda v: (v.accuracy, -v.point)).point if allowed else entry.lowest
    if planned.point is not None and planned.point != best:
        return planned.point, "this leaves time for others that wait or may come"
    if entry.late:
        return best, "no allowed point makes the target; the fastest is used"
    if entry.request.deadline_s is not None and not allowed:
        return best, "on time only if some of those before it are given up, or done sooner"
    if entry.request.point is not None:
        return best, "the request names this point"
    if entry.request.deadline_s is None:
        return best, "without a target, the most accurate point"
    return best, "the most accurate allowed point that is on time"


def _of_another(planned: Planned) -> str:
    if planned.gives_up:
        return "the policy gives it up: it would be late"
    if planned.point is None:
        return "not in the policy's next batch; which point follows is not known yet"
    return "the point of the policy's next batch"
