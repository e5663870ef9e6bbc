"""A real server on a free port, called as a client would."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest

from maestro_core import artifact
from server.settings import shipped_artifact
from tests.server_process import running_server

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("state"), MAESTRO_THREADS="0") as address:
        yield address


def infer(address: str, name: str, query: str = "") -> httpx.Response:
    picture = (EXAMPLES / name).read_bytes()
    headers = {"content-type": "image/png"}
    return httpx.post(f"{address}/infer{query}", content=picture, headers=headers)


@pytest.mark.parametrize("digit", ["0", "3", "7"])
def test_the_shipped_model_reads_the_example_digits(address: str, digit: str) -> None:
    answer = infer(address, f"digit-{digit}.png", "?max_latency_ms=50").json()

    assert answer["labels"] == [digit]
    assert answer["accuracy"] >= 0.98
    assert answer["predicted_ms"] > 0
    assert answer["compute_ms"] > 0


def test_a_tighter_target_answers_from_a_cheaper_point(address: str) -> None:
    points = httpx.get(f"{address}/frontier").json()["points"]

    relaxed = infer(address, "digit-7.png", "?max_latency_ms=1000").json()
    tight = infer(address, "digit-7.png", "?max_latency_ms=0.05").json()

    assert relaxed["accuracy"] == max(point["accuracy"] for point in points)
    assert tight["point"] < relaxed["point"]
    assert points[tight["point"]]["macs"] < points[relaxed["point"]]["macs"]


def test_every_point_of_the_shipped_model_answers(address: str) -> None:
    shipped = artifact.load(shipped_artifact())

    for point in range(len(shipped.points)):
        answer = infer(address, "digit-7.png", f"?point={point}").json()
        assert (answer["point"], answer["labels"]) == (point, ["7"])


def test_bad_requests_leave_the_server_serving(address: str) -> None:
    bad = [
        {"content": b""},
        {"content": b"junk", "headers": {"content-type": "image/png"}},
        {"content": b"{" * 10_000, "headers": {"content-type": "application/json"}},
        {"json": {"inputs": [1, 2, 3]}},
        {"content": bytes(20_000_000), "headers": {"content-type": "application/x-npy"}},
    ]
    for request in bad:
        response = httpx.post(f"{address}/infer", **request)  # type: ignore[arg-type]
        assert response.status_code in (400, 413, 415, 422)
        assert "Traceback" not in response.text

    assert infer(address, "digit-7.png").json()["labels"] == ["7"]


def test_many_clients_at_once_get_their_own_answers(address: str) -> None:
    wrong: list[str] = []

    def ask(digit: str) -> None:
        with httpx.Client() as client:
            picture = (EXAMPLES / f"digit-{digit}.png").read_bytes()
            for _ in range(20):
                response = client.post(
                    f"{address}/infer", content=picture, headers={"content-type": "image/png"}
                )
                if response.json().get("labels") != [digit]:
                    wrong.append(response.text)

    threads = [threading.Thread(target=ask, args=(digit,)) for digit in "037" * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_calibrating_while_serving(address: str) -> None:
    started = httpx.post(f"{address}/profile", json={"kind": "quick"})
    assert started.status_code == 202

    assert infer(address, "digit-7.png").json()["labels"] == ["7"]
    job = httpx.delete(f"{address}{started.headers['location']}").json()
    assert job["id"] in started.headers["location"]


def test_npy_and_pictures_agree(address: str) -> None:
    from PIL import Image

    pixels = np.asarray(Image.open(EXAMPLES / "digit-3.png"), np.float32) / 255
    file = io.BytesIO()
    np.save(file, ((pixels - 0.1307) / 0.3081)[None, None])
    headers = {"content-type": "application/x-npy"}

    by_array = httpx.post(f"{address}/infer?point=0", content=file.getvalue(), headers=headers)

    by_picture = infer(address, "digit-3.png", "?point=0").json()
    np.testing.assert_allclose(by_array.json()["outputs"], by_picture["outputs"], rtol=1e-3)
