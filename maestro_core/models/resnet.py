"""ResNet-18 for 32×32 pictures (11.17 M parameters) and ResNet-50 for 224×224 ones (25.56 M).

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. ResNet-18 has the CIFAR stem:
3×3, and no pooling before the blocks.
"""

from typing import cast

from torch import Tensor, nn

from maestro_core.normalised import normalised


class Shortcut(nn.Sequential):
    """A 1×1 convolution and its normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, channels, h / stride, w / stride) for x (b, channels_in, h, w)."""
        convolution, norm = self
        return normalised(convolution, cast(nn.BatchNorm2d, norm), x)


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut, 1×1 where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = Shortcut(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, channels, h / stride, w / stride) for x (b, channels_in, h, w)."""
        y = normalised(self.conv1, self.norm1, x).relu_()
        y = normalised(self.conv2, self.norm2, y)
        return y.add_(self.shortcut(x)).relu_()


class ResNet18(nn.Module):
    """Four stages of two blocks, then the mean over positions and one linear layer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        self.blocks = nn.Sequential(
            *(
                Block(widths[stage] if first else width, width, 2 if first and stage else 1)
                for stage, width in enumerate(widths[1:])
                for first in (True, False)
            )
        )
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, classes) of pictures (b, 3, 32, 32)."""
        x = normalised(self.stem, self.norm, x).relu_()  # (b, 64, 32, 32)
        x = self.blocks(x)  # (b, 512, 4, 4)
        return cast(Tensor, self.head(x.mean((2, 3))))


class Bottleneck(nn.Module):
    """1×1 to fewer channels, 3×3 on them, 1×1 to four times as many, and a shortcut.

    The 3×3 convolution has the stride, not the first one as in the paper: 4.09 GMACs, not 3.86.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = 4 * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = Shortcut(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, 4 · channels, h / stride, w / stride) for x (b, channels_in, h, w)."""
        y = normalised(self.conv1, self.norm1, x).relu_()
        y = normalised(self.conv2, self.norm2, y).relu_()
        y = normalised(self.conv3, self.norm3, y)
        return y.add_(self.shortcut(x)).relu_()


class ResNet50(nn.Module):
    """Four stages of 3, 4, 6 and 3 blocks, then the mean over positions and one linear layer.

    `width` multiplies how many channels there are.
    """

    def __init__(self, classes: int = 1_000, width: float = 1.0) -> None:
        super().__init__()
        a, b, c, d = (max(1, round(width * n)) for n in (64, 128, 256, 512))
        self.stem = nn.Conv2d(3, a, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(a)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.Sequential(
            _stage(a, a, 3, 1),
            _stage(4 * a, b, 4, 2),
            _stage(4 * b, c, 6, 2),
            _stage(4 * c, d, 3, 2),
        )
        self.head = nn.Linear(4 * d, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, classes) of pictures (b, 3, 224, 224)."""
        x = self.pool(normalised(self.stem, self.norm, x).relu_())  # (b, 64, 56, 56)
        x = self.stages(x)  # (b, 2048, 7, 7)
        return cast(Tensor, self.head(x.mean((2, 3))))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Return a stage whose first block has the stride."""
    rest = (Bottleneck(4 * channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(channels_in, channels, stride), *rest)
