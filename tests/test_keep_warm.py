"""A server that nobody asks goes through requests of its own: answered, not computed, uncounted."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from maestro_core import artifact
from maestro_core.artifact import Artifact
from server.dispatcher import Dispatcher
from server.engine import Engine
from server.errors import OutOfTimeError
from server.keep_warm import keep_warm, sender
from server.latencies import Latencies
from server.scheduler import Scheduler
from server.service import Service
from server.stand_in import Nothing, StandIn
from server.worker import Turns
from tests.conftest import tiny_contents, tiny_manifest, tiny_settings
from tests.server_process import running_server

EVERY_S = 0.01
LIMIT_S = 60.0


@contextmanager
def standing_in(points: Artifact, ms: float = 0.5) -> Iterator[StandIn]:
    """Yield who stands in for a server of `points` that take `ms` each."""
    table = ((ms,),) * len(points.points)
    latencies = Latencies(tuple(point.score.value for point in points.points), table, table)
    stand_in = StandIn(points, Dispatcher(Scheduler(latencies), Nothing(points), Turns()))
    try:
        yield stand_in
    finally:
        stand_in.close()


@dataclass
class Fake:
    """A service as the loop that keeps it warm sees it."""

    stand_in: Any
    quiet: bool = True
    asked_s: list[float] = field(default_factory=list)

    def is_quiet(self, seconds: float) -> bool:
        self.asked_s.append(seconds)
        return self.quiet


async def warmed_until(service: Fake, is_enough: Callable[[], bool]) -> None:
    """Keep a service warm until that is enough."""
    warming = asyncio.create_task(keep_warm(service, EVERY_S))  # type: ignore[arg-type]
    async with asyncio.timeout(LIMIT_S):
        while not is_enough():
            await asyncio.sleep(EVERY_S)
    warming.cancel()


async def ready(service: Service) -> None:
    """Start a service, and return once it is ready."""
    await service.start()
    async with asyncio.timeout(LIMIT_S):
        while not service.is_ready:
            await asyncio.sleep(EVERY_S)


class Counted:
    """Stands in, and counts the inferences that begin."""

    def __init__(self, stand_in: StandIn) -> None:
        self.artifact, self.counting = stand_in.artifact, stand_in.counting
        self._stand_in, self.begun = stand_in, 0

    def serving(self) -> object:
        return self

    def begin(self, *given: Any) -> Any:
        self.begun += 1
        return self._stand_in.begin(*given)


@pytest.mark.parametrize("ms", [0.5, 20.0])  # on the event loop, and in a thread
@pytest.mark.parametrize("takes", ["pictures", "large pictures", "numbers"])
def test_a_request_of_its_own_is_answered(tmp_path: Path, ms: float, takes: str) -> None:
    points = artifact.save(tmp_path / "tiny.maestro", tiny_manifest(), tiny_contents())
    tensor = points.manifest.input
    if takes == "numbers":
        tensor = replace(tensor, image=None)
    elif takes == "large pictures":
        assert tensor.image is not None
        image = replace(tensor.image, height=1200, width=1200)
        tensor = replace(tensor, shape=(-1, 1, 1200, 1200), image=image)
    points = replace(points, manifest=replace(points.manifest, input=tensor))

    async def run() -> list[bytes]:
        with standing_in(points, ms) as stand_in:
            send = sender(stand_in)
            return [await send() for _ in range(3)]

    for answer in asyncio.run(run()):
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b'"target_met":true' in answer


def test_it_is_sent_while_the_server_is_quiet(tiny_artifact: Artifact) -> None:
    async def begun(quiet: bool) -> int:
        with standing_in(tiny_artifact) as stand_in:
            counted = Counted(stand_in)
            service = Fake(counted, quiet)
            await warmed_until(service, lambda: len(service.asked_s) >= 5)
            assert set(service.asked_s) == {EVERY_S}
            return counted.begun

    assert asyncio.run(begun(quiet=True)) >= 4
    assert asyncio.run(begun(quiet=False)) == 0


def test_one_that_takes_long_is_sent_less_often(tiny_artifact: Artifact) -> None:
    class Slow(Counted):
        def begin(self, *given: Any) -> Any:
            time.sleep(0.1)
            return super().begin(*given)

    async def begun() -> int:
        with standing_in(tiny_artifact) as stand_in:
            slow, began_s = Slow(stand_in), time.monotonic()
            await warmed_until(Fake(slow), lambda: time.monotonic() > began_s + 1.0)
            return slow.begun

    assert asyncio.run(begun()) == 1  # the next would be 2 s later


def test_it_goes_by_the_profile_in_use(tiny_artifact: Artifact) -> None:
    async def run() -> None:
        with standing_in(tiny_artifact) as one, standing_in(tiny_artifact) as other:
            before, after = Counted(one), Counted(other)
            service = Fake(before)

            def is_enough() -> bool:
                if before.begun and service.stand_in is before:
                    service.stand_in = after
                    so_far.append(before.begun)
                return after.begun > 1

            await warmed_until(service, is_enough)
            assert [before.begun] == so_far

    so_far: list[int] = []
    asyncio.run(run())


def test_one_that_fails_is_the_last_and_the_log_says_why(
    tiny_artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Counted):
        def begin(self, *given: Any) -> Any:
            super().begin(*given)
            raise ZeroDivisionError("at the first")

    async def run() -> int:
        with standing_in(tiny_artifact) as stand_in:
            broken = Broken(stand_in)
            fake: Any = Fake(broken)
            await asyncio.wait_for(keep_warm(fake, EVERY_S), LIMIT_S)
            return broken.begun

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(run()) == 1
    assert "not kept warm any more" in caplog.text
    assert "ZeroDivisionError: at the first" in caplog.text


def test_one_that_is_out_of_time_is_not_the_last(
    tiny_artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    class Late(Counted):
        def begin(self, *_: Any) -> Any:
            self.begun += 1
            raise OutOfTimeError("the host stood still", reason="expired")

    async def run() -> None:
        with standing_in(tiny_artifact) as stand_in:
            late = Late(stand_in)
            await warmed_until(Fake(late), lambda: late.begun >= 3)

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert caplog.text == ""


def test_nothing_is_computed_or_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    run = Engine.run

    def noted(engine: Engine, batch: np.ndarray, point: int, *given: Any) -> np.ndarray:
        ran.append(point)
        return run(engine, batch, point, *given)

    async def serve() -> None:
        service = Service(tiny_settings(tmp_path))
        assert service.stand_in is None
        await ready(service)
        stand_in = service.stand_in
        assert stand_in is not None
        monkeypatch.setattr(Engine, "run", noted)
        before = await service.statistics_answer(), await service.metrics_text()
        send = sender(stand_in)
        for _ in range(5):
            assert (await send()).startswith(b"HTTP/1.1 200")
        assert service.is_quiet(0.0)
        assert (await service.statistics_answer(), await service.metrics_text()) == before
        await service.stop()
        assert service.stand_in is None

    asyncio.run(serve())
    assert ran == []


def test_a_server_of_several_workers_counts_none_of_them(tmp_path: Path) -> None:
    points = artifact.save(tmp_path / "tiny.maestro", tiny_manifest(), tiny_contents())
    with running_server(
        tmp_path / "state",
        points.path,
        MAESTRO_WORKERS="2",
        MAESTRO_THREADS="1",
        MAESTRO_KEEP_WARM_MS="5",
        MAESTRO_CALIBRATION_BUDGET_S="5",
    ) as address:
        sample = {"inputs": np.zeros((1, 1, 8, 8)).tolist()}
        assert httpx.post(f"{address}/infer", json=sample).status_code == 200
        asyncio.run(asyncio.sleep(0.5))
        stats = httpx.get(f"{address}/v2/models/tiny/stats").json()["model_stats"][0]
        metrics = httpx.get(f"{address}/metrics").text

    assert (stats["inference_count"], stats["execution_count"]) == (1, 1)
    (count,) = [
        float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("maestro_latency_seconds_count")
    ]
    assert count == 1


def test_it_can_be_left_out(tmp_path: Path) -> None:
    async def stand_in() -> object:
        service = Service(tiny_settings(tmp_path, keep_warm_ms=0))
        await ready(service)
        found = service.stand_in
        await service.stop()
        return found

    assert asyncio.run(stand_in()) is None
