"""`maestro bench frontier`: our points against other ways to trade accuracy for cost.

All train on the same data for as many epochs. Each method's result is kept under `--work` as soon
as it is there, and the same call goes on from it. Latencies are measured at the end, of all points
interleaved in random order, in ONNX Runtime; networks of text have none, being not exported yet.
"""

import argparse
import json
import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import arguments, report
from benchmarks.effort import Precision
from benchmarks.methods import ABLATIONS, METHODS, TEXT, Bench, Task
from benchmarks.profiler import measure
from maestro_core import data, sentences
from maestro_core.allocator import keep_freed_memory
from maestro_core.frontier import pareto
from maestro_core.host import Elsewhere
from maestro_core.models.lenet import LeNet
from maestro_core.models.mirrored import Mirrored
from maestro_core.models.resnet9 import ResNet9
from maestro_core.models.transformer import Transformer
from maestro_core.recipes.cifar10_small import RECIPE as CIFAR10_SMALL
from maestro_core.recipes.mnist_lenet import RECIPE as MNIST_LENET
from maestro_core.recipes.multi30k_transformer import RECIPE as MULTI30K_TRANSFORMER
from maestro_core.recipes.recipe import TextRecipe
from maestro_core.schedule import Phase
from maestro_core.sentences import Corpus
from maestro_core.writing import write_atomically
from server.engine import session_options

# Points of our own and of the networks cut by our search: enough for a curve, scored in minutes.
POINTS = 8
# A quarter of the paper's width, half of its layers and a third of the sentences: all methods take
# about 20 minutes on two cores with `--threads 2`.
VOCABULARY = 2_000
SMALL_TRANSFORMER = replace(
    MULTI30K_TRANSFORMER,
    vocabulary=VOCABULARY,
    training=replace(
        MULTI30K_TRANSFORMER.training,
        phases=(Phase("dense", 5, 2e-3), Phase("ordered", 1, 1e-3), Phase("nested", 4, 1e-3)),
        batch_size=64,
    ),
    search=replace(
        MULTI30K_TRANSFORMER.search, points=POINTS, least_macs=0.2, probes=5, samples=64
    ),
)
# One phase of each kind, and every rank: of few channels, steps of 16 leave hardly any.
SMALL_RESNET9 = replace(
    CIFAR10_SMALL,
    training=replace(
        CIFAR10_SMALL.training,
        phases=(Phase("dense", 3, 0.25), Phase("ordered", 1, 0.02), Phase("nested", 2, 0.06)),
    ),
    search=replace(CIFAR10_SMALL.search, points=POINTS, multiple=1, removable=()),
)
TASKS = {
    "mnist": Task(
        recipe=replace(MNIST_LENET, search=replace(MNIST_LENET.search, points=POINTS)),
        network=LeNet,
        width=1.0,
        narrower=(0.7, 0.5, 0.35),
        kept=("conv1", "fc3"),
        epochs=12,
        samples=0,
    ),
    "cifar10": Task(
        recipe=SMALL_RESNET9,
        network=lambda width: Mirrored(ResNet9(width=width)),
        width=0.16,
        narrower=(0.11, 0.08),
        kept=("network.whitening", "network.body.1.first.0", "network.head"),
        epochs=6,
        samples=20_000,
    ),
    "multi30k": Task(
        recipe=SMALL_TRANSFORMER,
        network=lambda width: Transformer(
            VOCABULARY, round(128 * width), layers=3, heads=4, hidden=round(512 * width)
        ),
        width=1.0,
        narrower=(0.5,),
        kept=("embedding", "head", "encoder.0.*", "decoder.0.*"),
        epochs=10,
        samples=10_000,
    ),
}
PICTURES = tuple(name for name in METHODS if name not in ABLATIONS)
PERPLEXITIES = (4, 5, 6, 8, 10, 12, 14, 17, 20, 25, 30, 40, 50, 70, 100, 200, 500, 1_000)
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)


@dataclass(frozen=True, slots=True)
class Measure:
    """What the points of a task are compared by: a score, and costs by their key in a row."""

    score: str
    label: str
    costs: Mapping[str, str]
    lowest: bool = False

    def best(self, row: Mapping[str, Any]) -> float:
        """Return the score of a row so that more is better."""
        return float(-row[self.score] if self.lowest else row[self.score])


