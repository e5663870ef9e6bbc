"""Ways to a frontier of accuracy against cost, each from the same data in as many epochs.

A method makes ONNX files and says what each costs and how many test pictures it gets right; of text
it makes no files, and says the perplexity on test sentences. Points are chosen on validation data.
The rivals are as their papers have them, with the recipe's own optimiser and augmentation and the
rate of its first phase; where that is another choice than a paper's it is stated.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.progress import Progress
from torch import nn

from maestro_core import checkpoint
from maestro_core.accounting import Cost, measure
from maestro_core.artifact import Score
from maestro_core.data import Data, Pictures
from maestro_core.evaluation import evaluate
from maestro_core.export import Description, export
from maestro_core.factorize import factorize_, low_rank_layers
from maestro_core.frontier import Chain, pareto
from maestro_core.host import Host
from maestro_core.normalisation import scratch
from maestro_core.perplexity import TextPoint, score_points
from maestro_core.recipes.recipe import Recipe, TextRecipe
from maestro_core.sampling import Sampling
from maestro_core.schedule import HyperParameters, Kind, Phase
from maestro_core.search import Point, by_name, find_chain, make_points
from maestro_core.sentences import Corpus, example
from maestro_core.template import INPUT, make_template
from maestro_core.training import train_
from maestro_core.whitening import sample_inputs, whiten_

QUARTER = 4  # Pufferfish: a rank is a quarter of the whole
WARM_UP = 80 / 300  # and the share of epochs that come before, dense (CIFAR-10)
TEXT_WARM_UP = 10 / 400  # the same of its transformer
CALIBRATING = 512  # pictures that set the ranges of int8


class Row(NamedTuple):
    """One network of a method: its file, cost and score, the latter with a 95 % interval."""

    graph: str
    ranks: tuple[int, ...]
    macs: int
    params: int
    accuracy: float
    low: float
    high: float


Rows = Sequence[Row | TextPoint]


@dataclass(frozen=True, slots=True)
class Task:
    """What every method has alike: a recipe, a network by its width, and how many epochs.

    `width` is that of all networks but the `narrower` dense ones. `kept` names the layers that
    Pufferfish leaves dense. Methods train on `samples` pictures or pairs of sentences (0: all).
    """

    recipe: Recipe | TextRecipe
    network: Callable[[float], nn.Module]
    width: float
    narrower: tuple[float, ...]
    kept: tuple[str, ...]
    epochs: int
    samples: int


@dataclass(frozen=True, slots=True)
class Bench:
    """A task with its data, and the directory that training and results are kept in."""

    task: Task
    data: Data | Corpus
    root: Path
    progress: Progress

    def identity(self, hyper: HyperParameters) -> dict[str, Any]:
        """Return, as plain JSON, what a result must agree on to be kept."""
        recipe = replace(self.task.recipe, training=hyper)
        common = {"width": self.task.width, "samples": len(self.data.train)}
        return {**recipe.identity(self.data.sha256), **common}

    def network(self, width: float) -> nn.Module:
        """Return the network, untrained, with the recipe's seed."""
        recipe = self.task.recipe
        torch.manual_seed(recipe.training.seed)
        model = self.task.network(width)
        if isinstance(recipe, Recipe) and recipe.prepare and isinstance(self.data, Data):
            recipe.prepare(model, self.data.train)
        return model


def dense(bench: Bench) -> Rows:
    """Return the network as it is."""
    return _whole(bench, bench.task.width)


def narrower(bench: Bench) -> Rows:
    """Return narrower networks, each trained for itself."""
    return [row for width in bench.task.narrower for row in _whole(bench, width)]


def svd(bench: Bench) -> Rows:
    """Return the dense network, cut by the same search as ours with its own normalisation."""
    return _cut(bench, "svd", whitened=False, recalibrated=False)


def svd_recalibrated(bench: Bench) -> Rows:
    """Return the same with each point's own normalisation; nothing where there is none."""
    return _cut(bench, "svd_recalibrated", whitened=False, recalibrated=True)


