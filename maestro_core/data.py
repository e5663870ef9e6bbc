"""Labelled pictures, split into training, validation and test, and how an .npz file is read.

Validation pictures choose; test pictures only score. (A host that looks for points of its own has
none but the first test pictures: benchmarks/host_points.py.)
"""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from maestro_core.artifact import Image
from maestro_core.picture_files import PictureFiles

# What a network is called with: pictures, or the two sides of pairs of sentences.
Inputs = Tensor | tuple[Tensor, Tensor]

KEYS = ("x_train", "y_train", "x_test", "y_test")


class DataError(ValueError):
    """Data that can't be used; the message names the file, and the array or folder."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What training changes of a picture: a shift by at most `shift` pixels, a flip, a hole.

    `cutout` is the side of a square that is made black, all of it inside (DeVries and Taylor, 2017,
    who let it reach over the edge). What is shifted in is black too. Nothing is drawn where nothing
    is changed.
    """

    shift: int = 0
    flip: bool = False
    cutout: int = 0

    def apply(self, pixels: Tensor) -> Tensor:
        """Return pixels like `pixels`, (b, h, w, channels) uint8; each picture has its own draw."""
        b, height, width, _ = pixels.shape
        if self.shift:
            edge = (0, 0, self.shift, self.shift, self.shift, self.shift)
            pixels = F.pad(pixels, edge)
        rows, columns = torch.arange(height).expand(b, -1), torch.arange(width).expand(b, -1)
        if self.flip:
            columns = torch.where(torch.rand(b, 1) < 0.5, columns, width - 1 - columns)
        if self.shift:
            rows = rows + torch.randint(2 * self.shift + 1, (b, 1))
            columns = columns + torch.randint(2 * self.shift + 1, (b, 1))
        if self.shift or self.flip:
            pixels = pixels[torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]]
        if not self.cutout:
            return pixels
        within = self._hole(height, b)[:, :, None] & self._hole(width, b)[:, None, :]
        return pixels.masked_fill(within[..., None], 0)

    def _hole(self, length: int, b: int) -> Tensor:
        """Return where along a side of that length the hole of each of b pictures is."""
        start = torch.randint(length - self.cutout + 1, (b, 1))
        place = torch.arange(length)
        return (start <= place) & (place < start + self.cutout)


# What pictures are distorted by at most, at strength 1.
_TURN = math.pi / 12
_ZOOM = math.log(1.25)
_SHEAR = 0.1
_COLOUR = 0.3


def distorted(pixels: Tensor, strength: float) -> Tensor:
    """Return pictures turned, zoomed, sheared and recoloured at random, each in its own way.

    (b, h, w, channels) uint8 in and out. Brightness, contrast and saturation change one after the
    other. What is beyond the edge is black.
    """
    b = len(pixels)
    turn, zoom, x_shear, y_shear, *colours = strength * (2 * torch.rand(7, b) - 1)
    cos, sin = (_TURN * turn).cos(), (_TURN * turn).sin()
    scale, none = (_ZOOM * zoom).exp(), torch.zeros(b)
    rows = [cos, _SHEAR * x_shear - sin, none, _SHEAR * y_shear + sin, cos, none]
    affine = torch.stack(rows, 1).view(b, 2, 3) * scale[:, None, None]
    x = pixels.permute(0, 3, 1, 2).float()
    x = F.grid_sample(x, F.affine_grid(affine, list(x.shape), False), align_corners=False)
    brightness, contrast, saturation = (1 + _COLOUR * c.view(b, 1, 1, 1) for c in colours)
    x = x * brightness
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + contrast * (x - mean)
    grey = x.mean(1, keepdim=True)
    changed: Tensor = (grey + saturation * (x - grey)).clamp(0, 255).round().byte()
    return changed.permute(0, 2, 3, 1)


