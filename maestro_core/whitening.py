"""Factors ordered by what they matter on data, not by singular values of the weights alone.

Of all matrices of rank r the truncation at r of the whitened SVD changes a layer's output least,
in the mean of squares over the data (DRONE, Chen et al., NeurIPS 2021; SVD-LLM, Wang et al., 2024).
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_core.data import Inputs
from maestro_core.factorize import low_rank_layers
from maestro_core.layers import LowRankConv2d, LowRankEmbedding, LowRankLinear
from maestro_core.normalisation import evaluating
from maestro_core.sentences import Samples, Sentences

SHRINKAGE = 1e-4  # of the mean variance, added to each: a direction never seen has none


Whitenable = LowRankLinear | LowRankConv2d


def whiten_(model: nn.Module, batches: Iterable[Inputs]) -> None:
    """Give every factorised layer factors that are best, at each rank, on inputs like `batches`.

    A batch is what `model` takes. At its present rank a layer computes what it did. Layers that
    the batches never reach keep their factors, and so do embeddings: their inputs are no vectors.
    """
    moments = second_moments(model, batches)
    for name, layer in _layers(model).items():
        if name in moments:
            _rotate_(layer, moments[name])


def sample_inputs(samples: Samples) -> Iterator[Inputs]:
    """Yield inputs to whiten by, a few at a time: more than 512 say no more (FlexRank, 2026).

    Sentences come one by one, so that none is padded: padding is no data.
    """
    few = samples.first(512)
    size = 1 if isinstance(few, Sentences) else 16
    for start in range(0, len(few), size):
        yield few.batch(slice(start, start + size))[0]


def second_moments(model: nn.Module, batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """Return by factorised layer Σ x xᵀ, (fan_in, fan_in) float64, over all its inputs x.

    The input of a convolution is each window, in·kh·kw values. The model is in inference mode.
    """
    moments: dict[str, Tensor] = {}

    def add(name: str, layer: Whitenable, x: Tensor) -> None:
        rows = _rows(layer, x)
        moments[name] = moments.get(name, 0) + (rows.t() @ rows).double()

    handles = [
        layer.register_forward_pre_hook(lambda module, x, name=name: add(name, module, x[0]))
        for name, layer in _layers(model).items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _layers(model: nn.Module) -> dict[str, Whitenable]:
    return {
        name: layer
        for name, layer in low_rank_layers(model).items()
        if not isinstance(layer, LowRankEmbedding)
    }


def _rows(layer: Whitenable, x: Tensor) -> Tensor:
    """Return every vector that `down` is applied to, (n, fan_in)."""
    if not isinstance(layer, LowRankConv2d):
        return x.flatten(0, -2)
    windows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return windows.transpose(1, 2).flatten(0, 1)  # (b, fan_in, h'·w') -> (b·h'·w', fan_in)


def _rotate_(layer: Whitenable, moment: Tensor) -> None:
    """Set the factors to P √s and √s Rᵀ S⁻¹, where W S = P s Rᵀ and S Sᵀ is the moment."""
    weight = layer.up.detach().double().t() @ layer.down.detach().double().flatten(1)
    variance = moment.diagonal().mean()
    # The layer has seen zeros only, or answers with zeros: any order is as good.
    if not variance > 0 or not weight.any():
        return
    values, axes = torch.linalg.eigh(moment / variance)
    roots = values.clamp(min=0).add(SHRINKAGE).sqrt()
    p, s, rt = torch.linalg.svd(weight @ (axes * roots), full_matrices=False)
    scale = s[: layer.rank].sqrt()
    layer.up.data.copy_((p[:, : layer.rank] * scale).t())
    down = scale[:, None] * rt[: layer.rank] @ (axes / roots).t()
    layer.down.data.copy_(down.reshape(layer.down.shape))
