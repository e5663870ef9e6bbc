"""Low-rank ordered decomposition: sampling, group lasso, importance, shrinking.

The method of Horváth, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via
Trainable Decomposition", ICML 2024 (arXiv 2308.14929), and nothing else.
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from maestro_core.factorize import low_rank_layers
from maestro_core.layers import LowRankLayer


def sample(ranks: Sequence[int], rng: Random) -> tuple[int, int]:
    """Return (layer index, rank), uniform over all pairs with 1 <= rank <= ranks[index].

    A layer is drawn in proportion to its rank (Algorithm 1). No list of the pairs is made.

    Raises:
        ValueError: every rank is 0, so there is nothing to draw.
    """
    total = sum(ranks)
    if total == 0:
        raise ValueError(f"all {len(ranks)} layers are at rank 0: nothing to sample")
    drawn = rng.randrange(total)
    index = 0
    while drawn >= ranks[index]:
        drawn -= ranks[index]
        index += 1
    return index, drawn + 1


def group_lasso(layers: Iterable[LowRankLayer]) -> Tensor:
    """Return the hierarchical group lasso, a scalar: Σ_layers Σ_b ‖up[b:]‖ + ‖down[b:]‖ (§3.2).

    Each group is a rank and all later ones, so the last ranks are pushed hardest.

    Raises:
        ValueError: there are no layers.
    """
    terms = [suffix_norms(factor).sum() for layer in layers for factor in (layer.down, layer.up)]
    if not terms:
        raise ValueError("the network has no factorised layer")
    return torch.stack(terms).sum()


def suffix_norms(factor: Tensor) -> Tensor:
    """Return ‖factor[b:]‖ for every b, (rank,), never rising; its gradient at zero is zero.

    Rows are squared and summed once, then accumulated from the end: O(rank) beyond the first pass.
    """
    return cast(Tensor, _SuffixNorms.apply(factor))  # type: ignore[no-untyped-call]


def row_squares(factor: Tensor) -> Tensor:
    """Return ‖factor[b]‖² for every b, (rank,)."""
    rest = tuple(range(1, factor.dim()))  # flattened, it would be copied
    return cast(Tensor, torch.linalg.vector_norm(factor, dim=rest)).square()


class _SuffixNorms(Function):
    """Norms whose gradient is a multiple of each row: one pass in the place of several."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor) -> Tensor:  # noqa: ANN401  torch's, not typed
        norms = row_squares(factor).flip(0).cumsum(0).flip(0).sqrt()
        ctx.save_for_backward(factor, norms)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        factor, norms = ctx.saved_tensors
        # ‖factor[b:]‖ changes by factor[i] / ‖factor[b:]‖ for each i >= b; what is zero stays.
        times = torch.where(norms > 0, gradient / norms, 0).cumsum(0)
        gradient_of_rows: Tensor = factor * times.view(-1, *(1 for _ in factor.shape[1:]))
        return gradient_of_rows


def importance(layer: LowRankLayer) -> Tensor:
    """Return the importance of each rank, (rank,), never rising.

    It bounds what is lost by cutting just before the rank: ‖up[b:]‖ · ‖down[b:]‖ (§3.2).
    """
    with torch.no_grad():
        return suffix_norms(layer.up) * suffix_norms(layer.down)


def shrink_(model: nn.Module, optimizer: Optimizer | None, threshold: float) -> dict[str, int]:
    """Remove the ranks whose importance is at most `threshold`; return the new ranks by layer.

    Rows leave the weights, their gradients and the optimiser's state; parameters keep their
    identity (Algorithm 1, progressive shrinking). A layer may come to rank 0: its bias remains.
    Call it between steps: autograd remembers the old shapes as long as an earlier output is kept.
    """
    for layer in low_rank_layers(model).values():
        truncate_(layer, int((importance(layer) > threshold).sum()), optimizer)
    return {name: layer.rank for name, layer in low_rank_layers(model).items()}


def truncate_(layer: LowRankLayer, rank: int, optimizer: Optimizer | None = None) -> None:
    """Cut `layer` to its first `rank` components for good, with its optimiser state.

    Raises:
        ValueError: the layer has fewer.
    """
    if not 0 <= rank <= layer.rank:
        raise ValueError(f"this layer has ranks 0..{layer.rank}, not {rank}")
    if rank == layer.rank:
        return
    for factor in (layer.down, layer.up):
        state = {} if optimizer is None else optimizer.state.get(factor, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == factor.shape:
                state[key] = value[:rank].clone()
        grad = factor.grad
        factor.grad = None
        factor.data = factor.data[:rank].clone()
        factor.grad = None if grad is None else grad[:rank].clone()
