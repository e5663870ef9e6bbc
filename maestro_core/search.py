"""From a trained network to its chain of points, chosen on validation data alone."""

import fnmatch
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import nn

from maestro_core.accounting import Cost
from maestro_core.data import Pictures
from maestro_core.evaluation import evaluate
from maestro_core.frontier import (
    Chain,
    RankTable,
    allowed_ranks,
    nested_chain,
    pareto,
    refine,
    spread,
)
from maestro_core.normalisation import CALIBRATING, Statistics, recalibrate
from maestro_core.sentences import Samples


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One rank for each factorised layer, and the statistics of its batch normalisation by name."""

    ranks: tuple[int, ...]
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class SearchParameters:
    """How many `points` to look for, between which shares of the dense MACs, and how finely.

    `probes` is the most ranks tried for each layer, on `samples` of validation (0: all). With
    `most_macs` under 1 the ranks above the last point's are dropped: training goes on without them,
    and they are not exported. Ranks are multiples of `multiple`, but for whole ones: kernels
    compute so many channels at once. `removable` holds patterns of the names of layers that a point
    may leave out: beside a shortcut, where something comes through without them.
    """

    points: int
    least_macs: float
    probes: int
    most_macs: float = 1.0
    samples: int = 0
    multiple: int = 1
    removable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("points", 2), ("probes", 2), ("samples", 0), ("multiple", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"search: {name} is {getattr(self, name)}, at least {least}")
        if not 0 <= self.least_macs < self.most_macs <= 1:
            raise ValueError(
                f"search: 0 <= least_macs < most_macs <= 1, not {self.least_macs} and "
                f"{self.most_macs}"
            )


def find_chain(
    model: nn.Module,
    cost: Cost,
    validation: Samples,
    parameters: SearchParameters,
    on_evaluation: Callable[[int, int], None],
) -> Chain:
    """Return a nested chain, cheapest first: one rank for each layer of `cost`.

    Its points are spread evenly by the ratio of their MACs, from `least_macs` of the dense network
    to `most_macs`. The loss with one layer cut alone, for each layer and rank, chooses them; the
    layers are normalised by the batch for it, since the statistics of the whole would mislead.
    `on_evaluation` is told how many evaluations are done, and of how many.
    """
    tables = error_tables(model, cost, validation, parameters, on_evaluation)
    chain = refine(nested_chain(tables), [table.ranks for table in tables])
    # Off the hull a rank just below the whole one may cost as much as it.
    rising = pareto([cost.macs_at(ranks) for ranks in chain], list(range(len(chain))))
    least, most = (
        share * cost.dense_macs for share in (parameters.least_macs, parameters.most_macs)
    )
    if parameters.most_macs < 1:
        rising = [i for i in rising if cost.macs_at(chain[i]) <= most] or rising[:1]
    last = chain[rising[-1]]
    chain = [chain[i] for i in rising if cost.macs_at(chain[i]) >= least] or [last]
    return [chain[i] for i in spread([cost.macs_at(r) for r in chain], parameters.points)]


def error_tables(
    model: nn.Module,
    cost: Cost,
    validation: Samples,
    parameters: SearchParameters,
    on_evaluation: Callable[[int, int], None],
) -> list[RankTable]:
    """Return for each layer, by rank, its MACs and the loss with it cut alone.

    `on_evaluation` is told how many evaluations are done, and of how many.

    Raises:
        ValueError: a pattern in `removable` matches no layer.
    """
    check_removable(parameters, [layer.name for layer in cost.layers])
    grids = [
        allowed_ranks(
            layer,
            parameters.probes,
            parameters.multiple,
            any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in parameters.removable),
        )
        for layer in cost.layers
    ]
    total = sum(len(grid) for grid in grids)
    if parameters.samples:
        validation = validation.first(parameters.samples)
    done = 0
    tables = []
    for layer, grid in zip(cost.layers, grids, strict=True):
        losses = []
        for rank in grid:
            result = evaluate(model, validation, {layer.name: rank}, by_batch=True)
            losses.append(result.loss)
            done += 1
            on_evaluation(done, total)
        tables.append(RankTable(grid, tuple(float(layer.macs(r)) for r in grid), tuple(losses)))
    return tables


def check_removable(parameters: SearchParameters, names: Collection[str]) -> None:
    """Refuse a pattern in `removable` that matches none of the factorised layers, by their names.

    Raises:
        ValueError: the pattern.
    """
    for pattern in parameters.removable:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"removable: '{pattern}' matches no layer in factors")


def make_points(
    model: nn.Module,
    cost: Cost,
    chain: Chain,
    train: Pictures,
    validation: Pictures,
    on_point: Callable[[int, int], None],
) -> list[Point]:
    """Return the points of `chain` that are more accurate, as a whole, than all cheaper ones.

    Each has the normalisation that `train` pictures give it; where no layer is in factors, the
    network's own. `on_point` is told how many of the chain are done, and of how many.
    """
    points, accuracies = [], []
    calibrating = train.first(CALIBRATING)
    for i, ranks in enumerate(chain):
        named = by_name(cost, ranks)
        point = Point(ranks, recalibrate(model, named, calibrating) if named else {})
        points.append(point)
        accuracies.append(evaluate(model, validation, named, point.statistics).accuracy)
        on_point(i + 1, len(chain))
    return [points[i] for i in pareto([cost.macs_at(ranks) for ranks in chain], accuracies)]


def by_name(cost: Cost, ranks: Sequence[int]) -> dict[str, int]:
    """Return the ranks, in the order of `cost.layers`, by layer name."""
    return {layer.name: rank for layer, rank in zip(cost.layers, ranks, strict=True)}
