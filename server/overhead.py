"""What a request costs outside the engine, measured with one that computes nothing."""

import time
from statistics import median

import numpy as np
import orjson
from numpy.typing import NDArray

from maestro_core.artifact import Artifact
from server.answers import infer_answer
from server.dispatcher import Dispatcher
from server.latencies import Latencies
from server.requests import Request
from server.scheduler import Scheduler
from server.schemas import InferParameters
from server.worker import Turns

Floats = NDArray[np.float32]

_RUNS = 50


class _Nothing:
    """Computes nothing, at once."""

    def __init__(self, output: Floats) -> None:
        self._output = output

    def run(self, _batch: Floats, _point: int, /) -> Floats:
        return self._output


async def overhead_ms(artifact: Artifact) -> float:
    """Return what an inference usually costs besides queueing and computing, answer included."""
    manifest = artifact.manifest
    x = np.zeros((1, *manifest.input.shape[1:]), np.float32)
    output = np.zeros((1, *manifest.output.shape[1:]), np.float32)
    latencies = Latencies((1.0,), ((1.0,),), ((1.0,),))
    dispatcher = Dispatcher(Scheduler(latencies), _Nothing(output), Turns())
    costs_ms = []
    for i in range(_RUNS):
        began_s = time.monotonic()
        inference = await dispatcher.infer(Request(str(i), began_s), x)
        content = infer_answer(artifact, InferParameters(), inference, 0.0)
        orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        spent_ms = 1e3 * (time.monotonic() - began_s)
        costs_ms.append(spent_ms - inference.compute_ms)
    dispatcher.close()
    return median(costs_ms)
