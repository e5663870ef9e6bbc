"""A residual network for 32×32 pictures that trains in few epochs: nine 3×3 convolutions.

Three stages of three convolutions, the last two of each residual; a stage begins with half as many
rows and columns. What makes it learn fast from its first step is David Page's (How to Train Your
ResNet, 2019) and Keller Jordan's (94 % on CIFAR-10 in 3.29 seconds, 2024): a fixed first layer that
whitens windows, pooling before normalisation, and convolutions that begin as the identity.
5.5 M parameters and 377 M MACs, nearly all in layers worth factorising.
"""

from typing import cast

import torch
from torch import Tensor, nn

from maestro_core.data import Pictures
from maestro_core.windows import whitening_filters

# What the logits are divided by: at 1 the first softmax is so sure that little is learned from it.
TEMPERATURE = 8
WINDOW = 2
WHITENED_BY = 5_000  # pictures


class Convolution(nn.Sequential):
    """A 3×3 convolution, with `pool` 2×2 max-pooling, then batch normalisation and ReLU.

    Its first channels begin as copies of the input's. Pooling comes first, so that less is left to
    normalise. Normalisation learns a shift but no scale: at a high rate, scales of channels end at
    zero.
    """

    def __init__(self, channels_in: int, channels: int, pool: bool = False) -> None:
        convolution = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        with torch.no_grad():
            nn.init.dirac_(convolution.weight[:channels_in])
        normalisation = nn.BatchNorm2d(channels)
        normalisation.weight.requires_grad_(False)
        super().__init__(
            convolution,
            *([nn.MaxPool2d(2)] if pool else []),
            normalisation,
            nn.ReLU(inplace=True),
        )


class Stage(nn.Module):
    """A convolution to half the height and width, then two that are added to what they read."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.first = Convolution(channels_in, channels, pool=True)
        self.residual = nn.Sequential(
            Convolution(channels, channels), Convolution(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, channels, h // 2, w // 2) for x (b, channels_in, h, w)."""
        x = self.first(x)
        return cast(Tensor, x + self.residual(x))


class ResNet9(nn.Module):
    """Three stages, then the maximum over positions and a linear map.

    `width` multiplies how many channels there are. Before them comes a small convolution that is
    never trained; `prepare_` sets it.
    """

    def __init__(self, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        a, b, c = (max(1, round(width * n)) for n in (128, 384, 256))
        filters = 2 * 3 * WINDOW**2
        self.whitening = nn.Conv2d(3, filters, WINDOW, bias=False)
        self.whitening.requires_grad_(False)
        self.body = nn.Sequential(
            nn.ReLU(),  # (b, 24, 31, 31)
            Stage(filters, a),  # (b, 128, 15, 15)
            Stage(a, b),  # (b, 384, 7, 7)
            Stage(b, c),  # (b, 256, 3, 3)
        )
        self.head = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, classes) of pictures (b, 3, 32, 32)."""
        return cast(Tensor, self.head(self.body(self.whitening(x)).amax((2, 3))) / TEMPERATURE)


def prepare_(model: nn.Module, pictures: Pictures) -> None:
    """Set the first layer of the ResNet9 in `model` by the pictures it is to be trained on."""
    found = [module for module in model.modules() if isinstance(module, ResNet9)]
    if not found:
        raise TypeError(f"a {type(model).__name__} has no layer that whitens")
    x, _ = pictures.batch(slice(0, WHITENED_BY))
    for network in found:
        network.whitening.weight.data = whitening_filters(x, WINDOW)
