"""The Open Inference Protocol v2: bytes in, bytes out, and everything that can be wrong."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings, strategies

from maestro_core import artifact
from server import protocol
from server.app import create_app
from server.errors import InvalidError, ServiceError
from server.schemas import parse_parameters
from server.settings import Settings
from tests.conftest import tiny_contents, tiny_manifest
from tests.test_app import check_problem, wait_until_ready

MANIFEST = tiny_manifest()
X = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 1, 8, 8)
PATH = "/v2/models/tiny/infer"


def json_request(**fields: Any) -> dict[str, Any]:
    entry = {"name": "x", "shape": [2, 1, 8, 8], "datatype": "FP32", "data": X.ravel().tolist()}
    return {"inputs": [entry | fields.pop("entry", {})], **fields}


def whole(datatype: str, number: float) -> dict[str, Any]:
    """Return a request with whole numbers but for the last."""
    return json_request(entry={"datatype": datatype, "data": [1] * 127 + [number]})


def binary_request(data: bytes, datatype: str = "FP32", **fields: Any) -> tuple[bytes, str]:
    entry = {
        "name": "x",
        "shape": [2, 1, 8, 8],
        "datatype": datatype,
        "parameters": {"binary_data_size": len(data)},
    }
    text = orjson.dumps({"inputs": [entry], **fields})
    return text + data, str(len(text))


def read(body: bytes, length: str | None = None) -> protocol.Wanted:
    return protocol.read(body, length, MANIFEST.input, MANIFEST.output)


def test_json_and_binary_are_one_input() -> None:
    by_json = read(orjson.dumps(json_request(id="a")))
    by_nested = read(orjson.dumps(json_request(entry={"data": X.tolist()})))
    by_bytes = read(*binary_request(X.tobytes()))
    by_doubles = read(*binary_request(X.astype("<f8").tobytes(), "FP64"))

    for wanted in (by_json, by_nested, by_bytes, by_doubles):
        np.testing.assert_array_equal(wanted.x, X)
    assert by_json.id == "a"


@pytest.mark.parametrize(
    ("datatype", "least", "largest"),
    [("UINT8", 0, 255), ("INT8", -128, 127), ("INT64", -(2**63), 2**63 - 1)],
)
def test_whole_numbers_are_taken_up_to_the_ends_of_their_type(
    datatype: str, least: int, largest: int
) -> None:
    data = [least, largest, 2.0, *[0] * 125]

    wanted = read(orjson.dumps(json_request(entry={"datatype": datatype, "data": data})))

    np.testing.assert_array_equal(wanted.x.ravel(), np.asarray(data, np.float32))


@pytest.mark.parametrize("data", [X.ravel().tolist(), None])
def test_bytes_that_no_input_claims_are_refused(data: list[float] | None) -> None:
    text = orjson.dumps(json_request(entry={"data": data} if data else {}))

    with pytest.raises(ServiceError, match="4 bytes follow the JSON, but 'x' has no bin") as caught:
        read(text + b"1234", str(len(text)))

    assert caught.value.status == 400


def test_a_raw_binary_request_is_one_sample() -> None:
    wanted = read(X[:1].tobytes(), "0")

    np.testing.assert_array_equal(wanted.x, X[:1])
    assert wanted.is_binary


def test_parameters_of_others_are_left_alone() -> None:
    parameters = {"timeout": 25_000, "priority": 1, "max_latency_ms": 30, "triton_x": "y"}

    wanted = read(orjson.dumps(json_request(parameters=parameters)))

    assert wanted.timeout_ms == 25.0
    assert wanted.parameters == {"max_latency_ms": 30, "priority": 1}


def test_null_is_as_if_it_were_not_there() -> None:
    parameters = dict.fromkeys((*protocol.PARAMETERS, "timeout", "binary_data_output"))
    output = {"name": "y", "parameters": {"classification": None, "binary_data": None}}

    wanted = read(orjson.dumps(json_request(id=None, parameters=parameters, outputs=[output])))

    assert (wanted.id, wanted.timeout_ms, wanted.classes, wanted.is_binary) == ("", None, 0, False)
    asked = parse_parameters((), wanted.parameters)
    assert asked == parse_parameters((), {})


def test_answers_in_json_and_binary_hold_the_same_numbers() -> None:
    result = np.linspace(0, 3, 20, dtype=np.float32).reshape(2, 10)
    plain = read(orjson.dumps(json_request(id="7")))
    binary = read(orjson.dumps(json_request(parameters={"binary_data_output": True})))

    text, headers = protocol.write(plain, "m", "1", MANIFEST.output, result, {"point": 3}, None)
    answer = orjson.loads(text)
    assert headers == {"content-type": "application/json"}
    assert (answer["id"], answer["parameters"]) == ("7", {"point": 3})
    np.testing.assert_array_equal(np.float32(answer["outputs"][0]["data"]), result.ravel())

    body, headers = protocol.write(binary, "m", "1", MANIFEST.output, result, {}, None)
    length = int(headers[protocol.JSON_LENGTH])
    (output,) = orjson.loads(body[:length])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(body) - length == result.nbytes
    np.testing.assert_array_equal(np.frombuffer(body[length:], "<f4"), result.ravel())


@pytest.mark.parametrize("is_binary", [False, True])
def test_classification_gives_score_index_and_label(is_binary: bool) -> None:
    wish = {"name": "y", "parameters": {"classification": 2, "binary_data": is_binary}}
    wanted = read(orjson.dumps(json_request(outputs=[wish])))
    result = np.zeros((1, 10), np.float32)
    result[0, [4, 6]] = 9, 8

    body, headers = protocol.write(
        wanted, "m", "1", MANIFEST.output, result, {}, tuple("abcdefghij")
    )

    if is_binary:
        rest, texts = body[int(headers[protocol.JSON_LENGTH]) :], []
        while rest:
            (size,) = struct.unpack_from("<I", rest)
            texts.append(rest[4 : 4 + size].decode())
            rest = rest[4 + size :]
    else:
        texts = orjson.loads(body)["outputs"][0]["data"]
    assert [text.split(":")[1:] for text in texts] == [["4", "e"], ["6", "g"]]


@pytest.mark.parametrize("shape", [(-1,), (-1, 4, 10)])
def test_classification_of_what_are_no_classes_is_refused(shape: tuple[int, ...]) -> None:
    wish = {"name": "y", "parameters": {"classification": 2}}
    body = orjson.dumps(json_request(outputs=[wish]))

    with pytest.raises(InvalidError, match="classification: 'y' has shape"):
        protocol.read(body, None, MANIFEST.input, replace(MANIFEST.output, shape=shape))


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        ({}, 422, "inputs: missing"),
        ({"inputs": []}, 422, "inputs: has 0 entries"),
        ({"inputs": "x"}, 422, "inputs: must be a list of objects"),
        (json_request(entry={"name": "z"}), 422, "the model's input is 'x'"),
        (json_request(entry={"datatype": "FP31"}), 422, "datatype must be one of"),
        (json_request(entry={"datatype": ["FP32"]}), 422, "datatype must be one of"),
        (json_request(entry={"datatype": "FP16"}), 422, "FP16 has no form in JSON"),
        (json_request(entry={"shape": [-1, 1, 8, 8]}), 422, "shape must be a list of whole"),
        (json_request(entry={"shape": [2**31, 2**31]}), 422, "shape must be a list of whole"),
        (json_request(entry={"shape": [2**30, 2**30]}), 422, "does not hold 128 numbers"),
        (json_request(entry={"shape": [1] * 65 + [128]}), 422, "66 dimensions; 32 at most"),
        (json_request(entry={"shape": [True]}), 422, "shape must be a list of whole"),
        (json_request(entry={"shape": [128]}), 422, "x: shape [128]"),
        (json_request(entry={"data": [[1], [2, 3]]}), 422, "ragged"),
        (json_request(entry={"data": ["a"] * 128}), 422, "numbers only"),
        (json_request(entry={"parameters": {"binary_data_size": 9}}), 400, "0 bytes follow"),
        (json_request(entry={"parameters": {"binary_data_size": 0}}), 400, "has both data and"),
        (whole("UINT8", 300.5), 422, "data of 'x' is UINT8, whole numbers in 0..255, not 300.5"),
        (whole("UINT8", -1), 422, "UINT8, whole numbers in 0..255, not -1"),
        (whole("UINT8", 256), 422, "not 256"),
        (whole("INT8", -129), 422, "INT8, whole numbers in -128..127, not -129"),
        (whole("INT32", 0.5), 422, "not 0.5"),
        (whole("UINT64", -1), 422, "not -1"),
        (whole("INT64", 2.0**64), 422, "not 1.8446744073709552e+19"),
        (whole("UINT64", 1e20), 422, "not 1e+20"),
        (json_request(parameters=[1]), 422, "parameters: must be an object"),
        (json_request(parameters={"timeout": -1}), 422, "timeout: must be a whole number"),
        (json_request(parameters={"priority": "high"}), 422, "priority: must be a whole"),
        (json_request(id=5), 422, "id: must be a string"),
        (json_request(outputs=[{"name": "z"}]), 422, "the model's output is 'y'"),
        (json_request(outputs=[{"name": "y"}] * 2), 422, "outputs: has 2 entries"),
    ],
)
def test_a_wrong_request_is_named(request_: dict[str, Any], status: int, text: str) -> None:
    with pytest.raises(ServiceError) as caught:
        read(orjson.dumps(request_))

    assert caught.value.status == status
    assert text in caught.value.detail


@pytest.mark.parametrize("length", ["-1", "x", "9" * 30, "100000", "٣"])
def test_a_wrong_json_length_is_named(length: str) -> None:
    with pytest.raises(ServiceError, match="Inference-Header-Content-Length") as caught:
        read(b"{}", length)

    assert caught.value.status == 400


@settings(max_examples=300)
@given(
    body=strategies.one_of(
        strategies.binary(max_size=300),
        strategies.tuples(
            strategies.binary(max_size=4), strategies.integers(0, 400), strategies.integers(0, 900)
        ).map(lambda cut: _mangled(*cut)),
    ),
    length=strategies.none() | strategies.integers(-5, 900).map(str),
)
def test_mangled_bytes_are_a_client_error_or_an_input(body: bytes, length: str | None) -> None:
    try:
        shape = read(body, length).x.shape[1:]
        status = 200
    except ServiceError as error:
        status = error.status

    assert status in (400, 422) or shape == (1, 8, 8)


def _mangled(junk: bytes, start: int, end: int) -> bytes:
    body, _ = binary_request(X.tobytes())
    return body[:start] + junk + body[end:]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root: Path = tmp_path_factory.mktemp("protocol")
    artifact.save(root / "tiny.maestro", tiny_manifest(), tiny_contents())
    served = Settings(artifact=root / "tiny.maestro", state_dir=root / "state", threads=1)
    with TestClient(create_app(served)) as client:
        wait_until_ready(client)
        yield client


def test_metadata_is_what_the_protocol_says(client: TestClient) -> None:
    assert set(client.get("/v2").json()) == {"name", "version", "extensions"}
    model = client.get("/v2/models/tiny").json()
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert model["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}]
    assert client.get("/v2/models/tiny/versions/1").json() == model
    assert client.get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    assert client.get("/v2/models/tiny/config").json()["max_batch_size"] == 16
    check_problem(client.get("/v2/models/other"), 404, "there is no model 'other'")
    check_problem(client.get("/v2/models/tiny/versions/9"), 404, "there is no version '9'")


def test_inference_says_how_it_was_answered_and_is_counted(client: TestClient) -> None:
    before = client.get("/v2/models/tiny/stats").json()["model_stats"][0]

    response = client.post(PATH, json=json_request(id="q", parameters={"point": 2}))

    answer = response.json()
    assert response.status_code == 200, response.text
    assert (answer["model_name"], answer["id"]) == ("tiny", "q")
    assert answer["parameters"]["point"] == 2
    assert answer["outputs"][0]["shape"] == [2, 10]
    after = client.get("/v2/models/stats").json()["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 2
    assert after["inference_stats"]["success"]["count"] >= 1


def test_the_protocol_and_the_simple_call_agree(client: TestClient) -> None:
    body, length = binary_request(X.tobytes(), parameters={"binary_data_output": True, "point": 4})

    binary = client.post(PATH, content=body, headers={protocol.JSON_LENGTH: length})

    simple = client.post("/infer?point=4", json={"inputs": X.tolist()}).json()
    head = int(binary.headers[protocol.JSON_LENGTH])
    output = np.frombuffer(binary.content[head:], "<f4").reshape(2, 10)
    np.testing.assert_allclose(output, simple["outputs"], rtol=1e-5)


@pytest.mark.parametrize(
    ("headers", "timeout_us", "target_ms"),
    [
        ({"x-max-latency-ms": "700"}, 900_000, 700),
        ({"x-envoy-expected-rq-timeout-ms": "600"}, 900_000, 600),
        ({"x-max-latency-ms": "700"}, 500_000, 500),
        ({"x-envoy-expected-rq-timeout-ms": "0"}, 500_000, 500),
        ({"x-envoy-expected-rq-timeout-ms": "soon"}, 500_000, 500),
    ],
)
def test_the_smallest_target_binds(
    client: TestClient, headers: dict[str, str], timeout_us: int, target_ms: float
) -> None:
    request = json_request(parameters={"timeout": timeout_us, "max_latency_ms": 1000})

    answer = client.post(PATH, json=request, headers=headers).json()

    assert answer["parameters"]["max_latency_ms"] == target_ms


def test_parameters_may_come_by_the_query_and_those_of_the_body_win(client: TestClient) -> None:
    named = json_request(parameters={"point": 1, "max_latency_ms": 700, "priority": 0})

    plain = client.post(f"{PATH}?point=2&max_latency_ms=900&priority=1", json=json_request())
    both = client.post(f"{PATH}?point=2&max_latency_ms=600&max_latency_ms=650", json=named)
    raw = client.post(
        f"{PATH}?point=3", content=X[:1].tobytes(), headers={protocol.JSON_LENGTH: "0"}
    )

    answers = [response.json()["parameters"] for response in (plain, both)]
    assert [(a["point"], a["max_latency_ms"]) for a in answers] == [(2, 900), (1, 600)]
    assert raw.status_code == 200, raw.text
    for query, text in (
        ("foo=abc", "unknown parameter 'foo'"),
        ("point=1&point=2", "point: given as"),
        ("priority=-1", "priority: "),
        ("top_k=2", "top_k: is of /infer"),
    ):
        check_problem(client.post(f"{PATH}?{query}", json=json_request()), 422, text)


def test_errors_are_for_clients_of_the_protocol_too(client: TestClient) -> None:
    response = client.post(PATH, content=b"{")

    assert "not JSON" in check_problem(response, 400, "not JSON")["error"]
    check_problem(client.post("/v2/models/none/infer", json=json_request()), 404, "no model 'none'")
