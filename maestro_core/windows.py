"""Filters for a first layer that need no training: they whiten the windows of pictures."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_VARIANCE = 5e-4  # added to each: a direction that is never seen is not blown up


def whitening_filters(x: Tensor, size: int) -> Tensor:
    """Return filters (2·n, channels, size, size) for x (b, channels, h, w); n = channels·size².

    The first n give each window of the pictures along the axes of its second moments, each with a
    mean square of 1; the others are their negatives, so that a ReLU after them loses nothing.
    Source: David Page, How to Train Your ResNet 8 (2019).
    """
    windows = F.unfold(x, size).transpose(1, 2).flatten(0, 1).double()
    values, axes = torch.linalg.eigh(windows.t() @ windows / len(windows))
    filters = (axes / (values + LEAST_VARIANCE).sqrt()).t().to(x.dtype)
    filters = filters.reshape(-1, x.shape[1], size, size)
    return torch.cat([filters, -filters])
