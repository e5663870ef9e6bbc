"""A server that is asked to look for points of its own, and serves them from then on."""

import asyncio
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from benchmarks.effort import Effort, Precision, Progress
from maestro_core import artifact, held_out, terminal
from maestro_core.frontier import RankTable
from server.app import create_app
from server.engine import EngineError
from server.measuring import Hooks, HostModel
from server.service import Service
from server.settings import Settings
from tests.conftest import tiny_contents, tiny_manifest

X = np.random.default_rng(0).standard_normal((60, 1, 8, 8)).astype(np.float32)
TABLES = (
    RankTable((1, 6), (1.0, 6.0), (3.0, 0.5)),
    RankTable((1, 5, 10), (1.0, 5.0, 10.0), (3.0, 1.6, 0.5)),
)


def settings(root: Path, extra: dict[str, bytes]) -> Settings:
    artifact.save(root / "tiny.maestro", tiny_manifest(), {**tiny_contents(), **extra})
    return Settings(
        artifact=root / "tiny.maestro",
        state_dir=root / "state",
        threads=1,
        max_batch=2,
        calibration_budget_s=1.0,
    )


def test_a_calibration_whose_profile_cannot_be_used_fails(tmp_path: Path) -> None:
    async def run() -> None:
        service = Service(settings(tmp_path, {}))
        await service.start()
        while not service.is_ready:
            await asyncio.sleep(0.01)
        in_use = service.serving().profile
        sizes = len(in_use.batch_sizes)
        wrong = replace(in_use, latencies=in_use.latencies[:sizes], dominated=())

        with pytest.raises(ValueError, match="point"):
            await asyncio.to_thread(service._on_profile, wrong)
        assert service.serving().profile is in_use
        await service.stop()

    asyncio.run(run())


def wait(client: TestClient, location: str) -> str:
    for _ in range(3000):
        state: str = client.get(location).json()["state"]
        if state != "running":
            return state
        time.sleep(0.01)
    pytest.fail("the calibration does not end")


def search(client: TestClient) -> Response:
    """Start a search, once the first calibration has stored what already serves."""
    for _ in range(1000):
        started = client.post("/profile", json={"kind": "quick", "search": True})
        if started.status_code != 409:
            return started
        time.sleep(0.01)
    pytest.fail("the first calibration does not end")


def ready(client: TestClient) -> None:
    for _ in range(1000):
        if client.get("/v2/health/ready").status_code == 200:
            return
        time.sleep(0.01)
    pytest.fail("the server did not become ready")


def test_points_found_are_served_at_once_and_after_a_restart(tmp_path: Path) -> None:
    labels = np.zeros(len(X), np.int64)
    extra = held_out.contents(X, labels, ("conv", "fc"), TABLES)
    app = settings(tmp_path, extra)
    body = {"inputs": X[0].tolist()}

    with TestClient(
        create_app(app), client=("127.0.0.1", 50000), base_url="http://127.0.0.1"
    ) as client:
        ready(client)
        before = client.get("/profile").json()["profile"]["key"]["artifact"]
        started = search(client)
        assert started.json()["seconds_left"] is None
        assert wait(client, started.headers["location"]) == "done"
        after = client.get("/profile").json()["profile"]["key"]["artifact"]
        points = client.get("/frontier").json()["points"]
        answer = client.post("/infer", json=body).json()
    with TestClient(
        create_app(app), client=("127.0.0.1", 50000), base_url="http://127.0.0.1"
    ) as client:
        ready(client)
        again = client.get("/profile").json()

    assert after != before
    assert answer["accuracy"] in [point["accuracy"] for point in points]
    assert (again["source"], again["profile"]["key"]["artifact"]) == ("stored", after)


def test_nobody_is_told_how_long_a_search_still_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = np.zeros(len(X), np.int64)
    given = settings(tmp_path, held_out.contents(X, labels, ("conv", "fc"), TABLES))
    effort = Effort("quick", 1.0, Precision(min_runs=2), search=True)
    left_s: list[float | None] = []

    with caplog.at_level("INFO"), terminal.progress("calibrating", "json") as show:

        def seen(now: Progress) -> None:
            left_s.append(now.left_s)
            show(now)

        HostModel(artifact.load(given.artifact), given).measured(effort, hooks=Hooks(progress=seen))

    trials = next(i for i, seconds in enumerate(left_s) if seconds is not None)
    assert trials > 0
    assert None not in left_s[trials:]
    said = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"calibrating: \d+ of \d+", said[0])
    assert said[-1].endswith(" s at most")


def test_an_artifact_with_nothing_to_search_with_is_refused(tmp_path: Path) -> None:
    with TestClient(
        create_app(settings(tmp_path, {})), client=("127.0.0.1", 50000), base_url="http://127.0.0.1"
    ) as client:
        ready(client)
        refused = client.post("/profile", json={"kind": "quick", "search": True})

    assert refused.status_code == 422
    assert "tiny lacks eval.npz and errors.json" in refused.json()["error"]


def test_a_memory_budget_keeps_what_was_used_last(tmp_path: Path) -> None:
    given = settings(tmp_path, {}).model_copy(update={"memory_budget_mib": 1})
    loaded = artifact.load(given.artifact)

    engine = HostModel(loaded, given).engine(loaded)
    before = engine.resident
    engine.run(X[:1], 2)

    assert before == ()
    assert engine.resident == (2,)
    unbounded = HostModel(loaded, settings(tmp_path, {})).engine(loaded)
    assert set(unbounded.resident) == set(range(5))


def test_a_provider_that_is_not_installed_is_named(tmp_path: Path) -> None:
    given = settings(tmp_path, {}).model_copy(update={"provider": "cuda"})

    model = HostModel(artifact.load(given.artifact), given)

    with pytest.raises(EngineError, match="install onnxruntime-gpu"):
        model.engine(model.source)
