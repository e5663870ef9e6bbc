"""One copy of the weights of all points in huge pages, which every session reads at one address.

Mapped from a file, weights lie in pages of 4 KiB and, for every session, at other addresses. In
huge pages points are faster, supposedly as kernels wait less for page tables
(benchmarks/results/engine.json). The price is memory that the system can't drop, and that no other
process shares.
"""

import errno
import mmap
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort

from server.baking import Baked, Plain

When = Literal["auto", "always", "never"]

_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SIZE_BYTES = 2 * 2**20
_MOST = 2.0  # times the weights of the largest point


def huge_pages_exist() -> bool:
    """Return whether the system gives huge pages to who asks for them."""
    try:
        return "[never]" not in _ENABLED.read_text(encoding="ascii")
    except OSError:
        return False


def are_worth_it(baked: Baked) -> bool:
    """Return whether the copy fills a huge page and is at most twice the largest point's weights.

    It is more where points share little.
    """
    largest = max(baked.mapped_bytes([point]) for point in range(len(baked.pages)))
    return _SIZE_BYTES <= baked.plain_bytes <= _MOST * largest


class HugePages:
    """The beginning of a file of weights, read once; sessions that use it must not outlive it."""

    def __init__(self, path: Path, length: int) -> None:
        """Read `length` bytes.

        Raises:
            OSError: the file can't be read, or there is not so much memory.
        """
        self._mapping = mmap.mmap(-1, length + _SIZE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._mapping, np.uint8)
        begin = -whole.ctypes.data % _SIZE_BYTES
        self._bytes = whole[begin : begin + length]
        with path.open("rb") as file:
            if file.readinto(memoryview(self._mapping)[begin : begin + length]) < length:
                raise OSError(errno.EIO, f"{path}: it ends before byte {length}")
        self._given: dict[Plain, ort.OrtValue] = {}

    def give(self, weights: Iterable[Plain], options: ort.SessionOptions) -> None:
        """Have a session made with `options` compute with this copy of `weights`."""
        for plain in weights:
            options.add_initializer(plain.name, self._value(plain))

    def _value(self, plain: Plain) -> ort.OrtValue:
        if plain not in self._given:
            end = plain.offset + 4 * prod(plain.shape)
            array = self._bytes[plain.offset : end].view(np.float32).reshape(plain.shape)
            self._given[plain] = ort.OrtValue.ortvalue_from_numpy(array)  # of the same memory
        return self._given[plain]
