"""The two common clients of the Open Inference Protocol, unmodified, against a real server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maestro_core import artifact
from tests.conftest import tiny_contents, tiny_manifest
from tests.server_process import running_server

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")

X = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 1, 8, 8)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root: Path = tmp_path_factory.mktemp("clients")
    artifact.save(root / "tiny.maestro", tiny_manifest(), tiny_contents())
    with running_server(root / "state", root / "tiny.maestro") as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with triton.InferenceServerClient(address.removeprefix("http://")) as client:
        yield client


def test_tritonclient_reads_metadata_and_infers_both_ways(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.get_model_metadata("tiny")["inputs"][0]["shape"] == [-1, 1, 8, 8]
    assert client.get_model_config("tiny")["name"] == "tiny"
    outputs = []
    for is_binary in (True, False):
        x = triton.InferInput("x", list(X.shape), "FP32")
        x.set_data_from_numpy(X, binary_data=is_binary)
        wanted = [triton.InferRequestedOutput("y", binary_data=is_binary)]
        result = client.infer(
            "tiny",
            [x],
            outputs=wanted,
            request_id="q",
            timeout=700_000,  # us: the smaller of both targets binds
            priority=1,
            parameters={"max_latency_ms": 800.0, "min_accuracy": 0.6},
        )
        answer = result.get_response()
        assert answer["id"] == "q"
        assert answer["parameters"]["max_latency_ms"] == 700
        assert answer["parameters"]["accuracy"] >= 0.6
        outputs.append(result.as_numpy("y"))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5)
    stats = client.get_inference_statistics("tiny")["model_stats"][0]
    assert stats["inference_stats"]["success"]["count"] >= 2


def test_tritonclient_reads_our_errors(client: Any) -> None:
    x = triton.InferInput("x", [1, 3], "FP32")
    x.set_data_from_numpy(np.zeros((1, 3), np.float32))

    with pytest.raises(triton.InferenceServerException, match="the model takes"):
        client.infer("tiny", [x])
    with pytest.raises(triton.InferenceServerException, match="there is no model 'other'"):
        client.get_model_metadata("other")
    x = triton.InferInput("x", list(X.shape), "FP32")
    x.set_data_from_numpy(X)
    with pytest.raises(triton.InferenceServerException, match="no allowed point answers within"):
        client.infer("tiny", [x], timeout=1, parameters={"on_miss": "reject"})


def test_kserve_infers_both_ways(address: str) -> None:
    kserve = pytest.importorskip("kserve", reason="kserve is not installed")

    async def call(is_binary: bool) -> np.ndarray:
        config = kserve.RESTConfig(protocol="v2", verbose=False)
        client = kserve.InferenceRESTClient(config)
        assert await client.is_server_live(address)
        assert await client.is_server_ready(address)
        assert await client.is_model_ready(address, "tiny")
        x = kserve.InferInput("x", list(X.shape), "FP32")
        x.set_data_from_numpy(X, binary_data=is_binary)
        request = kserve.InferRequest(
            "tiny", [x], request_id="q", parameters={"max_latency_ms": 800.0}
        )
        response = await client.infer(address, request, model_name="tiny")
        await client.close()
        assert response.id == "q"
        output: np.ndarray = response.outputs[0].as_numpy()
        return output.reshape(2, 10)

    binary, plain = asyncio.run(call(True)), asyncio.run(call(False))

    np.testing.assert_allclose(binary, plain, rtol=1e-5)


def test_kserve_sends_our_parameters_and_reads_our_errors(address: str) -> None:
    """It has no call for metadata, and shows no words of an error that is problem+json."""
    kserve = pytest.importorskip("kserve", reason="kserve is not installed")
    client_library = pytest.importorskip("httpx")

    async def call(shape: list[int], model: str = "tiny", **parameters: Any) -> Any:
        x = kserve.InferInput("x", shape, "FP32")
        x.set_data_from_numpy(np.zeros(shape, np.float32))
        request = kserve.InferRequest(model, [x], parameters=parameters)
        async with kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2")) as client:
            return await client.infer(address, request, model_name=model, timeout=30)

    def refused(status: int, shape: list[int], model: str = "tiny", **parameters: Any) -> str:
        with pytest.raises(client_library.HTTPStatusError) as caught:
            asyncio.run(call(shape, model, **parameters))
        assert caught.value.response.status_code == status
        return str(caught.value.response.json()["error"])

    shape = list(X.shape)
    answer = asyncio.run(call(shape, timeout=700_000, max_latency_ms=800.0, min_accuracy=0.6))

    assert answer.parameters["max_latency_ms"] == 700
    assert answer.parameters["accuracy"] >= 0.6
    assert "the model takes" in refused(422, [1, 3])
    assert "there is no model 'other'" in refused(404, shape, "other")
    assert "no allowed point answers within" in refused(
        422, shape, max_latency_ms=0.001, on_miss="reject"
    )
