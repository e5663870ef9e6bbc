"""Training to a size: the weight of the group lasso follows by dual ascent, nobody tunes it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from maestro_core.accounting import Cost
from maestro_core.layers import LowRankLayer
from maestro_core.lod import importance, row_squares, truncate_
from maestro_core.proximal import apply_, scales

Quantity = Literal["macs", "params"]

TOLERANCE = 0.05  # of the target
FALLING = 0.7  # the share of the ordered phase in which the size falls; then what is left settles
REACH = 1.5  # times the target: no further than from there are ranks cut that are not yet zero
ONSET = 0.2  # of the ordered phase: when the first λ would make the first ranks zero
GAIN = 40.0  # of the multiplier, over the phase
SMALL = 1e-3  # of the largest row: what is smaller is no size that a layer's last rank will have
PENALTY = 5.0


class TargetMissed(ValueError):  # noqa: N818  it says what happened
    """The target can't be reached, or wasn't; the message says what could be."""


@dataclass(frozen=True, slots=True)
class Target:
    """The share of the dense network's MACs or parameters that ordered training has to end with."""

    quantity: Quantity
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"a target is a share of the dense network, 0..1, not {self.share}")

    def of(self, cost: Cost, ranks: Sequence[int]) -> float:
        """Return the share that the network has at these ranks."""
        if self.quantity == "macs":
            return cost.macs_at(ranks) / cost.dense_macs
        return cost.params_at(ranks) / cost.dense_params

    @property
    def least(self) -> float:
        """Return the smallest share that is on target."""
        return self.share * (1 - TOLERANCE)

    @property
    def most(self) -> float:
        """Return the largest share that is on target."""
        return self.share * (1 + TOLERANCE)

    def check(self, cost: Cost) -> None:
        """Raise TargetMissed if not even rank 1 everywhere is that small."""
        least = self.of(cost, [min(1, layer.max_rank) for layer in cost.layers])
        if least > self.share:
            raise TargetMissed(
                f"target {self}: with rank 1 in every layer the network still has {least:.3f}"
            )

    def __str__(self) -> str:
        return f"{self.share:g} of the dense {self.quantity}"


@dataclass(slots=True)
class Pursuit:
    """A target on its way: `weight` is the multiplier, `done` the share of the phase that is over.

    λ of the group lasso is more than the multiplier where the network is larger than planned, and
    less where it is smaller: the penalty of the method of multipliers, which damps it.
    """

    target: Target
    cost: Cost
    weight: float
    done: float = 0.0

    def step_(
        self, layers: Sequence[LowRankLayer], optimizer: Optimizer, rate: float, done: float
    ) -> None:
        """Move λ, shrink `layers` by a proximal step, and remove what is zero.

        `rate` is SGD's over (1 − momentum), `done` the share of the phase that is over. No step is
        made that would end below the target, and none by which a layer would lose its last rank:
        nothing would get through it any more. Looks at values of the network.
        """
        share = self.target.of(self.cost, [layer.rank for layer in layers])
        passed, self.done = done - self.done, done
        excess = share - planned(self.target.share, done)
        self.weight = dual_ascent(self.weight, excess, passed)
        if share <= self.target.most or done > FALLING:
            return
        weight = self.weight * math.exp(PENALTY * excess) * rate
        shrunk = [
            pair if rank else (torch.ones_like(pair[0]), torch.ones_like(pair[1]))
            for pair, rank in with_ranks(scales(layers, weight))
        ]
        ranks = [rank for _, rank in with_ranks(shrunk)]
        if self.target.of(self.cost, ranks) < self.target.least:
            self.weight /= 2
            return
        apply_(layers, shrunk)
        for layer, rank in zip(layers, ranks, strict=True):
            truncate_(layer, rank, optimizer)

    def landing(self, layers: Sequence[LowRankLayer]) -> list[int]:
        """Return the ranks to keep: those there are, less the least important above the target.

        Raises:
            TargetMissed: they are still too many to be cut.
        """
        ranks = [layer.rank for layer in layers]
        values = [importance(layer).tolist() for layer in layers]
        share = self.target.of(self.cost, ranks)
        if share > REACH * self.target.share:
            raise TargetMissed(
                f"target {self.target}: training came to {share:.3f} only; "
                f"it needs more ordered epochs or a higher rate"
            )
        while self.target.of(self.cost, ranks) > self.target.most:
            fits = [
                (values[i][rank - 1], i)
                for i, rank in enumerate(ranks)
                if rank > 1 and self.target.of(self.cost, _less(ranks, i)) >= self.target.least
            ]
            if not fits:
                raise TargetMissed(f"target {self.target}: no rank can go without passing it")
            ranks = _less(ranks, min(fits)[1])
        return ranks


def first_weight(layers: Sequence[LowRankLayer], rate: float, steps: int) -> float:
    """Return the λ that would make half the layers lose a rank in `ONSET` of `steps`.

    By ‖u‖ / (2 rate √r) for the last row u of r that is not as good as zero, where the rate is
    SGD's over (1 − momentum): what the lasso alone does to factors that all ranks share evenly.
    Layers of zeros alone say nothing, and if there are no others u is taken to be 1: from 0 no
    λ would ever rise.
    """
    found = []
    for layer in layers:
        norms = row_squares(layer.up.detach()).sqrt()
        large = (norms > SMALL * norms.max()).nonzero() if layer.rank else norms
        if len(large):
            last = int(large[-1])
            found.append(float(norms[last]) / math.sqrt(last + 1))
    return median(found or [1.0]) / (2 * rate * ONSET * steps)


def dual_ascent(weight: float, excess: float, passed: float) -> float:
    """Return λ after `passed` of the phase, 0..1, in which the size was `excess` above its plan.

    In the multiplier's logarithm, so that it crosses orders of magnitude and stays positive
    (exponentiated gradient: Kivinen and Warmuth, 1997).
    """
    return weight * math.exp(max(-1.0, min(1.0, GAIN * excess * passed)))


def planned(share: float, done: float) -> float:
    """Return the size, as a share, that is due at `done` of the phase: from 1 in a line."""
    return 1 - (1 - share) * min(1.0, done / FALLING)


def with_ranks(
    shrunk: Sequence[tuple[Tensor, Tensor]],
) -> list[tuple[tuple[Tensor, Tensor], int]]:
    """Return the scales of each layer, and how many ranks a step by them would leave."""
    left = [((down > 0) & (up > 0)).sum() for down, up in shrunk]
    ranks: list[int] = torch.stack(left).tolist() if left else []  # the host waits once for all
    return list(zip(shrunk, ranks, strict=True))


def _less(ranks: Sequence[int], i: int) -> list[int]:
    return [*ranks[:i], ranks[i] - 1, *ranks[i + 1 :]]
