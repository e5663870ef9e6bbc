"""Every body a client may send: good ones become the tensor, bad ones get one clear error."""

import io
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from maestro_core.artifact import Tensor
from server import inputs
from server.errors import ServiceError
from tests.conftest import tiny_manifest

TENSOR = tiny_manifest().input
SAMPLE = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)
EMPTY = np.zeros((0, 9), "f4")


def with_tags(exif: bytes) -> bytes:
    """Return a PNG picture with these bytes for its EXIF tags."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG", exif=exif)
    return file.getvalue()


def picture(mode: str = "L", size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 128 if mode in ("L", "I;16") else None).save(file, kind)
    return file.getvalue()


def as_json(values: object, **parameters: object) -> bytes:
    return json.dumps({"inputs": values, **parameters}).encode()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("values", [SAMPLE.tolist(), [SAMPLE.tolist()], [SAMPLE.tolist()] * 3])
def test_lists_become_the_tensor(values: list[object]) -> None:
    x, given = inputs.from_json(as_json(values, max_latency_ms=5, on_miss="reject"), TENSOR)

    assert given == {"max_latency_ms": 5, "on_miss": "reject"}
    assert x.shape[1:] == (1, 8, 8)
    np.testing.assert_array_equal(x[-1], SAMPLE)


def test_whole_numbers_among_others_are_numbers() -> None:
    values = [[[[2**40, 0, -1, 0.5, 1e-50, 3, 4, 5]] * 8]]

    x, _ = inputs.from_json(as_json(values), TENSOR)

    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, np.array(values, np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[[["1.0"] * 8] * 8]], "inputs: must hold numbers only"),
        ([[["12345678"] * 8]], "inputs: must hold numbers only"),
        ([[[[None] * 8] * 8]], "inputs: must hold numbers only"),
        ([[[[[1.0]] * 8] * 8]], r"x: shape \[1, 1, 8, 8, 1\], but"),
        ([[1.0, 2.0], [1.0]], "inputs: the lists are ragged"),
        ([["a"]], "inputs: must hold numbers only"),
        ([[1.0], 1.0], "inputs: the lists are ragged, or hold more than numbers"),
        ([[2**70]], r"x: shape \[1, 1\], but"),
        ([[[[10**39] * 8] * 8]], "x: holds NaN or infinite values"),
        ([[None]], "inputs: must hold numbers only"),
        ([[True]], "inputs and parameters take numbers and text, not true or false"),
        ({}, "inputs: must hold numbers only"),
        ([], r"x: shape \[0\], but the model takes \[n, 1, 8, 8\], n at least 1"),
        (np.zeros((0, 1, 8, 8)).tolist(), "x: shape"),
        (np.zeros((1, 1, 8, 9)).tolist(), r"x: shape \[1, 1, 8, 9\], but"),
        (np.zeros(64).tolist(), r"x: shape \[64\], but"),
        ([[[[1e39] * 8] * 8]], "x: holds NaN or infinite values"),
    ],
)
def test_wrong_lists_are_named(values: object, message: str) -> None:
    with pytest.raises(ServiceError, match=message) as caught:
        inputs.from_json(as_json(values), TENSOR)

    assert caught.value.status == 422


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is empty"),
        (b"{", 400, "the body is not JSON"),
        (b'{"inputs": [NaN]}', 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b"[1]", 422, "must be a JSON object"),
        (b"{}", 422, "inputs: missing"),
        (b'{"inputs": [[[[0.5, false]]]]}', 422, "not true or false"),
    ],
)
def test_wrong_json_is_named(body: bytes, status: int, message: str) -> None:
    with pytest.raises(ServiceError, match=message) as caught:
        inputs.from_json(body, TENSOR)

    assert caught.value.status == status


@pytest.mark.parametrize("dtype", ["f4", ">f8", "u1", "i8", "f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_becomes_the_tensor(dtype: str, order: str) -> None:
    array = np.asarray(np.arange(128).reshape(2, 1, 8, 8), dtype, order=order)  # type: ignore[call-overload]

    x = inputs.from_npy(npy(array), TENSOR)

    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, np.arange(128).reshape(2, 1, 8, 8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("others", [0.0, 3e38])
def test_npy_with_one_number_that_is_none_is_refused(value: float, others: float) -> None:
    array = np.full((2, 1, 8, 8), others, np.float32)
    array[1, 0, 7, 6] = value

    with pytest.raises(ServiceError, match="x: holds NaN or infinite values"):
        inputs.from_npy(npy(array), TENSOR)


def test_numbers_whose_squares_overflow_are_taken() -> None:
    array = np.full((2, 1, 8, 8), -3e38, np.float32)

    np.testing.assert_array_equal(inputs.from_npy(npy(array), TENSOR), array)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not a .npy file"),
        (b"\x93NUMPY", 400, "not a .npy file"),
        (b"\x93NUMPY\x09\x00" + bytes(100), 400, "not a .npy file"),
        (npy(SAMPLE)[:-4], 400, "but 252 bytes follow"),
        (npy(SAMPLE) + b"more", 400, "but 260 bytes follow"),
        (npy(SAMPLE).replace(b"(1, 8, 8)", b"(9**9,  )"), 400, "not a .npy file"),
        (npy(SAMPLE).replace(b"(1, 8, 8)", b"(1,-8, 8)"), 400, r"says shape \(1, -8, 8\)"),
        (npy(SAMPLE).replace(b"(1, 8, 8)", b"(9999999)"), 400, "not a .npy file"),
        (npy(SAMPLE).replace(b"(1, 8, 8)", b"((((1,8,8"), 400, "not a .npy file"),
        (npy(SAMPLE).replace(b"(1, 8, 8), }   ", b"(True, 8, 8), }"), 400, "not a .npy file"),
        (npy(np.zeros((0, 8, 8), "f4")), 422, "holds no numbers"),
        (npy(EMPTY).replace(b"9), }" + b" " * 20, b"9" * 21 + b"), }"), 422, "holds no numbers"),
        (npy(np.zeros((1,) * 40, "f4")), 400, "40 dimensions; 32 at most"),
        (npy(np.array(["a"])), 422, "must hold numbers"),
        (npy(np.array([1j])), 422, "must hold numbers"),
    ],
)
def test_wrong_npy_is_named(body: bytes, status: int, message: str) -> None:
    with pytest.raises(ServiceError, match=message) as caught:
        inputs.from_npy(body, TENSOR)

    assert caught.value.status == status


def test_pickled_objects_are_never_loaded() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)

    with pytest.raises(ServiceError, match="must hold numbers"):
        inputs.from_npy(file.getvalue(), TENSOR)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(8, 8), (30, 17)])
def test_a_picture_is_scaled_and_normalised(kind: str, mode: str, size: tuple[int, int]) -> None:
    x = inputs.from_image(picture(mode, size, kind), TENSOR)

    level = 128 / 255 if mode == "L" else 0
    assert x.shape == (1, 1, 8, 8)
    np.testing.assert_allclose(x, (level - 0.5) / 0.25, atol=0.02)


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_of_a_framed_picture_the_middle_is_taken(size: tuple[int, int]) -> None:
    assert TENSOR.image is not None
    framed = replace(TENSOR, image=replace(TENSOR.image, shorter=8))
    across = Image.new("L", (24, 8), 0)
    across.paste(255, (8, 0, 16, 8))
    file = io.BytesIO()
    (across if size == across.size else across.rotate(90, expand=True)).save(file, "PNG")

    x, whole = (inputs.from_image(file.getvalue(), tensor) for tensor in (framed, TENSOR))

    np.testing.assert_allclose(x, 2)
    assert whole.min() == -2


def test_a_colour_picture_has_its_channels_first() -> None:
    tensor = Tensor("x", "float32", (-1, 3, 8, 8), None)
    assert TENSOR.image is not None
    colour = type(TENSOR.image)("RGB", 8, 8, (0.0, 0.5, 0.0), (1.0, 0.5, 1.0))
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 51)).save(file, "PNG")

    x = inputs.from_image(file.getvalue(), Tensor(tensor.name, "float32", tensor.shape, colour))

    np.testing.assert_allclose(x[0, :, 0, 0], [1, -1, 0.2], atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is empty"),
        (b"GIF89a" + bytes(50), 400, "neither a PNG nor a JPEG"),
        (picture()[:40], 400, "neither a PNG nor a JPEG"),
        (picture(size=(200, 200))[:100], 400, "the picture is broken"),
        (with_tags(b"MM\0*"), 400, "the picture is broken"),
        (picture("I;16"), 422, "mode I;16; send 8 bits"),
        (picture("1", (5000, 5000)), 422, "more than 16777216 pixels"),
        (picture("1", (10000, 10000)), 422, "more than 16777216 pixels"),
        (picture("1", (20000, 20000)), 422, "more than 16777216 pixels"),
    ],
)
def test_wrong_pictures_are_named(body: bytes, status: int, message: str) -> None:
    with pytest.raises(ServiceError, match=message) as caught:
        inputs.from_image(body, TENSOR)

    assert caught.value.status == status


def test_texts_in_the_place_of_numbers_take_no_more_room_than_they_have() -> None:
    body = as_json(["a" * 30_000, *[""] * 8_000])  # as an array of texts 960 MB
    tracemalloc.start()

    with pytest.raises(ServiceError, match="must hold numbers only"):
        inputs.from_json(body, TENSOR)

    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_model_without_pictures_says_so() -> None:
    with pytest.raises(ServiceError, match="does not take pictures") as caught:
        inputs.from_image(picture(), Tensor("x", "float32", (-1, 4)))

    assert caught.value.status == 415
