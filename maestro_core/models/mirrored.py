"""A network that answers for a picture and its mirror image together."""

from typing import cast

import torch
from torch import Tensor, nn


class Mirrored(nn.Module):
    """In inference the mean of what `network` answers to a picture and to its mirror image.

    It takes twice the MACs and learns nothing more, so a network half as large is trained for it,
    for twice as many epochs in the same time. In training `network` alone runs: pictures are turned
    at random there.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, classes) of pictures (b, channels, h, w)."""
        if self.training:
            return cast(Tensor, self.network(x))
        both = self.network(torch.cat((x, x.flip(3))))  # (2·b, classes)
        return cast(Tensor, both.unflatten(0, (2, -1)).mean(0))
