"""What serving takes of a live server's host: of the event loop's core, and of computing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    @property
    def slower(self) -> float:
        """How many times as long computing took as when it was profiled; 1 if nothing was."""
        return self.computed_ms / self.profiled_ms if self.profiled_ms else 1.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What the simulator is told of a host (`simulator.events.Replica`)."""

    request_ms: float
    batch_ms: float
    slower: float


def demand(taken: Taken, lone: Taken) -> Demand:
    """Return what a request and a batch take, by requests that shared batches and some that did
    not: lone ones take both, the others a part of a batch each.
    """
    each_ms = taken.loop_ms / taken.requests
    shared = 1 - taken.batches / taken.requests
    batch_ms = (lone.loop_ms / lone.requests - each_ms) / shared if shared > 0 else 0.0
    most_ms = taken.loop_ms / taken.batches if taken.batches else 0.0
    batch_ms = min(max(0.0, batch_ms), most_ms)
    request_ms = (taken.loop_ms - batch_ms * taken.batches) / taken.requests
    return Demand(request_ms, batch_ms, taken.slower)
