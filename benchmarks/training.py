"""`maestro bench training`: a low-rank ordered step of training against a dense one.

One layer is cut at random and the group lasso is in the loss, as in the ordered phase; at full rank
and with every rank halved. Steps of all kinds run interleaved in random order, in one process.
"""

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks import arguments, report
from maestro_core.accounting import measure
from maestro_core.allocator import keep_freed_memory
from maestro_core.factorize import factorize_, low_rank_layers
from maestro_core.host import Elsewhere
from maestro_core.lod import truncate_
from maestro_core.models.resnet import ResNet18
from maestro_core.models.resnet9 import ResNet9
from maestro_core.models.vgg import VGG19
from maestro_core.training import ordered_loss

LASSO = 16e-6  # the paper's for ResNet-18; its cost is the same for any weight above 0
KINDS = ("dense", "ordered", "ordered_half_rank")
# Rounds that are not counted: the first steps ask the system for the memory that later ones use
# again.
WARM_UP = 5

Step = Callable[[], None]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Network:
    """A network for pictures (b, 3, 32, 32), trained as its recipe does.

    `precision` is that of forward and backward; layers named in `keep` stay dense.
    """

    name: str
    make: Callable[[], nn.Module]
    precision: Dtype
    keep: tuple[str, ...]


NETWORKS = (
    Network("resnet18", ResNet18, "float32", keep=()),
    Network("vgg19", VGG19, "float32", keep=()),
    Network("resnet9", ResNet9, "bfloat16", keep=("whitening",)),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and write it where `--out` says."""
    names = [network.name for network in NETWORKS]
    parser = argparse.ArgumentParser(prog="maestro bench training", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--batch", type=arguments.count, default=128, help="pictures in a step")
    parser.add_argument("--rounds", type=arguments.count, default=20, help="steps of each kind")
    parser.add_argument("--threads", type=arguments.count, default=1)
    parser.add_argument("--quick", action="store_true", help="3 rounds of batch 16")
    parser.add_argument("--out", type=Path, help="else results/training.json, but for --quick")
    chosen = parser.parse_args(argv)
    batch, rounds = (16, 3) if chosen.quick else (chosen.batch, chosen.rounds)
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()  # as `maestro train` does
    result: dict[str, Any] = {
        **report.conditions(),
        "torch": torch.__version__,
        "threads": chosen.threads,
        "batch": batch,
        "warm_up": WARM_UP,
    }
    for network in NETWORKS:
        if network.name in chosen.networks:
            elsewhere = Elsewhere()
            row = compared(network, batch, rounds)
            result[network.name] = {**row, "cores_used_by_others": elsewhere.share()}
    report.write(result, report.place("training.json", chosen.out, quick=chosen.quick))


def compared(network: Network, batch: int, rounds: int) -> dict[str, Any]:
    """Return each kind's seconds a step over `rounds`, and their ratios round by round."""
    models = {kind: make(network, kind) for kind in KINDS}
    steps = {kind: step_of(models[kind], kind, network.precision, batch) for kind in KINDS}
    times_s = interleaved(steps, rounds, random.Random(0), time.perf_counter)
    return {
        "precision": network.precision,
        "step_s": {kind: _quantiles(times_s[kind]) for kind in KINDS},
        "kept_for_backward_mib": {kind: _kept_mib(models[kind], network, batch) for kind in KINDS},
        "ordered_over_dense": _ratio(times_s["ordered"], times_s["dense"]),
        "half_over_dense": _ratio(times_s["ordered_half_rank"], times_s["dense"]),
        "half_over_ordered": _ratio(times_s["ordered_half_rank"], times_s["ordered"]),
        "total_rank": {kind: _total_rank(models[kind]) for kind in KINDS[1:]},
        "macs_over_dense": {kind: _macs_over_dense(models[kind]) for kind in KINDS[1:]},
        "n": rounds,
    }


def make(network: Network, kind: str) -> nn.Module:
    """Return the network in training mode: dense, factorised, or at half of every rank."""
    torch.manual_seed(0)
    model = network.make()
    if kind != "dense":
        factorize_(model, network.keep)
    if kind == "ordered_half_rank":
        for layer in low_rank_layers(model).values():
            truncate_(layer, layer.rank // 2)
    return model.train()


def step_of(model: nn.Module, kind: str, precision: Dtype, batch: int) -> Step:
    """Return one step of training on made-up pictures: loss, backward, optimiser."""
    optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    x = _pictures(batch)
    labels = torch.randint(10, (batch,))
    rng = random.Random(0)

    def loss() -> Tensor:
        if kind == "dense":
            return F.cross_entropy(model(x), labels)
        return ordered_loss(model, x, labels, LASSO, rng)

    def step() -> None:
        with _precision(precision):
            value = loss()
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()

    return step


def interleaved(
    steps: Mapping[str, Step], rounds: int, rng: random.Random, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return how long each step took in every round, in seconds, WARM_UP rounds left out."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(WARM_UP + rounds):
        for kind in rng.sample(sorted(steps), len(steps)):
            start = clock()
            steps[kind]()
            times[kind].append(clock() - start)
    return {kind: taken[WARM_UP:] for kind, taken in times.items()}


def _kept_mib(model: nn.Module, network: Network, batch: int) -> float:
    """Return the memory that a forward pass keeps for the backward pass, weights included."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, _precision(network.precision):
        _ = model(_pictures(batch))
    return round(sum(kept.values()) / 2**20, 1)


def _precision(dtype: Dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16")


def _pictures(batch: int) -> Tensor:
    """Return made-up pictures, channels innermost in memory, as data.py has them."""
    return torch.randn(batch, 32, 32, 3).permute(0, 3, 1, 2)


def _total_rank(model: nn.Module) -> int:
    return sum(layer.rank for layer in low_rank_layers(model).values())


def _macs_over_dense(model: nn.Module) -> dict[str, float]:
    """Return the MACs of a forward pass as two factors throughout, and in the cheaper form."""
    cost = measure(model, torch.zeros(1, 3, 32, 32))
    factors = cost.macs + sum(
        layer.max_rank * (layer.out_features + layer.fan_in) * layer.positions
        for layer in cost.layers
    )
    cheaper = cost.macs_at([layer.max_rank for layer in cost.layers])
    return {
        "as_factors": round(factors / cost.dense_macs, 3),
        "in_the_cheaper_form": round(cheaper / cost.dense_macs, 3),
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    return _quantiles([a / b for a, b in zip(ours, theirs, strict=True)])


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    p5, p25, p50, p75, p95 = np.percentile(values, [5, 25, 50, 75, 95])
    named = {"p5": p5, "p25": p25, "p50": p50, "p75": p75, "p95": p95}
    return {name: round(float(value), 4) for name, value in named.items()}


if __name__ == "__main__":
    main()
