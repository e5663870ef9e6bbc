"""What would be chosen for a request, point by point, and why. Decides nothing."""

import math

from server.latencies import Latencies
from server.requests import Explanation, PointVerdict, Refusal
from server.tables import MS
from server.waiting import Entry


def explained(
    entry: Entry,
    refusal: Refusal | None,
    latencies: Latencies,
    *,
    expiry_s: float,
    planned: int | None,
    wait_ms: float,
    interrupts: bool,
    slowdown: float,
    waiting: int,
    now: float,
) -> Explanation:
    """Return the explanation of an entry that would wait for `wait_ms` from now.

    expiry_s: when the request wants the engine to be done, whatever its entry settles for.
    planned: the point of the next batch if it would be in that; None if not, or not known.
    """
    budget_ms = MS * (expiry_s - now)
    late = entry.late or (refusal is not None and refusal.reason == "infeasible")
    verdicts = tuple(
        _verdict(entry, point, latencies, wait_ms, slowdown, -math.inf if late else budget_ms)
        for point in range(len(latencies.accuracy))
    )
    allowed = [v for v in verdicts if v.feasible] if refusal is None else []
    best = max(allowed, key=lambda v: (v.accuracy, -v.point)).point if allowed else None
    if best is None and refusal is None:
        best = entry.lowest
    point = best if planned is None else planned
    why = _why(entry, best, refusal)
    return Explanation(
        point=point,
        why=why if point == best else "this leaves time for others that wait or may come",
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


def _why(entry: Entry, point: int | None, refusal: Refusal | None) -> str:
    if refusal is not None or point is None:
        return refusal.detail if refusal else "no point"
    if entry.late:
        return "no allowed point makes the target; the fastest is used"
    if entry.request.point is not None:
        return "the request names this point"
    if entry.request.deadline_s is None:
        return "without a target, the most accurate point"
    return "the most accurate allowed point that is on time"
