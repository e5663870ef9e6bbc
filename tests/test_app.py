"""The HTTP interface, in process: every call, and every way to get it wrong."""

import gzip
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from maestro_core import artifact
from server.app import create_app
from server.engine import Engine
from server.errors import ForbiddenError
from server.protocol import PARAMETERS
from server.routes import check_admin
from server.settings import Settings, read_settings
from tests.conftest import TINY_RANKS, tiny_contents, tiny_manifest

Client = TestClient
LIMIT_BYTES = 200_000
HERE = "http://127.0.0.1"  # admin calls are for this name while no token is set
SAMPLE = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    root = tmp_path_factory.mktemp("app")
    artifact.save(root / "tiny.maestro", tiny_manifest(), tiny_contents())
    return Settings(
        artifact=root / "tiny.maestro",
        state_dir=root / "state",
        threads=1,
        max_batch=4,
        max_body_bytes=LIMIT_BYTES,
        calibration_budget_s=5.0,  # a busy machine measures batches of one only in less
    )


def wait_until_ready(client: Client) -> None:
    for _ in range(1000):
        if client.get("/v2/health/ready").status_code == 200:
            return
        time.sleep(0.01)
    pytest.fail("the server did not become ready")


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[Client]:
    # As a client on this machine: admin calls are for those while no token is set.
    with TestClient(create_app(settings), client=("127.0.0.1", 50000), base_url=HERE) as client:
        wait_until_ready(client)
        yield client


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, 200).save(file, "PNG")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def infer(client: Client, query: str = "", **fields: Any) -> dict[str, Any]:
    response = client.post(f"/infer{query}", json={"inputs": SAMPLE.tolist(), **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def check_problem(response: Any, status: int, text: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["error"] == problem["detail"]
    assert text in problem["detail"]
    return problem


def test_without_a_target_the_most_accurate_point_answers(client: Client) -> None:
    answer = infer(client)

    assert answer["point"] == len(TINY_RANKS) - 1
    assert answer["accuracy"] == 0.9
    assert answer["ranks"] == {"conv": 6, "fc": 10}
    assert answer["target_met"] is None
    assert np.argmax(answer["outputs"][0]) == int(answer["labels"][0])
    assert answer["total_ms"] >= answer["queue_ms"] + answer["compute_ms"] > 0


def test_json_picture_npy_and_form_are_one_input(client: Client) -> None:
    pixel = (200 / 255 - 0.5) / 0.25
    x = np.full((1, 1, 8, 8), pixel, np.float32)
    bodies: list[dict[str, Any]] = [
        {"json": {"inputs": x.tolist()}},
        {"content": png(), "headers": {"content-type": "image/png"}},
        {"content": npy(x), "headers": {"content-type": "application/x-npy"}},
        {"files": {"file": ("picture.png", png(), "image/png")}},
        {"files": {"file": ("picture.png", png(), "Image/PNG; charset=binary")}},
    ]

    outputs = [client.post("/infer", **body).json()["outputs"] for body in bodies]

    for output in outputs:
        np.testing.assert_allclose(output, outputs[0], rtol=1e-5)


def test_a_request_for_a_point_gets_that_point(client: Client) -> None:
    for point in range(len(TINY_RANKS)):
        assert infer(client, f"?point={point}")["point"] == point


def test_several_samples_are_answered_in_order(client: Client) -> None:
    samples = [SAMPLE, -SAMPLE, 2 * SAMPLE]
    alone = [infer(client, inputs=s.tolist())["outputs"][0] for s in samples]

    together = infer(client, inputs=[s.tolist() for s in samples])

    np.testing.assert_allclose(together["outputs"], alone, rtol=1e-4, atol=1e-3)
    assert len(together["labels"]) == 3


def test_top_k_has_labels_and_shares(client: Client) -> None:
    answer = infer(client, "?top_k=3")

    (top,) = answer["top"]
    assert top[0]["label"] == answer["labels"][0]
    assert [entry["index"] for entry in top] == np.argsort(answer["outputs"][0])[::-1][:3].tolist()
    assert 0.99 < sum(entry["score"] for entry in top) <= 1.000001


def test_a_target_may_come_by_query_body_and_header(client: Client) -> None:
    headers = {"x-max-latency-ms": "300"}
    body = {"inputs": SAMPLE.tolist(), "max_latency_ms": 200}

    response = client.post("/infer?max_latency_ms=400", json=body, headers=headers)

    assert response.json()["max_latency_ms"] == 200


def test_the_smallest_of_targets_given_alike_binds(client: Client) -> None:
    body = {"inputs": SAMPLE.tolist()}
    own = [("x-max-latency-ms", "900"), ("x-max-latency-ms", "300"), ("x-max-latency-ms", "400")]
    gateways = [("x-envoy-expected-rq-timeout-ms", ms) for ms in ("800", "0", "soon", "200")]

    for query, headers, target_ms in (
        ("?max_latency_ms=500&max_latency_ms=5000", [], 500),
        ("?max_latency_ms=5000&max_latency_ms=500", own, 300),
        ("", [("x-max-latency-ms", "900, 300")], 300),
        ("", own + gateways, 200),
    ):
        answer = client.post(f"/infer{query}", json=body, headers=headers)
        assert answer.json()["max_latency_ms"] == target_ms
    wrong = client.post("/infer", json=body, headers=[*own, ("x-max-latency-ms", "soon")])
    check_problem(wrong, 422, "max_latency_ms: ")
    check_problem(client.post("/infer?point=1&point=2", json=body), 422, "point: given as '1'")


def test_the_other_fields_of_a_form_are_parameters(client: Client) -> None:
    file = {"file": ("picture.png", png(), "image/png")}

    fields = {"max_latency_ms": ["900", "400"], "point": "1", "top_k": "2"}
    answer = client.post("/infer?max_latency_ms=600&point=2", data=fields, files=file).json()

    assert (answer["max_latency_ms"], answer["point"], len(answer["top"][0])) == (400, 1, 2)
    for wrong, text in (
        ({"max_latency": "5"}, "unknown parameter 'max_latency'"),
        ({"max_latency_ms": "soon"}, "max_latency_ms: "),
        ({"point": ["1", "2"]}, "point: given as '1' and as '2'"),
    ):
        check_problem(client.post("/infer", data=wrong, files=file), 422, text)


def test_an_impossible_target_is_degraded_or_refused(client: Client) -> None:
    degraded = infer(client, "?max_latency_ms=0.001")
    assert degraded["point"] == 0
    assert degraded["target_met"] is False

    refused = client.post(
        "/infer?max_latency_ms=0.001&on_miss=reject", json={"inputs": SAMPLE.tolist()}
    )
    problem = check_problem(refused, 422, "the fastest needs")
    assert problem["min_feasible_ms"] > 0.001
    assert problem["reason"] == "infeasible"


def test_min_accuracy_is_a_floor(client: Client) -> None:
    answer = infer(client, "?max_latency_ms=0.001&min_accuracy=0.75")
    assert answer["accuracy"] >= 0.75

    refused = client.post("/infer?min_accuracy=0.95", json={"inputs": SAMPLE.tolist()})
    check_problem(refused, 422, "min_accuracy is 0.95; the best is 0.9")


def test_the_times_are_a_header_too(client: Client) -> None:
    response = client.post("/infer", json={"inputs": SAMPLE.tolist()})

    timing = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    answer = response.json()
    assert {name: float(ms) for name, ms in timing.items()} == {
        name: answer[f"{name}_ms"] for name in ("queue", "compute", "total")
    }


def test_the_file_of_a_form_is_written_to_no_disk(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = json.dumps({"inputs": SAMPLE.tolist()}).encode() + b" " * 2**21
    larger = settings.model_copy(update={"max_body_bytes": 2 * len(body)})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))

    with TestClient(create_app(larger), raise_server_exceptions=False) as client:
        wait_until_ready(client)
        answer = client.post("/infer", files={"file": ("x.json", body, "application/json")})

    assert answer.status_code == 200, answer.text


def test_a_form_is_read_in_utf8_whatever_its_client_says(client: Client) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="!"'
    body = head + b"\r\n\r\n" + 100_000 * b"A" + b"\r\n"  # as punycode, seconds to decode
    body += head + b'; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + png() + b"\r\n--x--"
    kind = 'multipart/form-data; boundary="x"; charset=punycode'

    began_s = time.monotonic()
    response = client.post("/infer", content=body, headers={"content-type": kind})

    check_problem(response, 422, "unknown parameter '!'")
    assert time.monotonic() - began_s < 1.0


@pytest.mark.parametrize(
    ("body", "kind", "status", "text"),
    [
        (b"", "application/json", 400, "the body is empty"),
        (b"", "image/png", 400, "the body is empty"),
        (b'{"inputs"', "application/json", 400, "not JSON"),
        (b'{"inputs": [[NaN]]}', "application/json", 400, "not JSON"),
        (b'{"inputs": [[1, 2]]}', "application/json", 422, "x: shape [1, 2]"),
        (b'{"inputs": 1, "max_latency": 3}', "application/json", 422, "x: shape []"),
        (b"not a picture", "image/jpeg", 400, "neither a PNG nor a JPEG"),
        (npy(np.full((1, 8, 8), np.nan)), "application/x-npy", 422, "NaN"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "send application/json, image/png"),
        (b"abc", "", 415, "is not served"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 422, "the form holds no file"),
        (b"broken", "multipart/form-data", 400, "the form cannot be read"),
    ],
)
def test_a_bad_body_gets_one_clear_error(
    client: Client, body: bytes, kind: str, status: int, text: str
) -> None:
    response = client.post("/infer", content=body, headers={"content-type": kind})

    check_problem(response, status, text)
    infer(client)


@pytest.mark.parametrize("path", ["/infer", "/explain", "/profile", "/v2/models/tiny/infer"])
@pytest.mark.parametrize("encoding", ["gzip", "identity, br"])
def test_a_body_that_is_coded_is_refused_by_its_coding(
    client: Client, path: str, encoding: str
) -> None:
    response = client.post(
        path, content=gzip.compress(b"{}"), headers={"content-encoding": encoding}
    )

    check_problem(response, 415, f"content-encoding '{encoding}' is not served")
    assert response.headers["accept-encoding"] == "identity"


def test_a_body_that_is_said_not_to_be_coded_is_read(client: Client) -> None:
    headers = {"content-type": "image/png", "content-encoding": "Identity"}

    assert client.post("/infer", content=png(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("max_latency_ms=-1", "max_latency_ms"),
        ("max_latency_ms=0", "max_latency_ms"),
        ("max_latency_ms=nan", "max_latency_ms"),
        ("max_latency_ms=1e12", "max_latency_ms"),
        ("max_latency_ms=fast", "max_latency_ms"),
        ("max_latency=5", "unknown parameter 'max_latency'"),
        ("point=99", "point must be in 0..4, not 99"),
        ("top_k=0", "top_k"),
    ],
)
def test_a_bad_parameter_gets_one_clear_error(client: Client, query: str, text: str) -> None:
    response = client.post(f"/infer?{query}", json={"inputs": SAMPLE.tolist()})

    check_problem(response, 422, text)


def test_more_samples_than_a_batch_are_refused_with_the_limit(client: Client) -> None:
    response = client.post("/infer", json={"inputs": [SAMPLE.tolist()] * 5})

    check_problem(response, 422, "a request has 1..4 samples, not 5")


def test_a_huge_body_is_refused_before_it_is_read(client: Client) -> None:
    known = client.post("/infer", content=bytes(LIMIT_BYTES + 1))
    check_problem(known, 413, f"over {LIMIT_BYTES} bytes")
    unknown = client.post("/infer", content=(bytes(LIMIT_BYTES // 4) for _ in range(6)))
    check_problem(unknown, 413, f"over {LIMIT_BYTES} bytes")


def test_the_frontier_lists_every_point_with_latency(client: Client) -> None:
    frontier = client.get("/frontier?batch=2").json()

    assert [row["point"] for row in frontier["points"]] == list(range(len(TINY_RANKS)))
    assert all(0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in frontier["points"])
    assert all(0 < r["p50_low_ms"] <= r["p50_ms"] <= r["p50_high_ms"] for r in frontier["points"])
    assert frontier["points"][-1]["on_frontier"]
    check_problem(client.get("/frontier?batch=9"), 422, "batch 9 is not profiled; sizes are 1..4")
    check_problem(client.get("/frontier?batch=0"), 422, "batch: ")
    check_problem(client.get("/frontier?batch=1&batch=2"), 422, "batch: given as '1' and as '2'")


def test_a_calibration_is_a_job_and_serving_goes_on(client: Client) -> None:
    before = client.get("/profile").json()
    started = client.post("/profile", json={"kind": "quick"})
    assert started.status_code == 202
    location = started.headers["location"]

    infer(client)
    check_problem(client.post("/profile"), 409, "is running")
    for _ in range(2000):
        job = client.get(location).json()
        if job["state"] != "running":
            break
        time.sleep(0.01)

    assert job["state"] == "done"
    assert job["done"] == job["total"] == len(TINY_RANKS) * 3 or job["seconds_left"] == 0
    after = client.get("/profile").json()
    assert before["source"] == after["source"] == "measured"
    assert after["profile"]["measured_at"] >= before["profile"]["measured_at"]
    infer(client)


def test_a_calibration_can_be_cancelled(client: Client) -> None:
    location = client.post("/profile").headers["location"]

    client.delete(location)
    for _ in range(1000):
        if client.get(location).json()["state"] != "running":
            break
        time.sleep(0.01)

    assert client.get(location).json()["state"] == "cancelled"
    infer(client)


def test_an_unknown_job_is_not_found(client: Client) -> None:
    check_problem(client.get("/profile/jobs/none"), 404, "no calibration 'none'")
    check_problem(client.delete("/profile/jobs/none"), 404, "no calibration 'none'")


def test_explain_tells_the_choice_and_runs_nothing(client: Client) -> None:
    before = client.get("/v2/models/stats").json()
    relaxed = client.post("/explain?max_latency_ms=1000").json()
    tight = client.post("/explain", json={"max_latency_ms": 0.001}).json()
    refused = client.post("/explain", json={"max_latency_ms": 0.001, "on_miss": "reject"}).json()

    assert relaxed["point"] == infer(client, "?max_latency_ms=1000")["point"] == 4
    assert [verdict["why"] for verdict in relaxed["points"]] == ["feasible"] * 5
    assert tight["point"] == 0
    assert "no allowed point makes the target" in tight["why"]
    assert not any(verdict["feasible"] for verdict in tight["points"])
    assert refused["point"] is None
    assert refused["refusal"]["min_feasible_ms"] > 0.001
    after = client.get("/v2/models/stats").json()["model_stats"][0]
    assert after["inference_count"] == before["model_stats"][0]["inference_count"] + 1
    check_problem(client.post("/explain?max_latency_ms=-1"), 422, "max_latency_ms")
    check_problem(client.post("/explain", content=b"["), 400, "not JSON")


def test_unknown_paths_and_methods_are_problems_too(client: Client) -> None:
    check_problem(client.get("/nothing"), 404, "Not Found")
    check_problem(client.get("/infer"), 405, "Method Not Allowed")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/infer", "POST"),
        ("PUT", "/profile", "GET, POST"),
        ("POST", "/profile/jobs/1", "DELETE, GET"),
        ("POST", "/livez", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("GET", "/v2/models/tiny/infer", "POST"),
        ("PUT", "/v2/models/other/versions/1/infer", "POST"),
        ("POST", "/", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_answered_with_those_allowed(
    client: Client, method: str, path: str, allowed: str
) -> None:
    response = client.request(method, path)

    check_problem(response, 405, "Method Not Allowed")
    assert response.headers["allow"] == allowed


def test_what_to_calibrate_is_checked(client: Client) -> None:
    for wrong, text in (
        (b'{"kind": "endless"}', "kind: "),
        (b'{"search": 1}', "search: "),
        (b'{"budget": 1}', "budget: "),
        (b"[]", "must be a JSON object"),
    ):
        check_problem(client.post("/profile", content=wrong), 422, text)
    for query, text in (
        ("kind=endless", "kind: "),
        ("search=1", "search: "),
        ("kind=quick&kind=full", "kind: given as 'quick' and as 'full'"),
        ("budget=1", "budget: "),
    ):
        response = client.post(f"/profile?{query}", json={"kind": "quick", "search": False})
        check_problem(response, 422, text)
    check_problem(client.post("/profile", content=b"{"), 400, "not JSON")
    check_problem(client.post("/profile", content=bytes(LIMIT_BYTES + 1)), 413, "bytes")


def test_calibrating_is_for_this_machine_or_for_the_token(settings: Settings) -> None:
    with TestClient(create_app(settings), client=("10.0.0.9", 1)) as elsewhere:
        check_problem(elsewhere.post("/profile"), 403, "MAESTRO_ADMIN_TOKEN")
    with TestClient(create_app(settings), client=("127.0.0.1", 1), base_url=HERE) as here:
        wait_until_ready(here)
        foreign = here.post("/profile", headers={"origin": "https://elsewhere.example"})
        check_problem(foreign, 403, "pages of other sites")
        rebound = here.post("/profile", headers={"host": "elsewhere.example"})
        check_problem(rebound, 403, "other than localhost")
        own = here.post("/profile", headers={"origin": HERE})
        assert own.status_code == 202
        here.delete(own.headers["location"])

    assert Settings(admin_token="").admin_token is None
    for unsendable in ("s3\ncret", "s3\rcret", "s3\0cret"):
        with pytest.raises(ValueError, match="no header can hold") as caught:
            read_settings(admin_token=unsendable)
        assert "s3" not in str(caught.value)
    guarded = settings.model_copy(
        update={"admin_token": Settings(admin_token="s3cret\n").admin_token}
    )
    with TestClient(create_app(guarded), client=("127.0.0.1", 1), base_url=HERE) as client:
        wait_until_ready(client)
        check_problem(client.post("/profile"), 401, "Authorization")
        for wrong in ("Bearer wrong", "Basic s3cret", "s3cret", "Bearers3cret"):
            refused = client.post("/profile", headers={"authorization": wrong})
            check_problem(refused, 401, "Authorization")
        for right in ("Bearer s3cret", "bearer  s3cret"):
            started = client.post("/profile", headers={"authorization": right})
            assert started.status_code in (202, 409)


def test_openapi_says_which_calls_take_the_token(settings: Settings) -> None:
    def secured(own: Settings) -> set[tuple[str, str]]:
        paths = create_app(own).openapi()["paths"]
        return {
            (path, name)
            for path, calls in paths.items()
            for name, call in calls.items()
            if call.get("security")
        }

    token = Settings(admin_token="s3cret").admin_token
    assert secured(settings) == set()
    assert secured(settings.model_copy(update={"admin_token": token})) == {
        ("/profile", "post"),
        ("/profile/jobs/{job_id}", "delete"),
    }


def test_an_admin_token_may_hold_any_letters(settings: Settings) -> None:
    token = "pä€ß à"  # of UTF-8, its last byte is one that text takes for a space
    guarded = settings.model_copy(update={"admin_token": Settings(admin_token=token).admin_token})
    with TestClient(create_app(guarded), client=("127.0.0.1", 1), base_url=HERE) as client:
        wait_until_ready(client)
        for sent, status in ((token, 202), ("pä€ß", 401)):
            authorization = f"Bearer {sent}".encode()
            answer = client.post("/profile", headers={b"authorization": authorization})
            assert answer.status_code == status


HOSTS = [
    ("localhost", True),
    ("LOCALHOST:8000", True),
    ("maestro.localhost:", True),
    ("127.0.0.1:8000", True),
    ("[::1]", True),
    ("[::1]:8000", True),
    ("elsewhere.example", False),
    ("localhost.elsewhere.example", False),
    ("[::1]x", False),
    ("[", False),
    ("[]", False),
    ("[127.0.0.1]", False),
    ("::1", False),
    ("caf\xe9.com", False),
    ("localhost@elsewhere.example", False),
    ("localhost:8000:1", False),
    ("", False),
    (None, False),
]


@pytest.mark.parametrize(("host", "is_here"), HOSTS)
def test_an_admin_call_is_for_this_machine_by_a_name_that_is_its_own(
    host: str | None, is_here: bool
) -> None:
    headers = [] if host is None else [(b"host", host.encode("latin-1"))]

    assert is_allowed(headers) is is_here
    assert not is_allowed([*headers, (b"host", b"localhost"), (b"host", b"localhost")])


@pytest.mark.parametrize("origin", ["http://[", "null", "", "http://elsewhere.example"])
def test_an_admin_call_is_not_for_pages_of_other_sites(origin: str) -> None:
    assert is_allowed([(b"host", b"localhost"), (b"origin", b"http://localhost")])
    assert not is_allowed([(b"host", b"localhost"), (b"origin", origin.encode())])


def is_allowed(headers: list[tuple[bytes, bytes]]) -> bool:
    scope = {
        "type": "http",
        "scheme": "http",
        "path": "/profile",
        "query_string": b"",
        "headers": headers,
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
    }
    try:
        check_admin(Request(scope), Settings(admin_token=None))
    except ForbiddenError:
        return False
    return True


def test_a_stored_profile_makes_a_second_start_ready_at_once_and_warm(
    client: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/v2/health/ready").status_code == 200
    ran: list[int] = []
    run = Engine.run

    def counting(engine: Engine, x: np.ndarray, point: int) -> np.ndarray:
        ran.append(point)
        return run(engine, x, point)

    monkeypatch.setattr(Engine, "run", counting)

    with TestClient(create_app(settings)) as second:
        assert second.get("/v2/health/ready").json() == {"live": True, "ready": True}
        assert second.get("/profile").json()["source"] == "stored"
        assert sorted(ran) == list(range(len(TINY_RANKS)))


def test_samples_that_only_the_profile_has_no_batches_for_are_refused_with_the_cause(
    client: Client, settings: Settings
) -> None:
    assert client.get("/v2/health/ready").status_code == 200
    larger = settings.model_copy(update={"max_batch": 8})
    with TestClient(create_app(larger)) as second:
        five = second.post("/infer", json={"inputs": [SAMPLE.tolist()] * 5})
        nine = second.post("/infer", json={"inputs": [SAMPLE.tolist()] * 9})

    check_problem(five, 422, "1..4 samples, not 5: this host's profile has no larger batches yet")
    check_problem(nine, 422, "a request has 1..4 samples, not 9")
    assert "profile" not in nine.json()["detail"]


def test_before_the_first_profile_it_lives_but_is_not_ready(
    settings: Settings, tmp_path: Path
) -> None:
    fresh = settings.model_copy(update={"state_dir": tmp_path, "calibration_budget_s": 60.0})
    with TestClient(create_app(fresh)) as client:
        assert client.get("/livez").json()["live"] is True
        ready = client.get("/readyz")
        response = client.post("/infer", json={"inputs": SAMPLE.tolist()})

    assert ready.status_code == 503
    assert ready.json()["calibration"]["state"] == "running"
    check_problem(response, 503, "calibrating this host")
    assert int(response.headers["retry-after"]) >= 1


def test_a_stored_profile_that_lacks_points_is_measured_anew(
    settings: Settings, tmp_path: Path
) -> None:
    fresh = settings.model_copy(update={"state_dir": tmp_path, "calibration_budget_s": 0.2})
    with TestClient(create_app(fresh)) as client:
        wait_until_ready(client)
    (stored,) = tmp_path.glob("profiles/*/profile.json")
    fields = json.loads(stored.read_text())
    first = [entry for entry in fields["latencies"] if entry["point"] == 0]
    stored.write_text(json.dumps({**fields, "latencies": first, "dominated": []}))

    with TestClient(create_app(fresh)) as client:
        wait_until_ready(client)
        assert client.get("/profile").json()["source"] == "measured"


def test_a_state_directory_that_cannot_be_written_is_no_obstacle(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    odd = settings.model_copy(update={"state_dir": tmp_path / "file", "calibration_budget_s": 0.2})
    with TestClient(create_app(odd)) as client:
        wait_until_ready(client)
        infer(client)


def counted(client: Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize(("path", "inferences"), [("/infer", 1), ("/explain", 0)])
def test_clients_that_hang_up_are_counted_where_they_asked_for_an_inference(
    path: str, inferences: int, client: Client
) -> None:
    key = 'maestro_requests_total{"outcome": "client-gone", "point": ""}'
    asked = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}

    async def hang_up() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        pass

    async def ask() -> None:
        await client.app(asked, hang_up, send)

    before = counted(client)
    assert client.portal is not None
    client.portal.call(ask)

    assert counted(client).get(key, 0) == before.get(key, 0) + inferences


def test_metrics_are_readable_and_count(client: Client) -> None:
    before = counted(client)
    infer(client, "?point=2&max_latency_ms=3000")
    client.post("/infer", content=b"", headers={"content-type": "image/png"})
    infer(client, "?max_latency_ms=0.001")
    client.post("/infer?max_latency_ms=0.001&on_miss=reject", json={"inputs": SAMPLE.tolist()})
    after = counted(client)

    for labels in ({"outcome": "ok", "point": "2"}, {"outcome": "bad-request", "point": ""}):
        key = f"maestro_requests_total{json.dumps(labels, sort_keys=True)}"
        assert after[key] == before.get(key, 0) + 1
    assert after["maestro_ready{}"] == 1
    for key in (
        'maestro_missed_total{"cause": "infeasible"}',
        'maestro_shed_total{"reason": "infeasible"}',
    ):
        assert after[key] == before.get(key, 0) + 1
    count = "maestro_latency_seconds_count{}"
    assert after[count] == before[count] + 2
    decisions = "maestro_decision_seconds_count{}"
    assert after[decisions] >= before[decisions] + 2


@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/1"])
def test_the_model_is_described_as_the_protocol_has_it(client: Client, path: str) -> None:
    assert client.get(path).json() == {
        "name": "tiny",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}],
    }
    assert client.get(f"{path}/config").json() == {
        "name": "tiny",
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": 4,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [1, 8, 8]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [10]}],
    }
    check_problem(client.get(path.replace("tiny", "other")), 404, "no model 'other'")
    check_problem(client.get("/v2/models/tiny/versions/2"), 404, "no version '2'")


def test_openapi_describes_the_calls(client: Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    assert {"/infer", "/profile", "/frontier", "/metrics", "/v2/health/live"} <= set(paths)
    names = [parameter["name"] for parameter in paths["/infer"]["post"]["parameters"]]
    assert names == ["max_latency_ms", "min_accuracy", "on_miss", "point", "priority", "top_k"]
    assert client.get("/docs").status_code == 200


def test_openapi_describes_errors_as_they_are_answered(client: Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    wrong = client.get("/frontier?batch=0")
    (described,) = paths["/frontier"]["get"]["responses"]["default"]["content"].items()

    assert described[0] == wrong.headers["content-type"]
    assert set(described[1]["schema"]["required"]) <= wrong.json().keys()
    for calls in paths.values():
        for call in calls.values():
            assert call["responses"]["default"]["content"].keys() == {described[0]}


def test_openapi_says_what_each_parameter_is_for_and_names_none_that_is_refused(
    client: Client,
) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    for calls in paths.values():
        for call in calls.values():
            for parameter in call.get("parameters", []):
                assert parameter["in"] == "path" or parameter["description"]
    infer = paths["/v2/models/{model}/infer"]["post"]["parameters"]
    assert [p["name"] for p in infer] == ["model", *PARAMETERS]
    (model,) = paths["/v2/models/{model}"]["get"]["parameters"]
    assert model["name"] == "model"


def test_the_app_is_made_without_side_effects(settings: Settings) -> None:
    assert isinstance(create_app(settings), FastAPI)