NO_AUGMENTATION = Augmentation()
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Pictures (n, h, w, channels) uint8, in memory or not, and their labels (n,) int64.

    Batches are put on `device`. `augmentation` is of pictures in memory: files have a crop.
    """

    pixels: Tensor | PictureFiles
    labels: Tensor
    image: Image
    augmentation: Augmentation = NO_AUGMENTATION
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Self:
        """Return the first `count` pictures, or all where there are fewer, in memory."""
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count])

    def batch(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return the network's input (b, channels, h, w) float32, and the labels (b,)."""
        return self._ready(self.pixels[indices], indices)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what `batch` returns for all pictures in order, divided `evenly`."""
        parts = evenly(len(self), size)
        if isinstance(self.pixels, Tensor):
            yield from map(self.batch, parts)
        else:
            yield from map(self._ready, self.pixels.read(parts), parts)

    def augmented(
        self, batches: Sequence[Tensor], distortion: float = 0.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what `batch` returns for each of `batches`, of pictures changed at random.

        With a `distortion`, of that strength, they are distorted too. All that is random comes from
        torch's generator.
        """
        read: Iterator[Tensor]
        if isinstance(self.pixels, Tensor):
            read = map(self.pixels.__getitem__, batches)
        else:
            read = self.pixels.read(batches, int(torch.randint(2**62, ())))
        for pixels, indices in zip(read, batches, strict=True):
            changed = distorted(pixels, distortion) if distortion else pixels
            if isinstance(self.pixels, Tensor):
                changed = self.augmentation.apply(changed)
            yield self._ready(changed, indices)

    def _ready(self, pixels: Tensor, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, device=self.device) for values in (self.image.mean, self.image.std)
        )
        # The channels stay innermost in memory: convolutions are faster so.
        x = ((_sent(pixels, self.device).float() / 255 - mean) / std).permute(0, 3, 1, 2)
        return x, _sent(self.labels[indices], self.device)


def evenly(n: int, size: int) -> list[slice]:
    """Return the fewest slices of 0..n of at most `size`, whose lengths differ by at most one.

    A last one of few samples, or of one, would be normalised by batch as no other is.
    """
    count = math.ceil(n / size)
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy on `device`, on its way: a GPU is not waited for."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """The three splits, what they came from, and the names of its classes where it has them.

    `scoring` is what the data itself calls the pictures that are `test` here.
    """

    train: Pictures
    validation: Pictures
    test: Pictures
    name: str
    sha256: str
    classes: tuple[str, ...] = ()
    scoring: str = "test"

    def on(self, device: torch.device) -> Self:
        """Return the same data, whose batches are put on `device`."""
        train, validation, test = (
            replace(part, device=device) for part in (self.train, self.validation, self.test)
        )
        return replace(self, train=train, validation=validation, test=test)


def load(
    path: Path,
    image: Image,
    classes: int,
    validation: int,
    seed: int,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Data:
    """Read `path`, an .npz in Keras' layout: x_train, y_train, x_test, y_test.

    Pictures are uint8, (n, h, w) or (n, h, w, channels); labels are integers 0..classes-1.
    `validation` pictures, drawn by `seed`, leave the training set, which alone is augmented.

    Raises:
        DataError: the file is missing or broken, or an array is absent or wrong.
    """
    arrays = _read(path)
    train, test = (_pictures(path, arrays, part, image, classes) for part in ("train", "test"))
    if not 0 < validation < len(train):
        raise DataError(
            f"{path}: x_train has {len(train)} pictures; {validation} can't be for validation"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Data(
        train=replace(_subset(train, order[validation:]), augmentation=augmentation),
        validation=_subset(train, order[:validation]),
        test=test,
        name=path.stem,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    if path.is_dir():
        raise DataError(f"{path}: a folder; this recipe reads an .npz file")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not an .npz file, or only part of one")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file]
            if missing:
                found = ", ".join(file.files) or "nothing"
                raise DataError(f"{path}: '{missing[0]}' is missing; the file holds {found}")
            return {key: file[key] for key in KEYS}
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz file without objects: {error}") from error


def _pictures(
    path: Path, arrays: dict[str, NDArray[np.generic]], part: str, image: Image, classes: int
) -> Pictures:
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    channels = len(image.mean)
    if x.ndim == 3:
        x = x[..., None]
    shape = (image.height, image.width, channels)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != shape or not len(x):
        raise DataError(
            f"{path}: x_{part} is {x.dtype} {arrays[f'x_{part}'].shape}; "
            f"it must be uint8 (n, {', '.join(map(str, shape))})"
        )
    if y.dtype.kind not in "iu" or y.size != len(x) or y.shape not in ((len(x),), (len(x), 1)):
        raise DataError(f"{path}: y_{part} is {y.dtype} {y.shape}; it must be integers ({len(x)},)")
    labels = y.reshape(-1).astype(np.int64)
    wrong = y.reshape(-1)[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise DataError(f"{path}: y_{part} has label {wrong[0]}; labels are 0..{classes - 1}")
    return Pictures(torch.from_numpy(x), torch.from_numpy(labels), image)


def _subset(pictures: Pictures, indices: Tensor) -> Pictures:
    return Pictures(pictures.pixels[indices], pictures.labels[indices], pictures.image)
