"""Choose ranks from cost and error tables, and keep what is Pareto-optimal. Pure; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from maestro_core.artifact import Layer

Chain = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class RankTable:
    """What a layer may be: its ranks rising, the cost of each, and the error with that cut alone.

    Costs may be of any unit (MACs, milliseconds) as long as all layers use one.
    """

    ranks: tuple[int, ...]
    costs: tuple[float, ...]
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.ranks) == len(self.costs) == len(self.errors) > 0:
            raise ValueError(
                f"a table has {len(self.ranks)} ranks, {len(self.costs)} costs and "
                f"{len(self.errors)} errors; it needs one each, and at least one"
            )
        if any(a >= b for a, b in pairwise(self.ranks)):
            raise ValueError(f"ranks must rise, not be {self.ranks}")


def allowed_ranks(
    layer: Layer, most: int, multiple: int = 1, removable: bool = False
) -> tuple[int, ...]:
    """Return at most `most` ranks, evenly spread, for which two factors beat the dense layer.

    The layer's whole rank is always one of them: when dense is cheaper there, it is run dense,
    so no rank between would be worth its cost. The others are multiples of `multiple`; 0 is one
    if the layer is `removable`. `most` is at least 2.
    """
    least = 0 if removable else 1
    cheap = [r for r in range(least, layer.max_rank) if not (r % multiple or layer.is_dense(r))]
    if len(cheap) > most - 1:
        chosen = np.linspace(0, len(cheap) - 1, most - 1).round().astype(int)
        cheap = [cheap[i] for i in chosen]
    return (*cheap, layer.max_rank)


def monotone(errors: Sequence[float]) -> tuple[float, ...]:
    """Return `errors`, in order of rank, raised so that none is below that of a higher rank."""
    running = np.maximum.accumulate(np.asarray(errors, float)[::-1])[::-1]
    return tuple(running.tolist())


def nested_chain(tables: Sequence[RankTable]) -> Chain:
    """Return rank choices (one per layer) from the cheapest to the whole, each rank never falling.

    Along the lower convex hull of a layer's (cost, error) rank grows with cost, so taking the
    segments of all hulls by error saved per cost gives a chain that is nested by construction, and
    each of its points is the best for its cost as far as errors add up (Shoham and Gersho,
    "Efficient bit allocation for an arbitrary set of quantizers", 1988).
    """
    smooth = [replace(table, errors=monotone(table.errors)) for table in tables]
    hulls = [_hull(table) for table in smooth]
    steps = [
        (-_saving(smooth[layer], i, k), layer, k)
        for layer, hull in enumerate(hulls)
        for i, k in pairwise(hull)
    ]
    current = [table.ranks[hull[0]] for table, hull in zip(smooth, hulls, strict=True)]
    chain = [tuple(current)]
    for _, layer, k in sorted(steps):
        current[layer] = smooth[layer].ranks[k]
        chain.append(tuple(current))
    return chain


def refine(chain: Chain, grids: Sequence[Sequence[int]]) -> Chain:
    """Return `chain` with every allowed rank (`grids`, by layer) that its steps pass over.

    The chain stays nested. Points off the hull are worth having where training will visit them.
    """
    finer = [chain[0]]
    for point in chain[1:]:
        current = list(finer[-1])
        for layer, (less, more) in enumerate(zip(finer[-1], point, strict=True)):
            for rank in grids[layer]:
                if less < rank <= more:
                    current[layer] = rank
                    finer.append(tuple(current))
    return finer


def pareto(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the indices of points that no other beats, in order of cost.

    A point is beaten by one that costs no more and scores no less, and differs in either; of equal
    points the first is kept.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or scores[i] > scores[kept[-1]]:
            kept.append(i)
    return kept


def spread(costs: Sequence[float], count: int) -> list[int]:
    """Return `count` indices of rising positive `costs`: the ends, and between them even ratios."""
    if len(costs) <= count:
        return list(range(len(costs)))
    logs = np.log(costs)
    chosen = {0, len(costs) - 1}
    # Targets come in order and each takes the nearest that is left, so no index is taken twice.
    for target in np.linspace(logs[0], logs[-1], count)[1:-1]:
        free = [i for i in range(len(costs)) if i not in chosen]
        chosen.add(min(free, key=lambda i: abs(logs[i] - target)))
    return sorted(chosen)


def _saving(table: RankTable, i: int, k: int) -> float:
    """Return the error saved per cost from entry i to entry k, which costs more."""
    return (table.errors[i] - table.errors[k]) / (table.costs[k] - table.costs[i])


def _hull(table: RankTable) -> list[int]:
    """Return the entries on the lower convex hull of (cost, error), ending at the whole rank.

    Errors must never rise. Entries that cost no less than a later one are no use. The whole rank
    stays even if it saves nothing, so that the chain ends at the network as it was trained.
    """
    costs = table.costs
    hull: list[int] = []
    for k in range(len(costs)):
        if costs[k] >= min(costs[k + 1 :], default=np.inf):
            continue
        while len(hull) > 1 and _saving(table, hull[-2], hull[-1]) <= _saving(table, hull[-1], k):
            hull.pop()
        hull.append(k)
    return hull
