"""Ids of requests: taken where they are well-formed, made where not, returned and logged."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server import tracing
from server.app import create_app
from server.logs import JsonFormatter, TextFormatter, set_up
from server.tracing import CURRENT, Trace, read
from tests.conftest import tiny_settings
from tests.test_app import wait_until_ready

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


def test_a_clients_trace_goes_on_with_a_span_of_our_own() -> None:
    here = read({b"traceparent": f"00-{TRACE}-{SPAN}-01".encode()})

    assert here.trace_id == TRACE
    assert here.span_id != SPAN
    assert here.traceparent == f"00-{TRACE}-{here.span_id}-01"


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "junk",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        "00-" + "é" * 32,
    ],
)
def test_an_ill_formed_trace_is_left_and_a_new_one_begun(parent: str) -> None:
    here = read({b"traceparent": parent.encode()})

    assert PARENT.fullmatch(here.traceparent)
    assert here.trace_id not in (TRACE, "0" * 32)


@pytest.mark.parametrize(("given", "kept"), [("order-17:a_b.c", True), ("a" * 129, False)])
def test_a_request_id_is_kept_if_it_can_be_logged_safely(given: str, kept: bool) -> None:
    assert (read({b"x-request-id": given.encode()}).request_id == given) is kept


@pytest.mark.parametrize("given", ["", "two\nlines", 'a"b', "ä"])
def test_a_request_id_that_could_break_a_log_is_replaced(given: str) -> None:
    made = read({b"x-request-id": given.encode()}).request_id

    assert re.fullmatch("[0-9a-f]{32}", made)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(create_app(tiny_settings(tmp_path, access_log=True))) as client:
        wait_until_ready(client)
        yield client


def test_answers_and_errors_return_the_ids(client: TestClient) -> None:
    headers = {"x-request-id": "r-1", "traceparent": f"00-{TRACE}-{SPAN}-01"}

    for response in (client.get("/livez", headers=headers), client.get("/none", headers=headers)):
        assert response.headers["x-request-id"] == "r-1"
        assert response.headers["traceparent"].startswith(f"00-{TRACE}-")


def test_the_access_log_says_how_it_went_and_nothing_of_the_input(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="server.tracing"):
        client.post("/infer?max_latency_ms=1000", json={"inputs": "secret-input"})
        client.get("/livez?token=secret-query")

    first, second = caplog.records
    assert (first.getMessage(), second.getMessage()) == ("POST /infer", "GET /livez")
    assert (first.facts["status"], second.facts["status"]) == (422, 200)  # type: ignore[attr-defined]
    assert "secret" not in " ".join(TextFormatter().format(record) for record in caplog.records)


def test_a_path_that_could_break_the_access_log_is_in_it_as_it_was_sent(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="server.tracing"):
        client.get("/v2/models/a:b@1%0A2026%20INFO%20made-up%1B")

    (line,) = caplog.records
    assert line.getMessage() == "GET /v2/models/a:b@1%0A2026%20INFO%20made-up%1B"


def record(message: str = "it went", **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("server.x", logging.WARNING, __file__, 1, message, None, None)
    made.__dict__.update(extra)
    return made


def test_a_json_line_is_one_object_with_the_ids() -> None:
    token = CURRENT.set(Trace("r-2", TRACE, SPAN, "01"))
    try:
        line = JsonFormatter().format(record('a "quoted"\nline', facts={"point": 3}))
    finally:
        CURRENT.reset(token)

    assert "\n" not in line
    entry = json.loads(line)
    assert entry["message"] == 'a "quoted"\nline'
    assert (entry["level"], entry["point"]) == ("warning", 3)
    assert (entry["request_id"], entry["trace_id"]) == ("r-2", TRACE)


def test_outside_a_request_a_line_has_no_ids() -> None:
    assert "request_id" not in json.loads(JsonFormatter().format(record()))
    assert TextFormatter().format(record()).endswith("WARNING server.x: it went")


def test_an_exception_is_in_the_object() -> None:
    try:
        raise KeyError("lost")
    except KeyError as error:
        made = record(exc_info=(KeyError, error, error.__traceback__))

    assert "KeyError: 'lost'" in json.loads(JsonFormatter().format(made))["exception"]


def test_a_path_that_is_no_unicode_is_in_the_object() -> None:
    made = record(os.fsdecode(b"/models/caf\xe9") + ": no such directory")

    message = json.loads(JsonFormatter().format(made))["message"]
    assert message == r"/models/caf\udce9: no such directory"


def test_all_logs_of_the_process_take_one_form(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        set_up("json")
        logging.getLogger("elsewhere").info("hello")
        assert json.loads(capsys.readouterr().err)["logger"] == "elsewhere"
    finally:
        logging.getLogger().handlers[:], _ = before
        logging.getLogger().setLevel(before[1])


def test_spans_are_not_sent_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing._EXPORTS:
        monkeypatch.delenv(name, raising=False)

    assert not tracing.export_spans("maestro")


def test_a_missing_extra_is_named() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
from server import tracing
sys.exit(tracing.export_spans("maestro"))
"""
    asked = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}

    run = subprocess.run(
        [sys.executable, "-c", program], env=asked, capture_output=True, text=True, check=False
    )

    assert run.returncode == 0
    assert "pip install -e '.[tracing]'" in run.stderr


def test_each_inference_is_a_span_in_the_clients_trace(client: TestClient) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra 'tracing' is not installed")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    parent = {"traceparent": f"00-{TRACE}-{SPAN}-01"}

    answer = client.post("/infer", json={"inputs": [[[0.0] * 8] * 8]}, headers=parent)

    # FastAPI adds children of its own.
    (span,) = [span for span in spans.get_finished_spans() if span.kind is trace.SpanKind.SERVER]
    assert span.context is not None
    assert span.attributes is not None
    assert (span.name, f"{span.context.trace_id:032x}") == ("POST /infer", TRACE)
    assert answer.headers["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["maestro.point"] == answer.json()["point"]
