"""Finds points for one host, without torch and without training: a chain by milliseconds, not MACs.

Layer by layer the host says what a rank costs, and whether two factors or the dense layer are
faster, and the artifact what a rank saves in error; a sweep over convex hulls joins both to a
nested chain. Its points, and those that training left in the artifact, are then verified as wholes:
accuracy on the artifact's own samples, latency on the host.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import log
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from benchmarks.correction import Correction, fit
from benchmarks.layer_latencies import (
    LayerLatency,
    Measuring,
    layer_latencies,
    runner,
    session_of,
)
from benchmarks.normalisation import Drift, drift_of, recalibrated, statistics
from maestro_core import graph, held_out
from maestro_core.artifact import Artifact, Layer, Score
from maestro_core.frontier import RankTable, nested_chain, spread
from maestro_core.held_out import ErrorTable, Samples
from server.interrupt import Interrupt

Ranks = tuple[int, ...]

_STEP = 16  # ranks between these cost as much as the next one where vectors have 16 lanes
_WHOLE_POINTS = 20  # for the correction
_LEAST_SAMPLES = 200
_LEAST_TRIES = 8
_INPUTS = 4  # one in so many samples sets normalisation, the others judge
_BATCH = 4  # short, so that few requests meet one; larger ones take no less for a sample
# Budgets count up to so many times the slowest point's latency.
_BEYOND = 2.0
# Factors with more MACs than that, over those of the dense layer, are not tried.
_MOST_MACS = 1.25


class Plan(NamedTuple):
    """What a point computes: one rank per layer, and the names of the layers that run dense."""

    ranks: Ranks
    dense: frozenset[str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A whole point, verified: its graph, and what it does on this host."""

    plan: Plan
    model: ModelProto
    correct: int
    samples: int
    p50_ms: float

    @property
    def ranks(self) -> Ranks:
        return self.plan.ranks

    @property
    def score(self) -> Score:
        """Return the share of right answers."""
        return Score.of_share(self.correct, self.samples)


class Found(NamedTuple):
    """The points of a host, cheapest first; how well layers alone predicted them; what is dense."""

    points: tuple[Candidate, ...]
    correction: Correction
    dense_when_whole: frozenset[str]  # layers that are faster dense than in factors of full rank


