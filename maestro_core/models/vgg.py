"""VGG-19 with batch normalisation for 32×32 pictures: 20.04 M parameters, 0.398 GMACs.

Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, with one linear layer.
"""

from typing import cast

from torch import Tensor, nn

# Channels of each stage's 3×3 convolutions; each stage ends in 2×2 max-pooling.
STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class VGG19(nn.Module):
    """Sixteen convolutions in five stages, then one linear layer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels, count in STAGES:
            for _ in range(count):
                layers += [
                    nn.Conv2d(before, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                ]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, classes) of pictures (b, 3, 32, 32)."""
        return cast(Tensor, self.head(self.stages(x).flatten(1)))  # (b, 512, 1, 1) -> (b, 512)
