"""What a request costs outside the engine, with a real engine and with one that only waits."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.effort import CancelledError
from maestro_core.artifact import Artifact
from server import overhead
from server.engine import Engine
from server.interrupt import Interrupt
from server.latencies import Latencies
from server.overhead import LEAST_RUNS, overhead_ms


class WaitingEngine(Engine):
    """An engine that takes 20 ms more for each run, and keeps which points were run."""

    def __init__(self, points: Artifact) -> None:
        super().__init__(points, intra_op_threads=1)
        self.ran: list[int] = []

    def run(
        self, batch: NDArray[np.float32], point: int, interrupt: Interrupt | None = None
    ) -> NDArray[np.float32]:
        output = super().run(batch, point, interrupt)
        self.ran.append(point)
        time.sleep(0.02)
        return output


def latencies(engine: Engine, ms: float) -> Latencies:
    points = engine.artifact.points
    table = ((ms,),) * len(points)
    return Latencies(tuple(point.score.value for point in points), table, table)


@pytest.mark.parametrize("ms", [0.5, 20.0])  # on the event loop, and in a thread
def test_computing_does_not_count(tiny_artifact: Artifact, ms: float) -> None:
    engine = WaitingEngine(tiny_artifact)

    found_ms = overhead_ms(engine, latencies(engine, ms))

    assert 0 < found_ms < 15
    assert set(engine.ran) == set(range(len(tiny_artifact.points)))


def test_a_run_that_a_request_interrupts_is_made_again(
    tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "RUNS_S", 0.0)
    engine = WaitingEngine(tiny_artifact)
    turns = 0

    @contextmanager
    def turn(_takes_s: float, _most_s: float) -> Iterator[Interrupt]:
        nonlocal turns
        turns += 1
        interrupt = Interrupt()
        if turns <= 3:
            interrupt.set()
        yield interrupt

    assert overhead_ms(engine, latencies(engine, 20.0), turn=turn) > 0
    assert len(engine.ran) == LEAST_RUNS
    assert turns == LEAST_RUNS + 3


def test_it_can_be_cancelled(tiny_artifact: Artifact) -> None:
    engine = Engine(tiny_artifact, intra_op_threads=1)

    with pytest.raises(CancelledError):
        overhead_ms(engine, latencies(engine, 1.0), cancelled=lambda: True)
