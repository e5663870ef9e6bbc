"""What is counted later: some together, soon enough, and one that fails holds up none."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from server.answers import Inference
from server.counting import LATER_S, TOGETHER, Counting


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
        await asyncio.sleep(2 * LATER_S)
        counting.answered(inference, 2.0, None)
        await asyncio.sleep(2 * LATER_S)

    asyncio.run(serve())

    assert counted == [2.0]


def test_so_many_are_counted_together_and_few_after_a_while() -> None:
    counted: list[float] = []
    metrics: Any = SimpleNamespace(decided=counted.append)
    seen: list[int] = []

    async def serve() -> None:
        counting = Counting(metrics, SimpleNamespace())  # type: ignore[arg-type]
        for number in range(TOGETHER):
            counting.decided(float(number))
        seen.append(len(counted))  # none while they are made
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        seen.append(len(counted))
        counting.decided(-1.0)
        await asyncio.sleep(0)
        seen.append(len(counted))
        await asyncio.sleep(2 * LATER_S)
        seen.append(len(counted))

    asyncio.run(serve())

    assert seen == [0, TOGETHER, TOGETHER, TOGETHER + 1]
    assert counted == [*map(float, range(TOGETHER)), -1.0]
