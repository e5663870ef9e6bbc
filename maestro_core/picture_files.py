"""Pictures that are read from disk when they are asked for, several batches ahead.

Knows how a file becomes pixels. Which files there are, and of what class, is folders.py's.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from maestro_core import framing
from maestro_core.artifact import Image
from maestro_core.framing import Box

AHEAD = 4  # batches that are being read while one is worked on
ATTEMPTS = 10
LARGEST_RATIO = 4 / 3


class PictureError(ValueError):
    """A file that holds no picture, or only part of one; the message names it."""


@dataclass(frozen=True, slots=True)
class Crop:
    """What training takes of a picture: a random part, flipped or not.

    The part is at least `least_area` of the whole, 0..1, and its sides are 3:4 to 4:3 (Szegedy et
    al., "Going Deeper with Convolutions", CVPR 2015, §6).
    """

    least_area: float = 0.08
    flip: bool = True

    def draw(self, width: int, height: int, rng: Random) -> tuple[Box, bool]:
        """Return the part of a picture of that size, and whether it is flipped."""
        flipped = self.flip and rng.random() < 0.5
        for _ in range(ATTEMPTS):
            area = width * height * rng.uniform(self.least_area, 1)
            ratio = LARGEST_RATIO ** rng.uniform(-1, 1)
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
                return (left, top, min(left + w, width), min(top + h, height)), flipped
        side = min(width, height)  # of a very long picture: the square in the middle
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side), flipped


@dataclass(frozen=True, slots=True, eq=False)
class PictureFiles:
    """Pictures in the files `names` below `root`, indexed as (n, h, w, channels) uint8 would be.

    They become what `image` says; `crop` is what training takes of them. `workers` threads read:
    Pillow decodes and resizes without Python's lock, and threads hand over pixels without a copy.
    """

    root: Path
    names: list[str]
    image: Image
    workers: int
    crop: Crop | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        (pixels,) = self.read([indices])
        return pixels

    def read(self, batches: Iterable[Tensor | slice], seed: int | None = None) -> Iterator[Tensor]:
        """Yield the pixels of each batch, (b, h, w, channels) uint8, and read those to come.

        With a `seed` a picture is cropped as the seed and its index say, whatever else is read and
        by how many workers; else it is framed as for serving.

        Raises:
            PictureError: a file is no PNG or JPEG picture, or is cut short.
        """
        reading: deque[tuple[Tensor, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for batch in batches:
                    reading.append(self._start(pool, batch, seed))
                    if len(reading) > AHEAD:
                        yield _finished(*reading.popleft())
                while reading:
                    yield _finished(*reading.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _start(
        self, pool: ThreadPoolExecutor, batch: Tensor | slice, seed: int | None
    ) -> tuple[Tensor, list[Future[None]]]:
        chosen = range(len(self))[batch] if isinstance(batch, slice) else batch.tolist()
        shape = (len(chosen), self.image.height, self.image.width, len(self.image.mean))
        pixels = torch.empty(shape, dtype=torch.uint8)
        rows = zip(pixels.numpy(), chosen, strict=True)
        return pixels, [pool.submit(self._read_into, row, index, seed) for row, index in rows]

    def _read_into(self, row: NDArray[np.uint8], index: int, seed: int | None) -> None:
        path = self.root / self.names[index]
        try:
            with Pillow.open(path, formats=("PNG", "JPEG")) as picture:
                if picture.mode.startswith(("I", "F")):
                    raise PictureError(f"{path}: has more than 8 bits per channel")
                upright = framing.upright(picture, self.image)
        except PictureError:
            raise
        except Exception as error:  # decoders and readers of tags raise anything
            raise PictureError(f"{path}: not a whole PNG or JPEG picture: {error}") from error
        box, flipped = framing.middle(self.image, *upright.size), False
        if self.crop and seed is not None:
            box, flipped = self.crop.draw(*upright.size, Random(f"{seed}/{index}"))
        pixels = framing.pixels(upright, self.image, box)
        row[:] = pixels[:, ::-1] if flipped else pixels


def _finished(pixels: Tensor, rows: list[Future[None]]) -> Tensor:
    for row in rows:
        row.result()
    return pixels
