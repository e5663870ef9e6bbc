"""The training loop: one sampled pass per step, shrinking and a checkpoint after each epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn
from torch.optim import SGD, Optimizer

from maestro_core import checkpoint
from maestro_core.data import Data, Pictures
from maestro_core.evaluation import evaluate
from maestro_core.factorize import forward_at, low_rank_layers
from maestro_core.lod import group_lasso, sample, shrink_


class Diverged(RuntimeError):  # noqa: N818 - it says what happened
    """The loss is no longer a finite number; the message names the step."""


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """How a network is trained: SGD, its rate falling from `learning_rate` to 0 along a cosine.

    `lasso` weighs the group lasso; `threshold` is the importance at or below which a rank is
    removed (λ_gl and ε_ps of Maestro, ICML 2024).
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    lasso: float
    threshold: float
    seed: int


def train_(
    model: nn.Module,
    data: Data,
    hyper: HyperParameters,
    root: Path,
    run: dict[str, Any],
    progress: Progress,
) -> Path:
    """Train the factorised `model`, resuming from what `root` holds; return the last checkpoint.

    All that is random in an epoch follows from (seed, epoch), so a run that was stopped and resumed
    ends with the same bits, on one machine with one number of threads.

    Raises:
        Diverged: the loss is not finite; the last checkpoint stays.
        CheckpointError: `root` holds another run, or can't be written.
    """
    optimizer = SGD(
        model.parameters(),
        lr=hyper.learning_rate,
        momentum=hyper.momentum,
        weight_decay=hyper.weight_decay,
    )
    last = checkpoint.latest(root)
    done = checkpoint.restore_(last, model, optimizer, run).epoch if last else 0
    steps = math.ceil(len(data.train) / hyper.batch_size)
    task = progress.add_task("training", total=hyper.epochs * steps, completed=done * steps)
    for epoch in range(done, hyper.epochs):
        try:
            train_epoch_(model, optimizer, data.train, hyper, epoch, lambda: progress.advance(task))
        except Diverged as error:
            raise Diverged(f"{error}; last good checkpoint: {last or 'none'}") from None
        ranks = shrink_(model, optimizer, hyper.threshold)
        last = checkpoint.save(root, model, optimizer, checkpoint.State(epoch + 1, ranks, run))
        accuracy = evaluate(model, data.validation).accuracy
        progress.update(
            task,
            description=f"epoch {epoch + 1}/{hyper.epochs}, validation {accuracy:.2%}, "
            f"ranks {'-'.join(map(str, ranks.values()))}",
        )
    if last is None:
        raise ValueError(f"epochs must be at least 1, not {hyper.epochs}")
    return last


def train_epoch_(
    model: nn.Module,
    optimizer: Optimizer,
    pictures: Pictures,
    hyper: HyperParameters,
    epoch: int,
    on_step: Callable[[], None],
) -> None:
    """Go once through `pictures` in random order, each step with one layer cut at random.

    Raises:
        Diverged: the loss is not finite.
    """
    rng = Random(f"{hyper.seed}/{epoch}")
    torch.manual_seed(rng.getrandbits(63))
    model.train()
    layers = low_rank_layers(model)
    names, ranks = list(layers), [layer.rank for layer in layers.values()]
    batches = torch.split(torch.randperm(len(pictures)), hyper.batch_size)
    for step, indices in enumerate(batches):
        rate = learning_rate(hyper, epoch * len(batches) + step, hyper.epochs * len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        layer, rank = sample(ranks, rng)
        x, labels = pictures.batch(indices)
        loss = F.cross_entropy(forward_at(model, {names[layer]: rank}, x), labels)
        if hyper.lasso:
            loss = loss + hyper.lasso * group_lasso(layers.values())
        if not loss.isfinite():
            raise Diverged(
                f"the loss is {loss.item()} at epoch {epoch + 1}, step {step + 1} of {len(batches)}"
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        on_step()


def learning_rate(hyper: HyperParameters, step: int, steps: int) -> float:
    """Return the rate of step 0..steps-1: half a cosine (Loshchilov and Hutter, SGDR, 2017)."""
    return hyper.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
