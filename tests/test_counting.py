"""What is counted later: a count that fails holds up none after it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from server.answers import Inference
from server.counting import Counting


def test_a_count_that_fails_holds_up_none_after_it() -> None:
    counted: list[float] = []

    def fail(_: float) -> None:
        raise RuntimeError("no space for another series")

    metrics: Any = SimpleNamespace(
        decided=fail, answered=lambda _inference, total_ms, _target: counted.append(total_ms)
    )
    statistics: Any = SimpleNamespace(answered=lambda _answers: None)
    inference = Inference(np.zeros((1, 10), np.float32), 0, 1.0, 0.0, 1.0, 1)

    async def serve() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        counting = Counting(metrics, statistics)
        counting.decided(1e-5)
        counting.answered(inference, 1.0, None)  # in the flush that fails
        for _ in range(3):
            await asyncio.sleep(0)
        counting.answered(inference, 2.0, None)
        for _ in range(3):
            await asyncio.sleep(0)

    asyncio.run(serve())

    assert counted == [2.0]
