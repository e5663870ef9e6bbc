"""The hierarchical group lasso by a proximal step, which makes ranks exactly zero.

Subgradient steps (lod.py) leave a residue at which a threshold must guess. Not in the paper.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maestro_core.layers import LowRankLayer
from maestro_core.lod import row_squares


def proximal_step_(layers: Sequence[LowRankLayer], weight: float) -> None:
    """Replace all factors Z by the minimiser of ½ ‖X − Z‖² + weight · group_lasso(X).

    The groups of a factor lie in one another, so shrinking the norm of each by `weight`, from the
    last rank alone to all ranks, is exact (Jenatton et al., JMLR 2011). After a step of SGD the
    weight is λ · rate / (1 − momentum): then loss + λ · lasso is what comes to rest.
    """
    if weight > 0:
        apply_(layers, scales(layers, weight))


def scales(layers: Sequence[LowRankLayer], weight: float) -> list[tuple[Tensor, Tensor]]:
    """Return for each layer by what the rows of `down` and `up` are multiplied, (rank,) each.

    They never rise, and are zero where a rank ends; ones for factors that are frozen.
    """
    with torch.no_grad():
        factors = [factor for layer in layers for factor in (layer.down, layer.up)]
        rows = [row_squares(factor) for factor in factors]
        found = _scales(pad_sequence(rows, batch_first=True), weight) if rows else torch.zeros(0)
        own = [
            scale[: len(factor)] if factor.requires_grad else scale.new_ones(len(factor))
            for scale, factor in zip(found, factors, strict=True)
        ]
    return list(zip(own[::2], own[1::2], strict=True))


def apply_(layers: Sequence[LowRankLayer], found: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Multiply the rows of all factors by `scales`."""
    with torch.no_grad():
        for layer, (down, up) in zip(layers, found, strict=True):
            layer.down.mul_(down.view(-1, *(1 for _ in layer.down.shape[1:])))
            layer.up.mul_(up[:, None])


def _scales(squares: Tensor, weight: float) -> Tensor:
    """Return by what each row is multiplied, (factors, rank), for its squared norms, likewise.

    Rows of zeros after a factor's last leave it as it is. All factors go at once: their number of
    ranks, not of layers, is how many steps there are, and no value is looked at by the host.
    """
    suffix = squares.new_zeros(len(squares))  # of the rows that came before, as they now are
    shrunk = []
    for b in range(squares.shape[1] - 1, -1, -1):
        norm = (squares[:, b] + suffix).sqrt()
        scale = (1 - weight / norm).clamp(min=0)  # 1 − ∞ where the norm is 0
        suffix = (scale * norm).square()
        shrunk.append(scale)
    # A row is in its own group and in those of all earlier ones.
    return torch.stack(shrunk[::-1], dim=1).cumprod(1) if shrunk else squares