ACCURACY = Measure(
    "accuracy",
    "test accuracy, %",
    {
        "macs": "MACs",
        "params": "parameters",
        "p50_ms": "measured latency of one sample, ms (p50)",
    },
)
PERPLEXITY = Measure(
    "perplexity",
    "test perplexity of a token",
    {
        "macs": "MACs of a pair of 28 tokens each",
        "linear_params": "parameters, without embeddings",
        "embedding_params": "parameters of embeddings and projection",
    },
    lowest=True,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, print the result, and write it where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench frontier", description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="mnist")
    parser.add_argument("--data", type=Path, required=True, help="as the task's recipe wants it")
    parser.add_argument("--work", type=Path, help="for checkpoints and results; out/frontier-TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--ablations", action="store_true", help="other ways to sample ranks, too")
    parser.add_argument("--epochs", type=arguments.count, help="of every method")
    parser.add_argument("--samples", type=int, help="to train every method on; 0: all")
    parser.add_argument("--threads", type=arguments.count, default=1)
    parser.add_argument(
        "--budget-s", type=arguments.positive, default=60.0, help="of measuring latency"
    )
    parser.add_argument("--plot", type=Path, help="draw the methods into this PNG")
    parser.add_argument("--out", type=Path, help="else results/frontier-TASK.json")
    chosen = parser.parse_args(argv)
    if chosen.samples is not None and chosen.samples < 0:
        raise ValueError(f"--samples is {chosen.samples}, not 0 or more")
    task = TASKS[chosen.task]
    given = {name: getattr(chosen, name) for name in ("epochs", "samples")}
    task = replace(task, **{name: value for name, value in given.items() if value is not None})
    text = isinstance(task.recipe, TextRecipe)
    methods = chosen.methods or (TEXT if text else PICTURES)
    names = list(dict.fromkeys([*methods, *(ABLATIONS if chosen.ablations else ())]))
    check_epochs(task, names)
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    root = chosen.work or Path("out") / f"frontier-{chosen.task}"
    with Progress(console=Console(stderr=True)) as progress:
        bench = Bench(task, load(task, chosen.data), root, progress)
        made = {name: kept(bench, name) for name in names}
    elsewhere = Elsewhere()
    if text:
        measure_by, rows = PERPLEXITY, {name: entry["rows"] for name, entry in made.items()}
    else:
        measure_by = ACCURACY
        rows = with_latencies(root, made, chosen.threads, chosen.budget_s)
    result = {
        **report.conditions(),
        "torch": torch.__version__,
        "task": chosen.task,
        "data": {"name": bench.data.name, "sha256": bench.data.sha256},
        "epochs": task.epochs,
        "train": len(bench.data.train),
        "validation": len(bench.data.validation),
        "test": len(bench.data.test),
        "threads": chosen.threads,
        "batch": 1,
        "cores_used_by_others": elsewhere.share(),
        f"at_their_{measure_by.score}": against(rows.get("maestro", []), rows, measure_by),
        "seconds": {name: entry["seconds"] for name, entry in made.items()},
        "methods": rows,
    }
    report.write(result, chosen.out or report.RESULTS / f"frontier-{chosen.task}.json")
    if chosen.plot:
        draw(rows, chosen.task, chosen.plot, measure_by)


def check_epochs(task: Task, methods: Collection[str]) -> None:
    """Refuse fewer epochs than the phases of our own method, which comes after all rivals.

    Raises:
        ValueError: how many there must be.
    """
    phases = len(task.recipe.training.phases)
    if "maestro" in methods and task.epochs < phases:
        raise ValueError(
            f"--epochs is {task.epochs}, not {phases} or more: the method maestro trains in "
            f"{phases} phases"
        )


def load(task: Task, path: Path) -> data.Data | Corpus:
    """Return the task's data, of the training samples as many as it says."""
    recipe = task.recipe
    if isinstance(recipe, TextRecipe):
        corpus = sentences.load(path, recipe.languages, recipe.splits, recipe.vocabulary)
        return replace(corpus, train=corpus.train.first(task.samples)) if task.samples else corpus
    loaded = data.load(
        path,
        recipe.image,
        len(recipe.labels),
        recipe.validation,
        recipe.training.seed,
        recipe.augmentation,
    )
    return replace(loaded, train=loaded.train.first(task.samples)) if task.samples else loaded


def kept(bench: Bench, name: str) -> dict[str, Any]:
    """Return a method's rows and the seconds it took, run now or kept from an earlier call.

    Raises:
        ValueError: what is kept is of another task, number of epochs or data.
    """
    path = bench.root / f"{name}.json"
    task = bench.task
    own = {"epochs": task.epochs, "narrower": task.narrower, "kept": task.kept}
    own["threads"] = torch.get_num_threads()
    identity = json.loads(json.dumps({**bench.identity(task.recipe.training), **own}))
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found["identity"] != identity:
            raise ValueError(f"{path} is of another task: choose another --work, or remove it")
        return found
    start = time.perf_counter()
    rows = METHODS[name](bench)
    seconds = round(time.perf_counter() - start, 1)
    entry = {"identity": identity, "seconds": seconds, "rows": [row._asdict() for row in rows]}
    write_atomically(path, json.dumps(entry).encode())
    return {**entry, "rows": json.loads(json.dumps(entry["rows"]))}


def with_latencies(
    root: Path, made: Mapping[str, Mapping[str, Any]], threads: int, budget_s: float
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each method with `p50_ms` and `p95_ms` of one sample."""
    rows = [(name, dict(row)) for name, entry in made.items() for row in entry["rows"]]
    if not rows:  # recalibrated, of a network that normalises nothing
        return {name: [] for name in made}
    sessions = [
        ort.InferenceSession(
            root / row["graph"], session_options(threads), providers=["CPUExecutionProvider"]
        )
        for _, row in rows
    ]
    inputs = sessions[0].get_inputs()[0]
    x = np.random.default_rng(0).normal(size=(1, *inputs.shape[1:])).astype(np.float32)
    measured = measure(
        lambda i, *_: sessions[i].run(None, {inputs.name: x}),
        range(len(sessions)),
        (1,),
        budget_s=budget_s,
        precision=Precision(relative=0.01, absolute_ms=0.001),
        rng=random.Random(0),
        clock=time.perf_counter,
    )
    by_method: dict[str, list[dict[str, Any]]] = {name: [] for name in made}
    for (name, row), latency in zip(rows, measured.latencies, strict=True):
        times = {"p50_ms": round(latency.p50_ms, 4), "p95_ms": round(latency.p95_ms, 4)}
        by_method[name].append({**row, **times, "n": latency.n})
    return by_method


def against(
    ours: Sequence[Mapping[str, Any]],
    methods: Mapping[str, Sequence[Mapping[str, Any]]],
    by: Measure = ACCURACY,
) -> dict[str, list[dict[str, float | None]]]:
    """Return for each point of each method what ours costs over it, at no worse a score.

    None: no point of ours is as good.
    """
    found: dict[str, list[dict[str, float | None]]] = {}
    for name, rows in methods.items():
        found[name] = []
        for row in rows:
            as_good = [our for our in ours if by.best(our) >= by.best(row)]
            ratios = {
                cost: round(min(our[cost] for our in as_good) / row[cost], 3) if as_good else None
                for cost in by.costs
            }
            found[name].append({by.score: row[by.score], **ratios})
    return found


def draw(
    methods: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str,
    path: Path,
    by: Measure = ACCURACY,
) -> None:
    """Draw the score by each cost into the picture at `path`: all points, a line through the best.

    Accuracy is on a logit scale: from 98 to 99 % is as far as from 50 to 67 %. Perplexity is on a
    logarithmic one, and the lowest is on top, so that up is better in all pictures.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    shown = {name: rows for name, rows in methods.items() if rows}
    for axes, (cost, label) in zip(
        figure.subplots(1, len(by.costs)), by.costs.items(), strict=True
    ):
        axes.set(xlabel=label, ylabel=by.label, xscale="log")
        axes.set_yscale("log" if by.lowest else "logit")
        for i, (name, rows) in enumerate(shown.items()):
            x, y = [row[cost] for row in rows], [_height(row, by) for row in rows]
            best = pareto(x, [by.best(row) for row in rows])
            colour, width = ("black", 3) if name == "maestro" else (f"C{i}", 1)
            axes.plot([x[k] for k in best], [y[k] for k in best], color=colour, linewidth=width)
            axes.plot(x, y, "o", markersize=4, color=colour, label=name.replace("_", " "))
        _set_ticks(axes, by)
        axes.tick_params("x", which="minor", labelsize="x-small", rotation=45)  # else they overlap
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _height(row: Mapping[str, Any], by: Measure) -> float:
    return float(row[by.score] if by.lowest else min(row[by.score], 0.9999))


def _set_ticks(axes: Any, by: Measure) -> None:  # noqa: ANN401  matplotlib has no types
    from matplotlib.ticker import NullLocator

    low, high = axes.get_ylim()
    ticks = [tick for tick in (PERPLEXITIES if by.lowest else TICKS) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick if by.lowest else 100 * tick:g}" for tick in ticks])
    if by.lowest:
        axes.invert_yaxis()
    axes.yaxis.set_minor_locator(NullLocator())


if __name__ == "__main__":
    main()
