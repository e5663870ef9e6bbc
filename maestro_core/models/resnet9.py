"""A residual network of nine layers for 32×32 pictures that trains in few epochs.

The layout of David Page's DAWNBench entry (2018), narrower at the end: 2.44 M parameters, 285 M
MACs. All its convolutions are 3×3, so nearly all its MACs are in layers worth factorising.
"""

from typing import cast

from torch import Tensor, nn

# What the logits are divided by: at 1 the first softmax is so sure that little is learned from it.
TEMPERATURE = 8


class Convolution(nn.Sequential):
    """A 3×3 convolution, batch normalisation and ReLU; with `pool`, then 2×2 max-pooling."""

    def __init__(self, channels_in: int, channels: int, pool: bool = False) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            *([nn.MaxPool2d(2)] if pool else []),
        )


class Residual(nn.Module):
    """The input plus two convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            Convolution(channels, channels), Convolution(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, channels, h, w) for x of the same shape."""
        return cast(Tensor, x + self.convolutions(x))


class ResNet9(nn.Module):
    """Eight convolutions, two of the pairs residual, then the maximum over positions and a map.

    `width` multiplies how many channels there are.
    """

    def __init__(self, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        a, b, c = (max(1, round(width * n)) for n in (64, 128, 256))
        self.body = nn.Sequential(
            Convolution(3, a),  # (b, 64, 32, 32)
            Convolution(a, b, pool=True),  # (b, 128, 16, 16)
            Residual(b),
            Convolution(b, c, pool=True),  # (b, 256, 8, 8)
            Convolution(c, c, pool=True),  # (b, 256, 4, 4)
            Residual(c),
        )
        self.head = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, classes) of pictures (b, 3, 32, 32)."""
        return cast(Tensor, self.head(self.body(x).amax((2, 3))) / TEMPERATURE)
