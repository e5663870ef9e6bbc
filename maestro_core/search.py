"""From a trained network to its chain of points, chosen on validation data alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from maestro_core.accounting import Cost
from maestro_core.data import Pictures
from maestro_core.evaluation import evaluate
from maestro_core.frontier import RankTable, allowed_ranks, nested_chain, pareto, spread


@dataclass(frozen=True, slots=True)
class SearchParameters:
    """How many `points` to end with, how accurate the cheapest must be, how finely to look.

    `min_accuracy` is on validation data, 0..1. `probes` is the most ranks tried for each layer.
    """

    points: int
    min_accuracy: float
    probes: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One rank for each layer, in order, and its whole-network accuracy on validation data."""

    ranks: tuple[int, ...]
    macs: int
    accuracy: float


def find_chain(
    model: nn.Module,
    cost: Cost,
    validation: Pictures,
    parameters: SearchParameters,
    on_evaluation: Callable[[int, int], None],
) -> list[Candidate]:
    """Return the nested chain of points, cheapest first.

    The loss with one layer cut alone, for each layer and rank, gives the chain; each of its points
    is then evaluated as a whole, and those that a cheaper one equals are dropped.
    `on_evaluation` is told how many evaluations are done and how many there will be, at most.

    Raises:
        ValueError: the whole network is less accurate than `min_accuracy`.
    """
    names = [layer.name for layer in cost.layers]
    grids = [allowed_ranks(layer, parameters.probes) for layer in cost.layers]
    total = sum(len(grid) for grid in grids) * 2
    done = 0

    def loss_and_accuracy(ranks: dict[str, int]) -> tuple[float, float]:
        nonlocal done
        result = evaluate(model, validation, ranks)
        done += 1
        on_evaluation(done, total)
        return result.loss, result.accuracy

    tables = []
    for layer, grid in zip(cost.layers, grids, strict=True):
        losses = tuple(loss_and_accuracy({layer.name: rank})[0] for rank in grid)
        tables.append(RankTable(grid, tuple(float(layer.macs(rank)) for rank in grid), losses))
    candidates = []
    for ranks in nested_chain(tables):
        accuracy = loss_and_accuracy(dict(zip(names, ranks, strict=True)))[1]
        candidates.append(Candidate(ranks, cost.macs_at(ranks), accuracy))
    on_evaluation(total, total)
    return select(candidates, parameters)


def select(candidates: Sequence[Candidate], parameters: SearchParameters) -> list[Candidate]:
    """Return at most `parameters.points` of a chain, evenly spread by the ratio of their MACs.

    Each is more accurate than all cheaper candidates. The last is the whole network, unless a
    cheaper one is as accurate.

    Raises:
        ValueError: the whole network is less accurate than `min_accuracy`.
    """
    whole = candidates[-1]
    if whole.accuracy < parameters.min_accuracy:
        raise ValueError(
            f"the network's accuracy on validation data is {whole.accuracy:.4f}, "
            f"below the least that is wanted, {parameters.min_accuracy}"
        )
    kept = pareto([c.macs for c in candidates], [c.accuracy for c in candidates])
    good = [candidates[i] for i in kept if candidates[i].accuracy >= parameters.min_accuracy]
    return [good[i] for i in spread([c.macs for c in good], parameters.points)]
