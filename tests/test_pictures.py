"""Which pictures others should not wait for: large ones, and those that are made to be slow."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from server.pictures import takes_long

LARGE = 1024 * 1024


def picture(size: tuple[int, int], kind: str, mode: str = "L", **how: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 128).save(file, kind, **how)
    return file.getvalue()


def noise(size: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def piece(kind: bytes, content: bytes = b"") -> bytes:
    """Return a chunk of a PNG."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


TAGS = Image.Exif()
TAGS[ExifTags.Base.Orientation] = 6
SMALL = {kind: picture((8, 8), kind) for kind in ("PNG", "JPEG")}
PROGRESSIVE = picture((500, 500), "JPEG", progressive=True)
LAST_SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
TEXT = piece(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1)))


def with_pieces(pieces: bytes) -> bytes:
    """Return a PNG with these behind its header."""
    return SMALL["PNG"][:33] + pieces + SMALL["PNG"][33:]


@pytest.mark.parametrize(
    "body",
    [
        *SMALL.values(),
        picture((1024, 1024), "PNG"),
        picture((1024, 1024), "JPEG"),
        noise((224, 224), "PNG"),
        noise((128, 128), "JPEG"),
        picture((300, 200), "JPEG", "RGB", progressive=True),
        picture((300, 200), "JPEG", "CMYK"),
        picture((300, 200), "JPEG", exif=TAGS, icc_profile=bytes(3000), comment="at sea"),
        picture((300, 200), "PNG", exif=TAGS, icc_profile=bytes(3000)),
        SMALL["PNG"][:40],
        b'{"inputs": []}',
        b"",
    ],
    ids=lambda body: f"{len(body)} bytes",
)
def test_small_pictures_and_other_bodies_are_read_at_once(body: bytes) -> None:
    assert not takes_long(body)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(1025, 1024), (2048, 2048), (4096, 4096)])
def test_many_pixels_take_long_in_however_few_bytes(kind: str, size: tuple[int, int]) -> None:
    assert takes_long(picture(size, kind, quality=1))


def test_small_jpegs_of_many_bytes_take_long() -> None:
    assert takes_long(noise((400, 400), "JPEG"))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(PROGRESSIVE[:-2] + 1000 * LAST_SCAN + b"\xff\xd9", id="scans"),
        pytest.param(b"\xff\xd8" + 1000 * b"\xff\xfe\0\2" + SMALL["JPEG"][2:], id="segments"),
        pytest.param(with_pieces(1000 * piece(b"abCd")), id="pieces"),
        pytest.param(with_pieces(10 * TEXT), id="texts"),
        pytest.param(with_pieces(piece(b"eXIf", bytes(100_000))), id="tags"),
    ],
)
def test_what_is_made_to_be_slow_takes_long(body: bytes) -> None:
    with Image.open(io.BytesIO(body)) as opened:
        assert opened.width * opened.height < LARGE

    assert takes_long(body)


def edited(body: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    for at, inserted in edits:
        at %= len(body)
        body = body[:at] + inserted + body[at + len(inserted) :]
    return body


HEADERS = [
    piece(b"IHDR", struct.pack(">IIBBBBB", 4096, 4096, 1, 0, 0, 0, 0)),
    b"\xff\xc0\0\x0b\x08\x10\0\x10\0\1\1\x11\0",  # 4096 x 4096, one component
    b"\x10\0",
]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@given(
    st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from(HEADERS) | st.binary(max_size=4)),
        max_size=3,
    )
)
def test_what_a_reader_takes_for_large_takes_long(
    kind: str, edits: list[tuple[int, bytes]]
) -> None:
    body = edited(SMALL[kind], edits)
    is_long = takes_long(body)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(body), formats=("PNG", "JPEG")).size
    except Exception:
        assume(False)
    assert is_long or width * height <= LARGE


@pytest.mark.parametrize("header", HEADERS[:2])
def test_a_second_header_is_not_overlooked(header: bytes) -> None:
    kind = "PNG" if header is HEADERS[0] else "JPEG"
    at = 33 if kind == "PNG" else SMALL[kind].index(b"\xff\xda")
    body = SMALL[kind][:at] + header + SMALL[kind][at:]

    with Image.open(io.BytesIO(body)) as opened:
        assert opened.size == (4096, 4096)
    assert takes_long(body)
