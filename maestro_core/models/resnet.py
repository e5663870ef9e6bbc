"""ResNet-18 for 32×32 pictures: a 3×3 stem and no pooling before the blocks (11.17 M parameters).

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with the CIFAR stem.
"""

from typing import cast

from torch import Tensor, nn


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
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, channels, h / stride, w / stride) for x (b, channels_in, h, w)."""
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y))
        return cast(Tensor, (y + self.shortcut(x)).relu())


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
        x = self.norm(self.stem(x)).relu()  # (b, 64, 32, 32)
        x = self.blocks(x)  # (b, 512, 4, 4)
        return cast(Tensor, self.head(x.mean((2, 3))))
