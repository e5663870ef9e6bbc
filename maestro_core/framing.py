"""From an opened picture to the pixels of the input: the same in training as on the server.

No torch.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps

from maestro_core.artifact import Image

Box = tuple[float, float, float, float]  # left, upper, right, lower, in the picture's pixels


def upright(picture: Pillow.Image, wanted: Image) -> Pillow.Image:
    """Return `picture` decoded, turned as its EXIF says, in the mode that is wanted.

    Raises:
        Exception: it is broken or cut short; decoders and readers of tags raise anything.
    """
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)  # else it is copied, turned or not
    return picture if picture.mode == wanted.mode else picture.convert(wanted.mode)


def middle(wanted: Image, width: int, height: int) -> Box:
    """Return the part of a picture of that size that becomes the input.

    The whole; with `wanted.shorter` what is in the middle once the shorter side is of that length.
    """
    if wanted.shorter is None:
        return (0, 0, width, height)
    scale = min(width, height) / wanted.shorter
    w, h = scale * wanted.width, scale * wanted.height
    left, top = (width - w) / 2, (height - h) / 2
    # A rounding must not lead out of the picture.
    return (max(0.0, left), max(0.0, top), min(width, left + w), min(height, top + h))


def pixels(picture: Pillow.Image, wanted: Image, box: Box) -> NDArray[np.uint8]:
    """Return that part of an upright picture, (height, width, channels), in the size wanted."""
    size = (wanted.width, wanted.height)
    resized = picture.resize(size, Pillow.Resampling.BILINEAR, box)
    return np.asarray(resized).reshape(wanted.height, wanted.width, -1)