def whitened(bench: Bench) -> Rows:
    """Return the dense network, factorised by its activations and cut by the same search."""
    return _cut(bench, "whitened", whitened=True, recalibrated=False)


def whitened_recalibrated(bench: Bench) -> Rows:
    """Return the same with each point's own normalisation; nothing where there is none."""
    return _cut(bench, "whitened_recalibrated", whitened=True, recalibrated=True)


def ordered_dropout(bench: Bench) -> Rows:
    """Return the points at tenths of all ranks, trained by one ratio for all layers (FjORD).

    Of ranks, where FjORD cuts channels, so that cost is counted alike.
    """
    hyper = _ordered_hyper(bench, "ratio")
    model = _trained(bench, "ordered_dropout", hyper, _whole_ranks)
    chain = uniform_chain(_cost(bench, model))
    return _scored(bench, "ordered_dropout", model, chain, recalibrated=True)


def pufferfish(bench: Bench) -> Rows:
    """Return the network that is factorised after a dense warm-up, at a quarter of each rank.

    The rate falls to 0 before the factorisation and rises again after it; in the paper it stays.
    """
    share = TEXT_WARM_UP if isinstance(bench.data, Corpus) else WARM_UP
    before = max(1, round(share * bench.task.epochs))
    rate = bench.task.recipe.training.phases[0].learning_rate
    phases = (Phase("dense", before, rate), Phase("nested", bench.task.epochs - before, rate))
    hyper = replace(_hyper(bench, phases), keep=bench.task.kept, whitened=False)

    def quarter(model: nn.Module) -> Chain:
        return [tuple(-(-layer.rank // QUARTER) for layer in low_rank_layers(model).values())]

    model = _trained(bench, "pufferfish", hyper, quarter)  # a chain of one is that network alone
    ranks = tuple(layer.rank for layer in low_rank_layers(model).values())
    return _scored(bench, "pufferfish", model, [ranks], recalibrated=False)


def int8(bench: Bench) -> Rows:
    """Return the dense network in 8 bits: static quantisation by ONNX Runtime, per channel.

    Raises:
        ValueError: the task is of text, which has no ONNX files.
    """
    if isinstance(bench.data, Corpus):
        raise ValueError("int8: networks of text are not exported, so nothing can be quantised")
    _whole(bench, bench.task.width)
    source = bench.root / _file(bench.task.width)
    prepared, path = bench.root / "prepared.onnx", bench.root / "int8.onnx"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        _Calibration(bench.data.train.first(CALIBRATING)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not any("vnni" in name for name in Host.here().instruction_sets),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    cost = _cost(bench, bench.network(bench.task.width))
    return [_row(bench.data.test, path, cost)]


def maestro(bench: Bench) -> Rows:
    """Return the points of the recipe, its phases scaled to the epochs that all methods have."""
    recipe = bench.task.recipe
    hyper = _hyper(bench, scaled(recipe.training.phases, bench.task.epochs))
    model = _trained(bench, "maestro", hyper, lambda model: _searched(bench, model))
    path = checkpoint.latest(bench.root / "maestro")
    chain = checkpoint.read_state(path).chain if path else []
    return _scored(bench, "maestro", model, chain or _searched(bench, model), recalibrated=True)


def paper(bench: Bench) -> Rows:
    """Return the paper's training for all epochs, without a lasso: one layer cut in each step."""
    return _ordered(bench, "paper", "pairs")


def paper_by_layers(bench: Bench) -> Rows:
    """Return the same, but each layer is as likely to be cut, whatever its rank."""
    return _ordered(bench, "paper_by_layers", "layers")


def paper_by_ratio(bench: Bench) -> Rows:
    """Return the same, but all layers are cut by one ratio; points by our search, not uniform."""
    return _ordered(bench, "paper_by_ratio", "ratio")


TEXT = ("dense", "narrower", "svd", "whitened", "pufferfish", "maestro")
ABLATIONS = ("paper", "paper_by_layers", "paper_by_ratio")
METHODS: dict[str, Callable[[Bench], Rows]] = {
    method.__name__: method
    for method in (
        dense,
        narrower,
        svd,
        svd_recalibrated,
        whitened,
        whitened_recalibrated,
        ordered_dropout,
        pufferfish,
        int8,
        maestro,
        paper,
        paper_by_layers,
        paper_by_ratio,
    )
}


def uniform_chain(cost: Cost) -> Chain:
    """Return points with the same share of every rank, by tenths; dense layers are whole."""
    chain: dict[tuple[int, ...], None] = {}
    for tenths in range(1, 11):
        ranks = [-(-tenths * layer.max_rank // 10) for layer in cost.layers]
        allowed = (
            layer.max_rank if layer.is_dense(rank) else rank
            for layer, rank in zip(cost.layers, ranks, strict=True)
        )
        chain[tuple(allowed)] = None
    return list(chain)


def scaled(phases: Sequence[Phase], epochs: int) -> tuple[Phase, ...]:
    """Return the phases with `epochs` in all, in about the proportions they have, at least one.

    Raises:
        ValueError: there are fewer epochs than phases.
    """
    if epochs < len(phases):
        raise ValueError(f"{len(phases)} phases need as many epochs, not {epochs}")
    total = sum(phase.epochs for phase in phases)
    counts = [max(1, int(phase.epochs * epochs / total)) for phase in phases]
    while sum(counts) != epochs:
        step = 1 if sum(counts) < epochs else -1
        wanted = [
            step * (p.epochs * epochs / total - n) for p, n in zip(phases, counts, strict=True)
        ]
        free = [i for i, n in enumerate(counts) if n + step >= 1]
        counts[max(free, key=lambda i: wanted[i])] += step
    return tuple(replace(p, epochs=n) for p, n in zip(phases, counts, strict=True))


def _ordered(bench: Bench, name: str, sampling: Sampling) -> Rows:
    model = _trained(bench, name, _ordered_hyper(bench, sampling), _whole_ranks)
    return _scored(bench, name, model, _searched(bench, model), recalibrated=True)


def _ordered_hyper(bench: Bench, sampling: Sampling) -> HyperParameters:
    """Return how a network is trained from its first step on with layers cut at random."""
    hyper = _hyper(bench, _phases(bench, "ordered"))
    return replace(hyper, sampling=sampling, lasso=0.0, whitened=False)


def _phases(bench: Bench, kind: Kind) -> tuple[Phase, ...]:
    return (Phase(kind, bench.task.epochs, bench.task.recipe.training.phases[0].learning_rate),)


def _hyper(bench: Bench, phases: tuple[Phase, ...]) -> HyperParameters:
    return replace(bench.task.recipe.training, phases=phases)


def _trained(
    bench: Bench,
    name: str,
    hyper: HyperParameters,
    find: Callable[[nn.Module], Chain],
    width: float | None = None,
) -> nn.Module:
    """Return the network after training, factorised; checkpoints are kept under `name`."""
    model = bench.network(width or bench.task.width)
    run = {**bench.identity(hyper), "method": name, "width": width or bench.task.width}
    root = bench.root / name
    train_(model, bench.data, hyper, lambda: find(model), root, run, bench.progress)
    return model


def _dense(bench: Bench, width: float) -> nn.Module:
    """Return the trained dense network; training it is done once for all methods."""
    hyper = _hyper(bench, _phases(bench, "dense"))
    name = _file(width).removesuffix(".onnx")
    _trained(bench, name, hyper, _whole_ranks, width)
    path = checkpoint.latest(bench.root / name)
    if path is None:
        raise ValueError(f"{bench.root / name}: training left no checkpoint")
    model = bench.network(width)
    checkpoint.restore_(path, model, None, checkpoint.read_state(path).run)
    return model


def _whole(bench: Bench, width: float) -> Rows:
    """Return the dense network of that width; of pictures it is written as one file."""
    path = bench.root / _file(width)
    model = _dense(bench, width)
    cost = _cost(bench, model)
    if isinstance(bench.data, Corpus):
        return score_points(model, cost, [()], bench.data, lambda: None)
    x, _ = bench.data.validation.batch(slice(0, 2))
    onnx.save(make_template(model.eval(), x), path)
    return [_row(bench.data.test, path, cost)]


def _file(width: float) -> str:
    return f"dense-{width:g}.onnx"


def _row(test: Pictures, path: Path, cost: Cost) -> Row:
    score = Score.of_share(correct(path, test), len(test))
    macs, params = cost.dense_macs, cost.dense_params
    return Row(path.name, (), macs, params, score.value, score.low, score.high)


def correct(graph: Path, pictures: Pictures, batch: int = 500) -> int:
    """Return how many pictures an ONNX file gets right in ONNX Runtime."""
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    total = 0
    for start in range(0, len(pictures), batch):
        x, labels = pictures.batch(slice(start, start + batch))
        logits = session.run(None, {INPUT: np.ascontiguousarray(x.numpy())})[0]
        total += int((np.asarray(logits).argmax(1) == labels.numpy()).sum())
    return total


def _cut(bench: Bench, name: str, *, whitened: bool, recalibrated: bool) -> Rows:
    model = _dense(bench, bench.task.width)
    if recalibrated and not scratch(model):
        return []
    factorize_(model, bench.task.recipe.training.keep)
    if whitened:
        whiten_(model, sample_inputs(bench.data.train))
    return _scored(bench, name, model, _searched(bench, model), recalibrated=recalibrated)


def _whole_ranks(model: nn.Module) -> Chain:
    return [tuple(layer.rank for layer in low_rank_layers(model).values())]


def _searched(bench: Bench, model: nn.Module) -> Chain:
    search = bench.task.recipe.search
    return find_chain(
        model, _cost(bench, model), bench.data.validation, search, lambda _done, _total: None
    )


def _cost(bench: Bench, model: nn.Module) -> Cost:
    return measure(model, example(bench.data.validation))


def _scored(bench: Bench, name: str, model: nn.Module, chain: Chain, *, recalibrated: bool) -> Rows:
    """Return the points of the chain that count on validation data, exported as an artifact."""
    cost = _cost(bench, model)
    data, recipe = bench.data, bench.task.recipe
    if isinstance(data, Corpus):
        return score_points(model, cost, chain, data, lambda: None)
    if recalibrated:
        points = make_points(model, cost, chain, data.train, data.validation, lambda *_: None)
    else:
        points = [Point(ranks, scratch(model)) for ranks in chain]
        accuracies = [
            evaluate(model, data.validation, by_name(cost, ranks)).accuracy for ranks in chain
        ]
        kept = pareto([cost.macs_at(ranks) for ranks in chain], accuracies)
        points = [points[i] for i in kept]
    labels = recipe.labels if isinstance(recipe, Recipe) else ()
    scored_on = f"{recipe.data_set} {data.scoring}"
    described = Description(name, "image-classification", labels, scored_on, {})
    path = bench.root / f"{name}.maestro"
    made = export(model, cost, points, data.test, described, path, lambda: None)
    return [
        Row(
            f"{path.name}/{point.graph}",
            point.ranks,
            point.macs,
            point.params,
            point.score.value,
            point.score.low,
            point.score.high,
        )
        for point in made.points
    ]


class _Calibration:
    """Pictures, a few at a time, as ONNX Runtime's quantisation asks for them."""

    def __init__(self, pictures: Pictures) -> None:
        self._batches = self._all(pictures)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)

    @staticmethod
    def _all(pictures: Pictures) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(pictures), 32):
            x, _ = pictures.batch(slice(start, start + 32))
            yield {INPUT: np.ascontiguousarray(x.numpy())}
