"""What serving takes of a live server's host: of the event loop's core, and of computing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.open_loop import Sent
from benchmarks.own_server import CoreTime
from server.dispatcher import INLINE_MS

MeanMs = Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class Taken:
    """What some requests took of the cores, by the kernel's count, in ms.

    loop_ms: of the event loop's, without what it computed there; computed_ms: for computing;
    profiled_ms: what their batches take of that on average, by the profile.
    """

    requests: int
    batches: float
    loop_ms: float
    computed_ms: float
    profiled_ms: float

    @classmethod
    def of(cls, sent: Sequence[Sent], time: CoreTime, mean_ms: MeanMs) -> "Taken":
        """`time`: what the server's threads took meanwhile. mean_ms: of a point and rows."""
        answered = [one for one in sent if one.rows]
        # The thread of the event loop computes short batches itself.
        inline = [one for one in answered if one.predicted_ms <= INLINE_MS]
        inline_ms = sum(one.compute_ms / one.rows for one in inline)
        return cls(
            requests=len(sent),
            batches=sum(1 / one.rows for one in answered),
            loop_ms=max(0.0, 1e3 * time.loop_s - inline_ms),
            computed_ms=1e3 * time.others_s + inline_ms,
            profiled_ms=sum(mean_ms(one.point, one.rows) / one.rows for one in answered),
        )


@dataclass(frozen=True, slots=True)
class Demand:
    """What the simulator is told of a host (`simulator.events.Replica`).

    slower: how many times as long computing took as when it was profiled; 1 if nothing was.
    """

    request_ms: float
    batch_ms: float
    slower: float


def lost(sent: Sequence[Sent], interrupted_ms: float) -> float:
    """Return the share of computing that was for batches that were interrupted, 0..1."""
    answered_ms = sum(one.compute_ms / one.rows for one in sent if one.rows)
    return interrupted_ms / (interrupted_ms + answered_ms) if interrupted_ms else 0.0


def demand(parts: Sequence[Taken], alike: Sequence[Taken], lost_share: float = 0.0) -> Demand:
    """Return what a request and a batch take in the parts of a run.

    alike: parts of more runs than this, of some of which the batches were larger. They tell how
    much of what both take is for a batch. lost_share: of computing, for batches that were
    interrupted. The simulator interrupts its own, so that is not a slower host.
    """
    request_ms, batch_ms = _each_ms(alike)
    loop_ms = sum(part.loop_ms for part in parts)
    requests, batches = sum(part.requests for part in parts), sum(part.batches for part in parts)
    expected_ms = request_ms * requests + batch_ms * batches
    scale = loop_ms / expected_ms if expected_ms else 0.0
    profiled_ms = sum(part.profiled_ms for part in parts)
    computed_ms = (1 - lost_share) * sum(part.computed_ms for part in parts)
    slower = computed_ms / profiled_ms if profiled_ms else 1.0
    return Demand(scale * request_ms, scale * batch_ms, slower)


def _each_ms(parts: Sequence[Taken]) -> tuple[float, float]:
    """Return what a request and a batch take of the event loop, neither below 0: least squares."""
    counts = np.array([(part.requests, part.batches) for part in parts], float)
    loop_ms = np.array([part.loop_ms for part in parts])
    both, _, rank, _ = np.linalg.lstsq(counts, loop_ms)
    if rank == 2 and both.min() >= 0:
        return float(both[0]), float(both[1])
    alone = (counts * loop_ms[:, None]).sum(0) / np.maximum(np.square(counts).sum(0), 1e-9)
    candidates = [(float(alone[0]), 0.0), (0.0, float(alone[1]))]
    return min(candidates, key=lambda each: float(np.square(counts @ each - loop_ms).sum()))