@dataclass(frozen=True, slots=True)
class Network:
    """What a search reads of an artifact, once.

    `inputs` set the normalisation of a point and `samples` judge it: they are not the same, or
    points would look a per cent or two better than they are. `dense` are the dense weights that the
    weights file lacks; `dense_when_whole` names the layers that run dense at their full rank: by
    MACs, until the host has measured them. `statistics` are what the artifact's own points are
    normalised by, from far more inputs than are here, changed as in training; `drifts` are how they
    differ from what the inputs here give, of the points that were asked so far.
    """

    artifact: Artifact
    template: ModelProto
    inputs: NDArray[np.float32]
    samples: Samples
    tables: tuple[ErrorTable, ...]
    dense: Mapping[str, TensorProto]
    dense_when_whole: frozenset[str]
    statistics: Mapping[Ranks, Mapping[str, TensorProto]]
    drifts: dict[Ranks, Drift] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Artifact) -> "Network":
        """Return the parts of an artifact.

        Raises:
            ArtifactError: it holds no samples or no error tables.
        """
        template = graph.load(source.template_path.read_bytes())
        tables = tuple(held_out.read_tables(source))
        samples = held_out.read_samples(source)
        inputs = len(samples) // _INPUTS
        rest = Samples(samples.x[inputs:], samples.labels[inputs:])
        layers = source.manifest.layers
        return cls(
            source,
            template,
            samples.x[:inputs] if inputs else samples.x,
            rest,
            tables,
            graph.dense_weights(template, layers, source.weights_path.parent),
            frozenset(layer.name for layer in layers if layer.is_dense(layer.max_rank)),
            {
                point.ranks: statistics(graph.load(source.graph_path(i).read_bytes()))
                for i, point in enumerate(source.points)
            },
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.artifact.manifest.layers

    @property
    def folder(self) -> Path:
        return self.artifact.weights_path.parent

    def head(self, count: int) -> "Network":
        """Return the same with at most `count` samples, the first."""
        samples = Samples(self.samples.x[:count], self.samples.labels[:count])
        return replace(self, samples=samples)

    @property
    def whole(self) -> Ranks:
        return tuple(layer.max_rank for layer in self.layers)

    def plan(self, ranks: Ranks) -> Plan:
        """Return a point with each layer in its faster form."""
        pairs = zip(self.layers, ranks, strict=True)
        whole = {layer.name for layer, rank in pairs if rank == layer.max_rank}
        return Plan(ranks, self.dense_when_whole & whole)

    def graph(self, plan: Plan) -> ModelProto:
        """Return the graph of a point, with the whole network's normalisation."""
        return graph.build(self.template, self.layers, plan.ranks, self.dense, plan.dense)

    def build(self, plan: Plan, measuring: Measuring) -> ModelProto:
        """Return the graph of a point, normalised as exported or else by its own activations.

        These are corrected by what inputs here do to the exported point of the most like MACs.
        """
        if plan.ranks in self.statistics:
            return self._exported(plan)
        macs = self._macs(plan.ranks)
        like = min(self.statistics, key=lambda ranks: abs(log(self._macs(ranks) / macs)))
        if like not in self.drifts:
            trained = self._exported(self.plan(like))
            self.drifts[like] = drift_of(trained, self.folder, self.inputs, measuring)
        drift = self.drifts[like]
        return recalibrated(self.graph(plan), self.folder, self.inputs, measuring, drift)

    def _exported(self, plan: Plan) -> ModelProto:
        private = {**self.dense, **self.statistics[plan.ranks]}
        return graph.build(self.template, self.layers, plan.ranks, private, plan.dense)

    def _macs(self, ranks: Ranks) -> int:
        """Return the MACs of the factorised layers, at least 1."""
        pairs = zip(self.layers, ranks, strict=True)
        return max(1, sum(layer.macs(rank) for layer, rank in pairs))

    def correct(self, model: ModelProto, measuring: Measuring) -> int:
        """Return how many samples a point gets right."""
        session = session_of(model, self.folder, measuring.intra_op_threads)
        name = self.artifact.manifest.input.name
        starts = range(0, len(self.samples), _BATCH)
        parts = [slice(start, start + _BATCH) for start in starts]
        feeds = ({name: self.samples.x[part]} for part in parts)
        runs = (partial(Interrupt.run, session=session, names=None, feed=feed) for feed in feeds)
        return sum(
            int((output.argmax(-1) == self.samples.labels[part]).sum())
            for part, (output,) in zip(parts, measuring.in_turns(runs), strict=True)
        )


def search(network: Network, points: int, measuring: Measuring) -> Found:
    """Return at most `points` points for this host, each slower and more accurate than the last.

    None is less accurate than the artifact's cheapest point, and none slower than the network with
    every layer dense; the dearest is the best found. Layers, their sums, accuracy and whole points
    share the budget alike: of a slow network fewer points are tried, on fewer samples.

    Raises:
        CancelledError: the measuring was cancelled.
    """
    end_s = time.perf_counter() + measuring.budget_s

    def share(parts: int) -> Measuring:
        left_s = max(0.0, end_s - time.perf_counter())
        return replace(measuring, budget_s=left_s / parts)

    latencies = measured(network, share(4))
    tables = rank_tables(network, latencies)
    network = replace(network, dense_when_whole=dense_when_whole(network, latencies))
    chain = nested_chain(tables)
    correction = _correction(network, tables, share(3))
    sums_ms = [_cost(tables, ranks) for ranks in chain]
    half = share(2)
    exported = network.artifact.points
    network, tries = _affordable(network, 2 * points, len(chain).bit_length(), half)
    kept = [point.ranks for point in exported]  # all: none needs its normalisation set
    first = _first_as_good(network, chain, measuring)
    picked = [chain[first + i] for i in spread(sums_ms[first:], tries)]
    plans = [network.plan(ranks) for ranks in dict.fromkeys([*kept, *picked])]
    dense = Plan(network.whole, frozenset(layer.name for layer in network.layers))
    *candidates, all_dense = verified(network, [*plans, dense], half)
    best = _best(candidates, all_dense, points)
    return Found(tuple(best), correction, network.dense_when_whole)


def measured(network: Network, measuring: Measuring) -> list[LayerLatency]:
    """Return each layer's latency on this host, dense and by the rank of its factors."""
    pairs = zip(network.layers, network.tables, strict=True)
    grids = [_factor_ranks(layer, table) for layer, table in pairs]
    return layer_latencies(
        network.template, network.layers, grids, network.dense, network.folder, measuring
    )


def dense_when_whole(network: Network, latencies: Sequence[LayerLatency]) -> frozenset[str]:
    """Return the layers that are faster dense than in two factors of their full rank."""
    pairs = zip(network.layers, latencies, strict=True)
    return frozenset(layer.name for layer, x in pairs if x.is_dense(layer.max_rank))


def rank_tables(network: Network, latencies: Sequence[LayerLatency]) -> list[RankTable]:
    """Return, for each layer, ranks with this host's latency and the artifact's error.

    The full rank costs what its faster form does. A smaller rank that costs more is never chosen.
    """
    tables = []
    for layer, table, x in zip(network.layers, network.tables, latencies, strict=True):
        costs = dict(x.factors_ms)
        if x.is_dense(layer.max_rank):
            costs[layer.max_rank] = x.dense_ms
        ranks = tuple(sorted(costs))
        errors = np.interp(ranks, table.ranks, table.errors).tolist()
        tables.append(RankTable(ranks, tuple(costs[rank] for rank in ranks), tuple(errors)))
    return tables


def verified(network: Network, plans: Sequence[Plan], measuring: Measuring) -> list[Candidate]:
    """Return points with their accuracy on the artifact's samples and their latency here."""
    models = [network.build(plan, measuring) for plan in plans]
    correct = [network.correct(model, measuring) for model in models]
    runs = [runner(model, network.folder, measuring) for model in models]
    p50_ms = measuring.p50_ms(runs)
    samples = len(network.samples)
    return [
        Candidate(plan, model, right, samples, ms)
        for plan, model, right, ms in zip(plans, models, correct, p50_ms, strict=True)
    ]


def _factor_ranks(layer: Layer, table: ErrorTable) -> Ranks:
    """Return the ranks at which two factors may be worth running.

    Those whose error is known, those between where latency may step, up to where factors have so
    many more MACs than the dense layer that they can't be faster.
    """
    steps = (r for r in range(_STEP, layer.max_rank, _STEP) if r > table.ranks[0])
    most = _MOST_MACS * layer.out_features * layer.fan_in / (layer.out_features + layer.fan_in)
    return tuple(sorted(rank for rank in {*table.ranks, *steps} if rank <= most))


def _cost(tables: Sequence[RankTable], ranks: Ranks) -> float:
    """Return the sum of what the layers cost alone, ms."""
    return sum(t.costs[t.ranks.index(r)] for t, r in zip(tables, ranks, strict=True))


def _correction(network: Network, tables: Sequence[RankTable], measuring: Measuring) -> Correction:
    """Return how whole points follow from layers alone: fitted on random ones of every size."""
    rng = np.random.default_rng(measuring.seed)
    chosen: list[Ranks] = []
    for share in np.linspace(0.0, 1.0, _WHOLE_POINTS):
        at = np.clip(share + rng.uniform(-0.25, 0.25, len(tables)), 0.0, 1.0)
        pairs = zip(tables, at.tolist(), strict=True)
        chosen.append(tuple(t.ranks[round(a * (len(t.ranks) - 1))] for t, a in pairs))
    models = [network.graph(network.plan(ranks)) for ranks in chosen]
    runs = [runner(model, network.folder, measuring) for model in models]
    whole_ms = measuring.p50_ms(runs)
    return fit([_cost(tables, ranks) for ranks in chosen], whole_ms)


def _affordable(
    network: Network, tries: int, steps: int, measuring: Measuring
) -> tuple[Network, int]:
    """Return the network with as many samples as the budget allows, and how many tries it allows.

    A bisection of so many steps goes before the tries.
    """
    few = network.head(_BATCH)
    model = few.build(few.plan(few.whole), measuring)
    began_s = time.perf_counter()
    few.correct(model, measuring)
    per_sample_s = (time.perf_counter() - began_s) / _BATCH
    runs, inputs = measuring.budget_s / per_sample_s, len(network.inputs)
    samples, tries = affordable(runs, inputs, len(network.samples), tries, steps)
    return network.head(samples), tries


def affordable(runs: float, inputs: int, samples: int, tries: int, steps: int) -> tuple[int, int]:
    """Return how many samples and tries so many runs of one sample allow.

    Each try and each step runs every sample, and every input that sets the normalisation. Samples
    are given up first, down to 200 where there are so many; then tries, down to 8.
    """
    least = min(samples, _LEAST_SAMPLES)
    samples = min(samples, max(least, int(runs / (tries + steps)) - inputs))
    within = int(runs / (samples + inputs)) - steps
    return samples, min(tries, max(_LEAST_TRIES, within))


def _first_as_good(network: Network, chain: Sequence[Ranks], measuring: Measuring) -> int:
    """Return where the chain gets as accurate as the artifact's cheapest point, by bisection."""

    def correct(ranks: Ranks) -> int:
        return network.correct(network.build(network.plan(ranks), measuring), measuring)

    wanted = correct(network.artifact.points[0].ranks)
    low, high = 0, len(chain) - 1
    while low < high:
        middle = (low + high) // 2
        if correct(chain[middle]) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


def _best(candidates: Sequence[Candidate], all_dense: Candidate, points: int) -> list[Candidate]:
    """Return nested points, each slower and more accurate than the last, spread over latencies.

    None is slower than the dense network, and the last is the most accurate, or as accurate for all
    that the samples tell. Of such chains it is the one that answers best over all budgets: the
    integral of accuracy over the logarithm of the latency, up to a budget of twice the slowest.
    """
    known = sorted(
        (c for c in (*candidates, all_dense) if c.p50_ms <= all_dense.p50_ms),
        key=lambda c: (c.p50_ms, -c.correct),
    )
    most = max(candidate.score.value for candidate in known)
    end_ms = _BEYOND * known[-1].p50_ms
    chains: list[tuple[float, list[Candidate]]] = []  # the best from each candidate on
    for candidate in reversed(known):
        from_here = [
            (_gain(candidate, chain[0].p50_ms) + rest, [candidate, *chain])
            for rest, chain in chains
            if _is_below(candidate, chain[0])
        ]
        if candidate.score.high >= most:
            from_here.append((_gain(candidate, end_ms), [candidate]))
        if from_here:
            chains.append(max(from_here, key=itemgetter(0)))
    _, chain = max(chains, key=itemgetter(0))
    return [chain[i] for i in spread([c.p50_ms for c in chain], points)]


def _gain(candidate: Candidate, until_ms: float) -> float:
    """Return what a point adds that answers all budgets from its own latency to another."""
    return candidate.score.value * log(until_ms / candidate.p50_ms)


def _is_below(less: Candidate, more: Candidate) -> bool:
    """Return whether one point is faster, less accurate, and nested in another."""
    is_nested = all(a <= b for a, b in zip(less.ranks, more.ranks, strict=True))
    return is_nested and less.p50_ms < more.p50_ms and less.correct < more.correct
