"""Batch normalisation of a network that is cut: each point needs statistics of its own.

A cut layer's output has another mean and variance, so the statistics of the whole network mislead
its points (Yu et al., "Slimmable Neural Networks", ICLR 2019). Statistics are named by their
buffers, and lent to the model for a call; the model's own never change here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maestro_core.data import Pictures, evenly
from maestro_core.factorize import forward_at

Statistics = dict[str, Tensor]

BATCH = 500
CALIBRATING = 4_000  # training pictures that a point's normalisation is of


def scratch(model: nn.Module) -> Statistics:
    """Return copies of the model's statistics, for a pass that must not change them."""
    return {name: buffer.clone() for name, buffer in _buffers(model)}


@contextmanager
def evaluating(model: nn.Module, by_batch: bool = False) -> Iterator[None]:
    """Put `model` in inference mode within, but normalise by each batch if `by_batch`."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for layer in _layers(model).values():
        layer.train(by_batch)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def recalibrate(model: nn.Module, ranks: Mapping[str, int], pictures: Pictures) -> Statistics:
    """Return the statistics of the model cut to `ranks` over `pictures`; empty without such layers.

    Layers that gathered none, as one that is frozen, are not among them: they keep the model's own.
    They are the means over batches of at most 500, about as large as each other, each weighing the
    same. Pictures are changed as in training, by the same draws every time: of clean ones the
    statistics are not those that the network learned with.
    """
    statistics = {name: _unset(name, buffer) for name, buffer in _buffers(model)}
    if not statistics:
        return {}
    layers = _layers(model).values()
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = None  # torch's way to say: the mean of all batches
        with (
            evaluating(model, by_batch=True),
            torch.inference_mode(),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(0)
            order = torch.arange(len(pictures))
            batches = [order[part] for part in evenly(len(pictures), BATCH)]
            for x, _ in pictures.augmented(batches):
                forward_at(model, ranks, x, buffers=statistics)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    gathered = {
        name.rpartition(".")[0]
        for name, buffer in statistics.items()
        if not torch.equal(buffer, _unset(name, buffer))
    }
    return {
        name: buffer.clone()
        for name, buffer in statistics.items()
        if name.rpartition(".")[0] in gathered
    }


def _unset(name: str, buffer: Tensor) -> Tensor:
    """Return what a layer that has seen nothing holds in the place of `buffer`."""
    return torch.ones_like(buffer) if name.endswith("running_var") else torch.zeros_like(buffer)


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers that keep statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, layer in _layers(model).items():
        yield from layer.named_buffers(prefix=name, recurse=False)
