"""The training loop: first with one layer cut at random, then on the chain that came of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from maestro_core import checkpoint
from maestro_core.consolidation import consolidation_loss
from maestro_core.data import Data, Pictures
from maestro_core.evaluation import evaluate
from maestro_core.factorize import forward_at, low_rank_layers
from maestro_core.frontier import Chain
from maestro_core.lod import group_lasso, sample, shrink_


class Diverged(ValueError):  # noqa: N818  it says what happened
    """The loss is no longer a finite number; the message names the step."""


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """How a network is trained: SGD in two phases, in each the rate falls to 0 along a cosine.

    `epochs` are low-rank ordered (Maestro, ICML 2024): `lasso` weighs the group lasso, `threshold`
    is the importance at or below which a rank is removed (there λ_gl and ε_ps). Then
    `consolidation_epochs` train the points of the chain (consolidation.py).
    """

    epochs: int
    consolidation_epochs: int
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
    find: Callable[[], Chain],
    root: Path,
    run: dict[str, Any],
    progress: Progress,
) -> Chain:
    """Train the factorised `model`, going on from what `root` holds; return the chain.

    `find` chooses the chain, nested ranks in module order, when ordered training is done.
    All that is random in an epoch follows from (seed, epoch), so a run that was stopped and resumed
    ends with the same bits, on one machine with one number of threads.

    Raises:
        Diverged: the loss is not finite; the last checkpoint stays.
        CheckpointError: `root` holds another run, or can't be written.
    """
    optimizer = _optimizer(model, hyper)
    last = checkpoint.latest(root)
    done, chain = 0, Chain()
    if last:
        state = checkpoint.restore_(last, model, optimizer, run)
        done, chain = state.epoch, state.chain
    steps = math.ceil(len(data.train) / hyper.batch_size)
    epochs = hyper.epochs + hyper.consolidation_epochs
    task = progress.add_task("training", total=epochs * steps, completed=done * steps)
    for epoch in range(done, epochs):
        if epoch == hyper.epochs:
            chain, optimizer = find(), _optimizer(model, hyper)
        try:
            train_epoch_(
                model, optimizer, data.train, hyper, epoch, chain, lambda: progress.advance(task)
            )
            result = evaluate(model, data.validation)
            if not math.isfinite(result.loss):  # the last step's harm shows in no training loss
                raise Diverged(f"the validation loss is {result.loss} after epoch {epoch + 1}")
        except Diverged as error:
            raise Diverged(f"{error}; last good checkpoint: {last or 'none'}") from None
        if epoch < hyper.epochs:
            shrink_(model, optimizer, hyper.threshold)
        ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
        state = checkpoint.State(epoch + 1, ranks, run, chain)
        last = checkpoint.save(root, model, optimizer, state)
        progress.update(
            task,
            description=f"epoch {epoch + 1}/{epochs}, validation {result.accuracy:.2%}, "
            f"ranks {'-'.join(map(str, ranks.values()))}",
        )
    return chain or find()


def train_epoch_(
    model: nn.Module,
    optimizer: Optimizer,
    pictures: Pictures,
    hyper: HyperParameters,
    epoch: int,
    chain: Chain,
    on_step: Callable[[], None],
) -> None:
    """Go once through `pictures` in random order: ordered training, or that of `chain` if given.

    Raises:
        Diverged: the loss is not finite.
    """
    rng = Random(f"{hyper.seed}/{epoch}")
    torch.manual_seed(rng.getrandbits(63))
    model.train()
    phase = (epoch - hyper.epochs, hyper.consolidation_epochs) if chain else (epoch, hyper.epochs)
    batches = torch.split(torch.randperm(len(pictures)), hyper.batch_size)
    for step, indices in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(hyper, phase[0] + step / len(batches), phase[1])
        x, labels = pictures.batch(indices)
        if chain:
            loss = consolidation_loss(model, chain, x, labels, rng)
        else:
            loss = ordered_loss(model, x, labels, hyper.lasso, rng)
        if not loss.isfinite():
            raise Diverged(
                f"the loss is {loss.item()} at epoch {epoch + 1}, step {step + 1} of {len(batches)}"
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        on_step()


def ordered_loss(model: nn.Module, x: Tensor, labels: Tensor, lasso: float, rng: Random) -> Tensor:
    """Return the loss with one layer cut at random, and the lasso (Maestro, Algorithm 1)."""
    layers = low_rank_layers(model)
    index, rank = sample([layer.rank for layer in layers.values()], rng)
    loss = F.cross_entropy(forward_at(model, {list(layers)[index]: rank}, x), labels)
    return loss + lasso * group_lasso(layers.values()) if lasso else loss


def learning_rate(hyper: HyperParameters, epoch: float, epochs: int) -> float:
    """Return the rate at `epoch`, 0..epochs: half a cosine (Loshchilov and Hutter, SGDR 2017)."""
    return hyper.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def _optimizer(model: nn.Module, hyper: HyperParameters) -> Optimizer:
    return SGD(
        model.parameters(),
        lr=hyper.learning_rate,
        momentum=hyper.momentum,
        weight_decay=hyper.weight_decay,
    )
