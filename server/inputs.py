"""From the bytes of a request to the model's input tensor, and what can be wrong with them."""

import io
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from maestro_core import artifact, framing
from maestro_core.artifact import Tensor
from server import json_numbers
from server.errors import BadRequestError, InvalidError, UnsupportedMediaError

Floats = NDArray[np.float32]

MAX_PIXELS = 4096 * 4096
MAX_DIMENSIONS = 32  # NumPy's arrays have 64 at most
_NPY_HEADER_BYTES = 10_000
# Numbers whose squares together are less are each within what float32 holds, and none is NaN.
_SURELY_FLOAT32 = 1e76
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"\x93NUMPY": "application/x-npy",
}


def from_json(body: bytes, tensor: Tensor) -> tuple[Floats, dict[str, Any]]:
    """Return the input, (n, …), of the JSON object in `body`, and what else the object has.

    Raises:
        BadRequestError: it is not JSON.
        InvalidError: it is not an object, or its `inputs` are missing, ragged, not finite, of
            another shape, or not numbers.
    """
    read = json_numbers.read(body, tensor.shape[1:])
    if read is not None:
        return shaped(read[0], tensor), read[1]
    given = json_object(body)
    # Among numbers they would pass for 1 and 0.
    if (b"r" in body and b"true" in body) or (b"f" in body and b"false" in body):
        raise InvalidError("inputs and parameters take numbers and text, not true or false")
    if "inputs" not in given:
        raise InvalidError("inputs: missing; it takes the input tensor as nested lists")
    return shaped(numbers(given.pop("inputs"), "inputs"), tensor), given


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`.

    Raises:
        BadRequestError: it is not JSON.
        InvalidError: it is not an object.
    """
    if not body:
        raise BadRequestError("the body is empty")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidError("the body must be a JSON object")
    return value


def type_of(body: bytes) -> str | None:
    """Return the type that the first bytes show, of those that show one."""
    return next((kind for start, kind in _SIGNATURES.items() if body.startswith(start)), None)


def numbers(values: object, name: str) -> NDArray[Any]:
    """Return nested lists of numbers as an array.

    What else there may be is looked for before NumPy sees it: it gives every element of an array
    of texts the room of the longest.

    Raises:
        InvalidError: they are ragged, too deep, or not of numbers alone; `name` says what is.
    """
    level: list[Any] = [values]
    for _ in range(MAX_DIMENSIONS + 1):
        kinds = set(map(type, level))
        if list not in kinds:
            break
        if kinds != {list}:
            raise InvalidError(f"{name}: the lists are ragged, or hold more than numbers")
        level = list(chain.from_iterable(level))
    else:
        raise InvalidError(f"{name}: lists of {MAX_DIMENSIONS} dimensions at most")
    if not kinds <= {int, float}:
        raise InvalidError(f"{name}: must hold numbers only")
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InvalidError(f"{name}: the lists are ragged") from error


def from_npy(body: bytes, tensor: Tensor) -> Floats:
    """Return an array in NumPy's `.npy` format as the input, (n, …).

    The header is held against the length of the body before memory is taken for what it claims.

    Raises:
        BadRequestError: it is not such a file, or shorter or longer than it says.
        InvalidError: it is not of numbers, not finite or of another shape.
    """
    # The magic, the version, and the header's length in 2 bytes; in 4 for version 2.
    wide = body[6:7] == b"\x02"
    start = 12 if wide else 10
    length = int.from_bytes(body[8:start], "little")
    if length > _NPY_HEADER_BYTES:
        raise BadRequestError(f"the body is not a .npy file: its header has {length} bytes")
    shape, fortran, dtype = _npy_header(body[: start + length])
    data = memoryview(body)[start + length :]
    if any(size < 0 for size in shape) or prod(shape) * dtype.itemsize != len(data):
        raise BadRequestError(
            f"the .npy file says shape {shape} of {dtype}, but {len(data)} bytes follow"
        )
    if not data:  # and a size may be too large for any array
        raise InvalidError(f"the .npy file holds no numbers: its shape is {shape}")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return shaped(array, tensor)


@lru_cache(maxsize=64)
def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and type; a client sends the same header over and over.

    Raises:
        BadRequestError: it is not that of such a file.
        InvalidError: it is not of numbers.
    """
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file, max_header_size=_NPY_HEADER_BYTES)
    except Exception as error:  # the header is Python source: its tokenizer raises its own
        raise BadRequestError(f"the body is not a .npy file: {error}") from error
    if len(shape) > MAX_DIMENSIONS:
        raise BadRequestError(
            f"the .npy file has {len(shape)} dimensions; {MAX_DIMENSIONS} at most"
        )
    if bool in map(type, shape):  # else they would pass for 1 and 0
        raise BadRequestError(f"the body is not a .npy file: its shape is {shape}")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InvalidError(f"the .npy file must hold numbers, not {dtype}")
    return shape, fortran, dtype


def from_image(body: bytes, tensor: Tensor) -> Floats:
    """Return a PNG or JPEG picture as the input, (1, channels, height, width).

    Turned upright, converted, framed, scaled to 0..1 and normalised, as the manifest says.

    Raises:
        BadRequestError: it cannot be decoded.
        InvalidError: it is too large, or of more than 8 bits.
        UnsupportedMediaError: the model does not take pictures.
    """
    wanted = tensor.image
    if wanted is None:
        raise UnsupportedMediaError("this model does not take pictures; send JSON or .npy")
    picture = _open(body)
    try:
        upright = framing.upright(picture, wanted)
    except Exception as error:  # what decoders and readers of tags raise is their own affair
        raise BadRequestError(f"the picture is broken: {error}") from error
    box = framing.middle(wanted, *upright.size)
    pixels = framing.pixels(upright, wanted, box).astype(np.float32) / 255
    mean, std = np.asarray(wanted.mean, np.float32), np.asarray(wanted.std, np.float32)
    scaled = (pixels - mean) / std
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], np.float32)


def warm_up(tensor: Tensor) -> None:
    """Load what the first picture would wait for: decoders are loaded when they are first used."""
    if tensor.image is None:
        return
    for kind in ("PNG", "JPEG"):
        from_image(blank_picture(tensor.image, kind), tensor)


def blank_picture(wanted: artifact.Image, kind: Literal["PNG", "JPEG"]) -> bytes:
    """Return a black picture of the size that a model takes."""
    file = io.BytesIO()
    Image.new(wanted.mode, (wanted.width, wanted.height)).save(file, kind)
    return file.getvalue()


def shaped(array: NDArray[Any], tensor: Tensor) -> Floats:
    """Return `array` as the input (n, …); one sample may come without its batch axis.

    Raises:
        InvalidError: it has another shape, no sample, or numbers that are not finite.
    """
    sample = tensor.shape[1:]
    if array.shape == sample:
        array = array[None]
    if array.shape[1:] != sample or array.ndim != len(tensor.shape) or not len(array):
        raise InvalidError(
            f"{tensor.name}: shape {list(array.shape)}, but the model takes {_text(tensor.shape)}"
        )
    if array.dtype == np.float64 and np.vdot(array, array) < _SURELY_FLOAT32:
        return array.astype(np.float32, order="C")
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, np.float32)
    if not is_finite(array):
        raise InvalidError(f"{tensor.name}: holds NaN or infinite values")
    return array


def is_finite(array: Floats) -> bool:
    """Return whether no number is NaN or infinite.

    A sum of squares shows it in one pass without a mask; only where that overflows is each looked
    at.
    """
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


def _text(shape: Sequence[int]) -> str:
    return "[" + ", ".join("n" if size < 0 else str(size) for size in shape) + "], n at least 1"


def _open(body: bytes) -> Image.Image:
    if not body:
        raise BadRequestError("the body is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(body), formats=("PNG", "JPEG"))
    except UnidentifiedImageError as error:
        raise BadRequestError("the body is neither a PNG nor a JPEG picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidError(f"the picture has more than {MAX_PIXELS} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BadRequestError(f"the picture is broken: {error}") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise InvalidError(f"the picture has more than {MAX_PIXELS} pixels")
    if picture.mode.startswith(("I", "F")):
        raise InvalidError(f"the picture has mode {picture.mode}; send 8 bits per channel")
    return picture
