"""LeNet for 28×28 digits, as in the paper's MNIST runs: 44,426 parameters, 281,640 MACs."""

from typing import cast

from torch import Tensor, nn


class LeNet(nn.Module):
    """Two 5×5 convolutions without padding and three linear layers; ReLU and 2×2 max-pooling.

    `width` multiplies how many channels and features there are between input and output.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        a, b, c, d = (max(1, round(width * n)) for n in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(1, a, 5)
        self.conv2 = nn.Conv2d(a, b, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * b, c)
        self.fc2 = nn.Linear(c, d)
        self.fc3 = nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, 10) of pictures (b, 1, 28, 28)."""
        x = self.pool(self.conv1(x).relu())  # (b, 6, 12, 12)
        x = self.pool(self.conv2(x).relu())  # (b, 16, 4, 4)
        x = self.fc1(x.flatten(1)).relu()  # (b, 120)
        x = self.fc2(x).relu()  # (b, 84)
        return cast(Tensor, self.fc3(x))
