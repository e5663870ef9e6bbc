"""A low-rank convolution and the batch normalisation after it, normalised at the cost of the rank.

Let h, of r channels, be what the first factor makes, and y = up h. With m and C the mean and the
covariance of h over batch and positions, y has the mean up·m and the variances diag(up C upᵀ). So
a step of training knows them before there is a y, and scales `up` with them: y is written once and
is normalised. Values, gradients and running statistics are those of the two layers one after the
other, but for rounding; y itself is not kept for the backward pass.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from maestro_core.layers import LowRankConv2d

# r² by outputs. Normalisation moves 9 numbers of memory for each one of y, forth and back; the
# moments of h cost 2 r² multiplications a position. Found on one core of an Intel Xeon, float32.
_MOST_SQUARED = 32
# The variance is a difference of moments: float32 leaves it three digits where the squared means,
# of y and of the terms that it adds up, are a thousand times as large. Beyond, the two layers
# compute it.
_MOST_MEAN = 1_000


def normalised(convolution: nn.Module, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return `norm(convolution(x))`, (b, out, h', w') for x (b, in, h, w).

    In one where that is cheaper: training on a CPU, without automatic mixed precision, a low-rank
    convolution without a bias whose rank is small beside its outputs.
    """
    if not isinstance(convolution, LowRankConv2d) or not _is_cheaper(convolution, norm, x):
        return cast(Tensor, norm(convolution(x)))
    h = convolution.reduce(x, convolution.down)
    n = h.numel() // h.shape[1]
    with torch.no_grad():
        mean_h, covariance_h = _moments(h, n)
        mapped = convolution.up.t() @ covariance_h  # (out, r)
        mean = mean_h @ convolution.up
        variance = (mapped * convolution.up.t()).sum(1).clamp(min=0)
        # Terms that cancel leave their rounding, each its own: their squares add up, not they.
        squared = mean.square() + mean_h.square() @ convolution.up.square()
    if (squared > _MOST_MEAN * (variance + norm.eps)).any():
        return cast(Tensor, norm(convolution.expand(h, convolution.up)))
    _remember_(norm, mean, variance * n / (n - 1))
    deviation = (variance + norm.eps).sqrt()
    given = (h, convolution.up, norm.weight, norm.bias, mean_h, mapped, deviation)
    return cast(Tensor, _Normalised.apply(*given))  # type: ignore[no-untyped-call]


def _is_cheaper(convolution: LowRankConv2d, norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Return whether one step is cheaper than two, and is the same."""
    return (
        convolution.training
        and type(norm) is nn.BatchNorm2d  # one that derives from it may compute something else
        and norm.training
        and norm.affine
        and convolution.bias is None
        and x.dim() == 4
        and len(x) > 1  # of one place there is no variance
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)  # others have too few digits for moments
        and not torch.is_autocast_enabled("cpu")
        and 0 < convolution.rank**2 <= _MOST_SQUARED * convolution.out_channels
        and not convolution.is_cheaper_whole(x, convolution.down, convolution.up)
    )


def _moments(h: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return mean (r,) and covariance (r, r) of h (b, r, h', w') over its `n` places."""
    mean = _sum(h) / n
    places = _places(h)
    return mean, places.t() @ places / n - torch.outer(mean, mean)


def _sum(x: Tensor) -> Tensor:
    """Return the sums over batch and positions; all at once takes longer."""
    return x.sum((2, 3)).sum(0)


def _places(x: Tensor) -> Tensor:
    """Return x (b, c, h', w') as (b·h'·w', c): a view where channels are innermost in memory."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _map(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `weight` (out, c) h + bias at every place of h (b, c, h', w')."""
    return F.conv2d(h, weight.contiguous()[:, :, None, None], bias)


def _remember_(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Let `norm` keep running statistics as its own call does."""
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the mean of all batches
            momentum = 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, momentum or 0.0)
    norm.running_var.lerp_(variance, momentum or 0.0)


class _Normalised(Function):
    """y = weight · (up h - mean) / deviation + bias as one map of h, with up (r, out).

    Mean and deviation depend on h and up too; the backward pass counts that.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch's, which it does not type
        h: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean_h: Tensor,
        mapped: Tensor,
        deviation: Tensor,
    ) -> Tensor:
        scaled = up.t() * (weight / deviation)[:, None]  # (out, r)
        ctx.save_for_backward(h, up, weight, mean_h, mapped, deviation, scaled)
        return _map(h, scaled, bias - scaled @ mean_h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        h, up, weight, mean_h, mapped, deviation, scaled = ctx.saved_tensors
        n = h.numel() // h.shape[1]
        d_bias = _sum(dy)
        d_scaled = _places(dy).t() @ _places(h) - torch.outer(d_bias, mean_h)
        d_scale = (d_scaled * up.t()).sum(1)
        d_variance = -0.5 * d_scale * weight / deviation**3
        d_up = d_scaled * (weight / deviation)[:, None] + 2 * d_variance[:, None] * mapped
        d_covariance = up @ (d_variance[:, None] * up.t())
        d_mean = -(d_bias @ scaled) - 2 * d_covariance @ mean_h
        # Channels innermost, so that what follows is added to it in place, in a pass less.
        d_h = _map(dy, scaled.t(), d_mean / n).contiguous(memory_format=torch.channels_last)
        _places(d_h).addmm_(_places(h), 2 / n * d_covariance)
        return d_h, d_up.t(), d_scale / deviation, d_bias, None, None, None
