"""The training loop: dense, then with one layer cut at random, then on the chain found by it."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, Optimizer

from maestro_core import averaging, checkpoint, distributed
from maestro_core.accounting import measure
from maestro_core.consolidation import consolidation_loss
from maestro_core.data import Data, Inputs
from maestro_core.evaluation import Result, evaluate
from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.frontier import Chain
from maestro_core.host import computes_bfloat16
from maestro_core.lod import group_lasso, shrink_, truncate_
from maestro_core.loss import cross_entropy
from maestro_core.proximal import proximal_step_
from maestro_core.sampling import Sampling, draw
from maestro_core.schedule import HyperParameters, learning_rate
from maestro_core.sentences import Corpus, Samples, Sentences, example
from maestro_core.target import FALLING, Pursuit, Target, first_weight
from maestro_core.teachers import keep_teacher, load_teachers
from maestro_core.whitening import sample_inputs, whiten_

# A loss is looked at after so many steps: to look makes the host wait for the device.
CHECKED = 20


class Diverged(ValueError):  # noqa: N818  it says what happened
    """The loss is no longer a finite number; the message names the step."""


class NothingLeft(ValueError):  # noqa: N818  it says what happened
    """Every factorised layer came to rank 0; the message names the settings that are too large."""


def train_(
    model: nn.Module,
    data: Data | Corpus,
    hyper: HyperParameters,
    find: Callable[[], Chain],
    root: Path,
    run: dict[str, Any],
    progress: Progress,
) -> Chain:
    """Train `model`, going on from what `root` holds; return the chain.

    A dense model is factorised when the dense epochs are over. `find` chooses the chain, nested
    ranks in module order, when ordered training is done; then ranks above the last point's go.
    All that is random in an epoch follows from (seed, epoch), so a run that was stopped and resumed
    ends with the same bits, on one machine with one number of threads.

    Raises:
        Diverged: the loss is not finite; the last checkpoint stays.
        NothingLeft: the lasso or the threshold removed every rank; likewise.
        CheckpointError: `root` holds another run, can't be written, or is trained in by another.
        FirstFailed: of several processes the first can't write.
        TargetMissed: the target can't be reached, or was not.
    """
    with ExitStack() as stack:
        distributed.by_first(lambda: stack.enter_context(checkpoint.kept_in(root)))
        return _train_in_(root, model, data, hyper, find, run, progress)


def _train_in_(
    root: Path,
    model: nn.Module,
    data: Data | Corpus,
    hyper: HyperParameters,
    find: Callable[[], Chain],
    run: dict[str, Any],
    progress: Progress,
) -> Chain:
    # What teaches is as the network was before it was factorised.
    dense, teachers = copy.deepcopy(model) if hyper.taught else model, list[nn.Module]()
    last, state, optimizer = _resumed(model, hyper, root, run)
    chain = state.chain
    steps = math.ceil(len(data.train) / hyper.batch_size)
    task = progress.add_task("training", total=hyper.epochs * steps, completed=state.epoch * steps)
    for epoch in range(state.epoch, hyper.epochs):
        phase, before = hyper.at(epoch)
        if phase.kind != "dense":
            start_(model, data, hyper)
        if phase.kind == "nested" and not chain:
            chain = distributed.agreed(find())
            cut_(model, chain[-1])
        if phase.taught and not teachers:
            teachers = load_teachers(root, dense, hyper)
        if before == 0:
            averaging.begin_(model, root, hyper, epoch)
            optimizer = _optimizer(model, hyper)
        pursuit = None
        if phase.kind == "ordered" and hyper.target:
            pursuit = _pursuit(model, data, hyper, hyper.target, epoch, state.lasso)
        try:
            train_epoch_(
                model,
                optimizer,
                data.train,
                hyper,
                epoch,
                chain,
                lambda: progress.advance(task),
                pursuit,
                teachers if phase.taught else (),
            )
            distributed.share_buffers_(model)
            averaging.end_(model, data, root, hyper, epoch + 1)
            result = _validated(model, data, epoch)
        except Diverged as error:
            raise Diverged(f"{error}; last good checkpoint: {last or 'none'}") from None
        if phase.kind == "ordered":
            _shrink_(
                model, optimizer, hyper, pursuit, is_falling=before + 1 < FALLING * phase.epochs
            )
            _check_left(model, hyper, epoch, last)
        ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
        lasso = pursuit.weight if pursuit else hyper.lasso
        state = checkpoint.State(epoch + 1, ranks, run, chain, lasso)
        last = distributed.by_first(partial(_keep, root, model, optimizer, hyper, state)) or last
        said = (
            f"validation {_said(data, result)}, ranks {'-'.join(map(str, ranks.values())) or 'all'}"
        )
        _show(progress, task, f"epoch {epoch + 1}/{hyper.epochs}, {said}")
    start_(model, data, hyper)
    if not chain:
        chain = distributed.agreed(find())
        cut_(model, chain[-1])
    return chain


def _resumed(
    model: nn.Module, hyper: HyperParameters, root: Path, run: dict[str, Any]
) -> tuple[Path | None, checkpoint.State, Optimizer]:
    """Give `model` what the last checkpoint in `root` holds; return that, if there is one, where
    training is, and the optimiser.

    Raises:
        CheckpointError: `root` holds another run.
    """
    last = checkpoint.latest(root)
    state = checkpoint.read_state(last) if last else checkpoint.State(0, {}, run, [])
    if state.ranks:
        _factorize_(model, hyper)
    optimizer = _optimizer(model, hyper)
    if last:
        checkpoint.restore_(last, model, optimizer, run)
    return last, state, optimizer


def _keep(
    root: Path,
    model: nn.Module,
    optimizer: Optimizer,
    hyper: HyperParameters,
    state: checkpoint.State,
) -> Path:
    """Write what is kept of an epoch that ended; return its checkpoint.

    Raises:
        CheckpointError: the disk does not take it.
    """
    keep_teacher(root, model, hyper, state.epoch)
    return checkpoint.save(root, model, optimizer, state)


def _validated(model: nn.Module, data: Data | Corpus, epoch: int) -> Result:
    """Return how good the network is after an epoch: the last step's harm is in no training loss.

    Raises:
        Diverged: the loss is not finite.
    """
    result = evaluate(model, data.validation)
    if not math.isfinite(result.loss):
        raise Diverged(f"the validation loss is {result.loss} after epoch {epoch + 1}")
    return result


def _show(progress: Progress, task: TaskID, done: str) -> None:
    """Say what is done, beside the bar that moves, or in a line of a log, which has none."""
    progress.update(task, description=done)
    if not (progress.disable or progress.console.is_terminal):
        progress.console.print(done)


def train_epoch_(
    model: nn.Module,
    optimizer: Optimizer,
    samples: Samples,
    hyper: HyperParameters,
    epoch: int,
    chain: Chain,
    on_step: Callable[[], None],
    pursuit: Pursuit | None = None,
    teachers: Sequence[nn.Module] = (),
) -> None:
    """Go once through `samples` in random order, in the phase that `epoch` is of.

    Each of several processes takes its part of a batch, and all make the same step; a rest of
    samples too few for all is left out. A `pursuit` says how the lasso is weighed, in place of
    `hyper`; `teachers` what the chain learns, in place of labels.

    Raises:
        Diverged: the loss is not finite.
    """
    rng = Random(f"{hyper.seed}/{epoch}")
    torch.manual_seed(rng.getrandbits(63))
    model.train()
    phase, before = hyper.at(epoch)
    in_bfloat16 = hyper.precision == "bfloat16" and (
        samples.device.type != "cpu" or computes_bfloat16()
    )
    batches = _batches(samples, hyper.batch_size)
    if distributed.size() > 1:  # each augments and drops in its own way
        torch.manual_seed(Random(f"{hyper.seed}/{epoch}/{distributed.rank()}").getrandbits(63))
    losses: dict[int, Tensor] = {}
    parts = distributed.parts(batches)
    changed: Iterator[tuple[Inputs, Tensor]] = samples.augmented(parts, phase.distortion)
    for step, (x, labels) in enumerate(changed):
        for group in optimizer.param_groups:
            rate = learning_rate(phase, hyper.warmup, before + step / len(batches))
            group["lr"] = rate * group.get("times", 1.0)
        with torch.autocast(labels.device.type, torch.bfloat16, in_bfloat16):
            if phase.kind == "nested":
                loss = consolidation_loss(
                    model, chain, x, labels, rng, hyper.label_smoothing, teachers
                )
            elif phase.kind == "ordered":
                lasso = 0.0 if hyper.proximal or pursuit else hyper.lasso
                loss = ordered_loss(
                    model, x, labels, lasso, rng, hyper.label_smoothing, hyper.sampling
                )
            else:
                loss = cross_entropy(model(x), labels, hyper.label_smoothing)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        losses[step] = distributed.average_(model, loss, labels)
        if (step + 1) % CHECKED == 0:
            _check(losses, epoch, len(batches))
        optimizer.step()
        layers = list(low_rank_layers(model).values())
        rate = optimizer.param_groups[0]["lr"] / (1 - hyper.momentum)
        if pursuit:
            del loss  # its graph remembers the shapes, and ranks may go
            done = (before + (step + 1) / len(batches)) / phase.epochs
            pursuit.step_(layers, optimizer, rate, done)
        elif phase.kind == "ordered" and hyper.proximal:
            proximal_step_(layers, hyper.lasso * rate)
        on_step()
    _check(losses, epoch, len(batches))


def ordered_loss(
    model: nn.Module,
    x: Inputs,
    labels: Tensor,
    lasso: float,
    rng: Random,
    label_smoothing: float = 0.0,
    sampling: Sampling = "pairs",
) -> Tensor:
    """Return the loss with layers cut at random, and the lasso (Maestro, Algorithm 1)."""
    layers = low_rank_layers(model)
    names = list(layers)
    drawn = draw(sampling, [layer.rank for layer in layers.values()], rng)
    logits = forward_at(model, {names[index]: rank for index, rank in drawn.items()}, x)
    loss = cross_entropy(logits, labels, label_smoothing)
    return loss + lasso * group_lasso(layers.values()) if lasso else loss


def _batches(samples: Samples, size: int) -> Sequence[Tensor]:
    """Return the indices of each batch, in an order that torch's generator has drawn.

    Where each process would have one picture of the last batch, or none, the last two are divided
    anew: one alone has no variance to be normalised by.
    """
    order = torch.randperm(len(samples))
    if isinstance(samples, Sentences):
        return samples.grouped(order, size)
    batches = list(torch.split(order, size))
    if len(batches) > 1 and len(batches[-1]) < 2 * distributed.size():
        batches[-2:] = torch.cat(batches[-2:]).tensor_split(2)
    return batches


def _said(data: Data | Corpus, result: Result) -> str:
    """Return how well it went on the validation samples, in the measure of their kind."""
    if isinstance(data, Corpus):
        return f"perplexity {result.perplexity:.2f}"
    return f"{result.accuracy:.2%}"


def _check(losses: dict[int, Tensor], epoch: int, steps: int) -> None:
    """Raise Diverged if a loss, by step, is not finite; else forget them."""
    if losses and not torch.stack(list(losses.values())).isfinite().all():
        step, loss = next((s, v.item()) for s, v in losses.items() if not v.isfinite())
        raise Diverged(f"the loss is {loss} at epoch {epoch + 1}, step {step + 1} of {steps}")
    losses.clear()


def start_(model: nn.Module, data: Data | Corpus, hyper: HyperParameters) -> None:
    """Factorise `model` where it is dense, by its activations if they count."""
    if low_rank_layers(model):
        return
    _factorize_(model, hyper)
    if hyper.whitened:
        whiten_(model, sample_inputs(data.train))


def _shrink_(
    model: nn.Module,
    optimizer: Optimizer,
    hyper: HyperParameters,
    pursuit: Pursuit | None,
    *,
    is_falling: bool,
) -> None:
    """Remove at the end of an ordered epoch what is not important, or what is above the target."""
    if pursuit is None:
        shrink_(model, optimizer, hyper.threshold)
    elif not is_falling:
        layers = list(low_rank_layers(model).values())
        for layer, rank in zip(layers, pursuit.landing(layers), strict=True):
            truncate_(layer, rank, optimizer)


def _check_left(model: nn.Module, hyper: HyperParameters, epoch: int, last: Path | None) -> None:
    """Raise NothingLeft if the network has factorised layers, all of rank 0."""
    layers = low_rank_layers(model).values()
    if layers and not any(layer.rank for layer in layers):
        raise NothingLeft(
            f"no layer has a rank left after epoch {epoch + 1}: a lasso of {hyper.lasso:g} or a "
            f"threshold of {hyper.threshold:g} is too large; last good checkpoint: {last or 'none'}"
        )


def _pursuit(
    model: nn.Module,
    data: Data | Corpus,
    hyper: HyperParameters,
    target: Target,
    epoch: int,
    weight: float,
) -> Pursuit:
    """Return the pursuit of `target` at an epoch of the ordered phase; `weight` is the last λ."""
    cost = measure(model, example(data.train))
    target.check(cost)
    phase, before = hyper.at(epoch)
    if before == 0:
        rate = phase.learning_rate / (1 - hyper.momentum)
        steps = phase.epochs * math.ceil(len(data.train) / hyper.batch_size)
        weight = first_weight(list(low_rank_layers(model).values()), rate, steps)
    return Pursuit(target, cost, weight, before / phase.epochs)


def _factorize_(model: nn.Module, hyper: HyperParameters) -> None:
    if not low_rank_layers(model):
        factorize_(model, hyper.keep)


def cut_(model: nn.Module, ranks: tuple[int, ...]) -> None:
    """Cut every factorised layer, in module order, to its rank for good."""
    for layer, rank in zip(low_rank_layers(model).values(), ranks, strict=True):
        truncate_(layer, rank)


def _optimizer(model: nn.Module, hyper: HyperParameters) -> Optimizer:
    """Return the optimiser in two groups, the rest and normalisation's.

    `times` multiplies a group's rate, which is set at each step.
    """
    times = hyper.normalisation_rate
    normalisation = [
        parameter
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for parameter in module.parameters(recurse=False)
    ]
    faster = {id(parameter) for parameter in normalisation}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in faster]
    decay = hyper.weight_decay
    groups = [
        {"params": rest, "weight_decay": decay, "times": 1.0},
        {"params": normalisation, "weight_decay": decay / times, "times": times},
    ]
    if hyper.adam:
        return Adam(groups, lr=0.0, betas=hyper.adam.betas, eps=hyper.adam.epsilon)
    return SGD(groups, lr=0.0, momentum=hyper.momentum, nesterov=hyper.nesterov)
