"""Errors that nobody foresaw: answered, counted and logged like the others, input left out."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from fastapi import Response
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.logs import TextFormatter
from server.service import Service
from server.unforeseen import Unforeseen
from tests.conftest import tiny_settings
from tests.test_app import SAMPLE, check_problem, wait_until_ready

QUOTED = "secret-input"


class Broken(Service):
    """A service with a defect, whose message quotes the input."""

    async def infer(self, *_: Any) -> NoReturn:
        raise ZeroDivisionError(QUOTED)

    def explain(self, *_: Any) -> NoReturn:
        raise ZeroDivisionError(QUOTED)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root: Path = tmp_path_factory.mktemp("broken")
    settings = tiny_settings(root, access_log=True)
    with TestClient(create_app(settings, Broken(settings))) as client:
        wait_until_ready(client)
        yield client


def counted(client: TestClient) -> tuple[float, int]:
    """Return how many inferences failed so, and how many failed at all."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    internal = sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "maestro_requests_total" and sample.labels["outcome"] == "internal"
    )
    (stats,) = client.get("/v2/models/stats").json()["model_stats"]
    return internal, stats["inference_stats"]["fail"]["count"]


@pytest.mark.parametrize(
    ("path", "is_inference"),
    [
        ("/infer", True),
        ("/v2/models/tiny/infer", True),
        ("/v2/models/tiny/versions/1/infer", True),
        ("/explain", False),
    ],
)
def test_a_defect_is_a_problem_with_the_ids_and_counts(
    client: TestClient, caplog: pytest.LogCaptureFixture, path: str, is_inference: bool
) -> None:
    body: dict[str, Any] = {"inputs": SAMPLE.tolist()}
    if path.startswith("/v2"):
        tensor = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": SAMPLE.tolist()}
        body = {"inputs": [tensor]}
    before = counted(client)

    with caplog.at_level(logging.INFO):
        response = client.post(path, json=body, headers={"x-request-id": "r-7"})

    problem = check_problem(response, 500, "the server failed; its log says where")
    assert problem["type"] == "urn:maestro:internal"
    assert response.headers["x-request-id"] == "r-7"
    assert counted(client) == (before[0] + is_inference, before[1] + is_inference)
    text = "\n".join(TextFormatter().format(record) for record in caplog.records)
    assert "a request ended in ZeroDivisionError:\n" in text
    assert "in infer" in text or "in explain" in text
    assert "status=500" in text
    assert QUOTED not in text


def test_after_an_answer_has_begun_the_error_is_the_servers() -> None:
    async def half(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    app = Unforeseen(half, lambda _: Response(status_code=500))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(app({"type": "http", "path": "/"}, None, send))

    assert [message["status"] for message in sent] == [200]


def test_an_error_of_the_start_is_no_requests() -> None:
    async def app(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(Unforeseen(app, lambda _: Response())({"type": "lifespan"}, None, None))
