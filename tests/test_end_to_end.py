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

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))
PICTURE = EXAMPLES[0]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("state"), MAESTRO_THREADS="0") as address:
        yield address


def infer(address: str, picture: Path, query: str = "") -> httpx.Response:
    headers = {"content-type": "image/png"}
    return httpx.post(f"{address}/infer{query}", content=picture.read_bytes(), headers=headers)


@pytest.mark.parametrize("picture", EXAMPLES, ids=lambda picture: str(picture.stem))
def test_the_shipped_model_names_the_example_pictures(address: str, picture: Path) -> None:
    answer = infer(address, picture, "?max_latency_ms=1000").json()

    assert answer["labels"] == [picture.stem]
    assert answer["accuracy"] >= 0.9
    assert answer["predicted_ms"] > 0
    assert answer["compute_ms"] > 0


def test_a_tighter_target_answers_from_a_cheaper_point(address: str) -> None:
    points = httpx.get(f"{address}/frontier").json()["points"]

    relaxed = infer(address, PICTURE, "?max_latency_ms=1000").json()
    tight = infer(address, PICTURE, "?max_latency_ms=0.05").json()

    assert relaxed["accuracy"] == max(point["accuracy"] for point in points)
    assert tight["point"] < relaxed["point"]
    assert points[tight["point"]]["macs"] < points[relaxed["point"]]["macs"]


def test_every_point_of_the_shipped_model_answers(address: str) -> None:
    shipped = artifact.load(shipped_artifact())

    for point in range(len(shipped.points)):
        answer = infer(address, PICTURE, f"?point={point}").json()
        assert (answer["point"], answer["labels"]) == (point, [PICTURE.stem])


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

    assert infer(address, PICTURE).json()["labels"] == [PICTURE.stem]


def test_many_clients_at_once_get_their_own_answers(address: str) -> None:
    wrong: list[str] = []

    def ask(picture: Path) -> None:
        with httpx.Client() as client:
            content = picture.read_bytes()
            for _ in range(20):
                response = client.post(
                    f"{address}/infer", content=content, headers={"content-type": "image/png"}
                )
                if response.json().get("labels") != [picture.stem]:
                    wrong.append(response.text)

    threads = [threading.Thread(target=ask, args=(picture,)) for picture in EXAMPLES * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_calibrating_while_serving(address: str) -> None:
    started = httpx.post(f"{address}/profile", json={"kind": "quick"})
    assert started.status_code == 202

    assert infer(address, PICTURE).json()["labels"] == [PICTURE.stem]
    job = httpx.delete(f"{address}{started.headers['location']}").json()
    assert job["id"] in started.headers["location"]


def test_npy_and_pictures_agree(address: str) -> None:
    from PIL import Image

    image = artifact.load(shipped_artifact()).manifest.input.image
    assert image is not None
    opened = Image.open(PICTURE).convert(image.mode)
    pixels = np.asarray(opened, np.float32).reshape(image.height, image.width, -1) / 255
    file = io.BytesIO()
    normalised = (pixels - np.array(image.mean, np.float32)) / np.array(image.std, np.float32)
    np.save(file, normalised.transpose(2, 0, 1)[None])
    headers = {"content-type": "application/x-npy"}

    by_array = httpx.post(f"{address}/infer?point=0", content=file.getvalue(), headers=headers)

    by_picture = infer(address, PICTURE, "?point=0").json()
    np.testing.assert_allclose(by_array.json()["outputs"], by_picture["outputs"], rtol=1e-3)
