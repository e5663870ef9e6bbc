"""Cross-entropy over all places that have a label: one of a picture, one of each token."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a place that has none, as in torch


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Return the loss of logits (…, classes) on labels (…), a scalar; IGNORED ones don't count."""
    return F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def labelled(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the rows (n, classes) of logits (…, classes) whose label is not IGNORED."""
    if labels.dim() == 1:  # pictures: every one has a label
        return logits
    return logits[labels != IGNORED]
