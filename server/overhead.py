"""What a request costs outside the engine, measured with inferences that wait for no other.

The engine computes in between, as it empties the caches for all that comes after it, and they come
one by one, to threads that sleep. With an engine that computes nothing, or without a pause, the
rest takes less time.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable
from itertools import cycle

import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.effort import CancelledError
from benchmarks.profiler import Turn, alone
from server.answers import infer_answer
from server.dispatcher import Dispatcher
from server.engine import Engine
from server.errors import UnavailableError
from server.interrupt import Interrupt
from server.latencies import Latencies
from server.requests import Request
from server.scheduler import Scheduler
from server.schemas import InferParameters
from server.worker import Turns

Floats = NDArray[np.float32]

# How long to measure, and the runs to have in any case.
RUNS_S = 0.5
LEAST_RUNS = 5
PAUSE_S = 0.01
# Of the runs. Others that use the cores meanwhile make most of the rest longer, not shorter.
QUANTILE = 0.25


def overhead_ms(
    engine: Engine,
    latencies: Latencies,
    *,
    shares_core: bool = True,
    turn: Turn = alone,
    cancelled: Callable[[], bool] = lambda: False,
) -> float:
    """Return what an inference usually costs besides computing, answer included, in ms.

    Points are tried in random order. Not from within an event loop.

    Raises:
        CancelledError: `cancelled` said so.
        ServiceError: the engine failed.
    """
    return asyncio.run(_overhead_ms(engine, latencies, shares_core, turn, cancelled))


class _Interruptible:
    """The engine, as a trial runs it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.interrupt = Interrupt()

    def run(self, batch: Floats, point: int, _: Interrupt | None = None, /) -> Floats:
        return self._engine.run(batch, point, self.interrupt)


async def _overhead_ms(
    engine: Engine,
    latencies: Latencies,
    shares_core: bool,
    turn: Turn,
    cancelled: Callable[[], bool],
) -> float:
    runner = _Interruptible(engine)
    dispatcher = Dispatcher(Scheduler(latencies), runner, Turns(), shares_core=shares_core)
    x = np.zeros((1, *engine.artifact.manifest.input.shape[1:]), np.float32)
    points = list(range(len(latencies.accuracy)))
    random.Random(0).shuffle(points)
    costs_ms: list[float] = []
    end_s = time.monotonic() + RUNS_S
    try:
        for number, point in enumerate(cycle(points)):
            if cancelled():
                raise CancelledError
            await asyncio.sleep(PAUSE_S)
            with turn(latencies.p50_ms[point][0] / 1e3, math.inf) as runner.interrupt:
                began_s = time.monotonic()
                try:
                    inference = await dispatcher.infer(
                        Request(str(number), began_s, point=point), x
                    )
                except UnavailableError:
                    if runner.interrupt.is_set:
                        continue
                    raise
                content = infer_answer(engine.artifact, InferParameters(), inference, 0.0)
                orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
                costs_ms.append(1e3 * (time.monotonic() - began_s) - inference.compute_ms)
            if len(costs_ms) >= LEAST_RUNS and time.monotonic() >= end_s:
                break
    finally:
        dispatcher.close()
    return float(np.quantile(costs_ms, QUANTILE))
