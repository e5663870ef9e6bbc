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


def distillation_loss(logits: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of logits (…, classes) on answers, probabilities of the same shape.

    Places (…) whose label is IGNORED don't count. None is taken out: how many there are would have
    to be known first, and for that a host waits for its GPU.
    """
    if labels.dim() == 1:  # pictures: every one has a label
        return F.cross_entropy(logits, answers)
    losses = F.cross_entropy(logits.flatten(0, -2), answers.flatten(0, -2), reduction="none")
    counts = labels.flatten() != IGNORED
    return losses.where(counts, 0.0).sum() / counts.sum()
