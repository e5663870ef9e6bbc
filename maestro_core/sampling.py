"""Which layers a step of ordered training cuts, and where: the paper's way, and two to compare."""

from collections.abc import Sequence
from random import Random
from typing import Literal

from maestro_core import lod

Sampling = Literal["pairs", "layers", "ratio"]


def draw(sampling: Sampling, ranks: Sequence[int], rng: Random) -> dict[int, int]:
    """Return the rank of each layer that is cut, by its index in `ranks`, the whole ones.

    `pairs`: one pair of layer and rank, all as likely (Maestro, Algorithm 1). `layers`: one layer,
    all as likely, then one of its ranks. `ratio`: all layers, by one ratio (ordered dropout:
    Horváth et al., "FjORD", NeurIPS 2021), rounded up; layers at rank 0 stay there.

    Raises:
        ValueError: every rank is 0, so there is nothing to draw.
    """
    if sampling == "pairs":
        return dict([lod.sample(ranks, rng)])
    alive = [index for index, rank in enumerate(ranks) if rank]
    if not alive:
        raise ValueError(f"all {len(ranks)} layers are at rank 0: nothing to sample")
    if sampling == "layers":
        index = rng.choice(alive)
        return {index: rng.randint(1, ranks[index])}
    most = max(ranks)
    kept = rng.randint(1, most)  # of `most`; integers, since a float would round some ratios up
    return {index: -(-kept * ranks[index] // most) for index in alive}
