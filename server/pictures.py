"""Whether a picture takes long to decode, by how its bytes are laid out. Decodes nothing.

What can't be told from a few pieces counts as long: others should not wait to learn it.
"""

from struct import Struct

_LARGE_PIXELS = 1024 * 1024
_LARGE_JPEG_BYTES = 64 * 2**10
_PIECES = 64  # that are looked at; a plain JPEG has 9 before its pixels

# A PNG's pieces but those of pixels: most have a few hundred bytes, and readers walk over all of
# what is in them. Some are inflated as it is opened, to 1 MiB each.
_LARGE_PIECE_BYTES = 64 * 2**10
_INFLATED = (b"iCCP", b"iTXt", b"zTXt")
_MOST_INFLATED = 4
_CHUNK = Struct(">I4s")  # length, kind
_AROUND_CHUNK = 12  # bytes: these, and the checksum at its end
_SIZE = Struct(">II")  # width, height

# Markers of ITU-T T.81, table B.1.
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}  # where a scan has all components, it is the only one
_BARE = {*range(0xC0), *range(0xD0, 0xDA), 0xFF}  # no length follows
_SCAN = 0xDA
# 0xFF, kind, length; of a frame also precision, height, width and components; of a scan components.
_SEGMENT = Struct(">BBHBHHB")


def takes_long(body: bytes) -> bool:
    """Return whether `body` is a picture that others should not wait for."""
    if body.startswith(b"\x89PNG"):
        return _is_large_png(body)
    if body.startswith(b"\xff\xd8"):
        return len(body) > _LARGE_JPEG_BYTES or _is_large_jpeg(body)
    return False


def _is_large_png(body: bytes) -> bool:
    at, pixels, inflated = 8, 0, 0
    for _ in range(_PIECES):
        if at + _CHUNK.size > len(body):  # cut short: no more is read
            return False
        length, kind = _CHUNK.unpack_from(body, at)
        if kind == b"IEND":
            return False
        if length > _LARGE_PIECE_BYTES and kind != b"IDAT":
            return True
        if kind == b"IHDR":
            if pixels or at + _CHUNK.size + _SIZE.size > len(body):  # readers take the last header
                return True
            width, height = _SIZE.unpack_from(body, at + _CHUNK.size)
            pixels = width * height
            if pixels > _LARGE_PIXELS:
                return True
        elif kind in _INFLATED:
            inflated += 1
            if inflated > _MOST_INFLATED:
                return True
        at += length + _AROUND_CHUNK
    return True


def _is_large_jpeg(body: bytes) -> bool:
    """Return whether its scans together go over many pixels.

    A small body has room for thousands of scans, each of all pixels.
    """
    at, pixels, components = 2, 0, 0
    for _ in range(_PIECES):
        if at + _SEGMENT.size > len(body):
            return True
        start, kind, length, first, height, width, last = _SEGMENT.unpack_from(body, at)
        if start != 0xFF or kind in _BARE:
            return True
        if kind == _SCAN:
            scans = 1 if first == components else body.count(b"\xff\xda", at)
            return not 0 < scans * pixels <= _LARGE_PIXELS
        if kind in _FRAMES:
            if pixels:
                return True
            pixels = height * width
            components = last if kind in _SEQUENTIAL else 0
        at += 2 + length
    return True
