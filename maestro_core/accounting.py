"""What a network costs: its factorised layers as the artifact knows them, and all the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maestro_core.artifact import Layer
from maestro_core.factorize import low_rank_layers
from maestro_core.layers import LowRankConv2d, LowRankLayer


@dataclass(frozen=True, slots=True)
class Cost:
    """The factorised layers in module order, and what no rank changes.

    `macs` and `params` are those of the rest: layers left dense, biases, normalisation.
    MACs are those of linear and convolution layers, for one sample.
    """

    layers: tuple[Layer, ...]
    macs: int
    params: int

    def macs_at(self, ranks: Sequence[int]) -> int:
        """Return the multiply-accumulates of one sample at one rank per layer."""
        return self.macs + sum(
            layer.macs(rank) for layer, rank in zip(self.layers, ranks, strict=True)
        )

    def params_at(self, ranks: Sequence[int]) -> int:
        """Return the parameters that are used at one rank per layer."""
        return self.params + sum(
            layer.params(rank) for layer, rank in zip(self.layers, ranks, strict=True)
        )

    @property
    def dense_macs(self) -> int:
        """Return the MACs of the network before it was factorised."""
        return self.macs + sum(
            layer.out_features * layer.fan_in * layer.positions for layer in self.layers
        )

    @property
    def dense_params(self) -> int:
        """Return the parameters of the network before it was factorised."""
        return self.params + sum(layer.out_features * layer.fan_in for layer in self.layers)


def measure(model: nn.Module, x: Tensor) -> Cost:
    """Return what `model` costs for one sample like `x`, (1, …); it is run once to see the shapes.

    Raises:
        ValueError: a factorised layer is never called, so its positions are unknown.
    """
    layers = low_rank_layers(model)
    dense = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    positions = _positions(model, {**layers, **dense}, x)
    for name in layers:
        if not positions[name]:
            raise ValueError(f"layer '{name}' is factorised but never called")
    factors = {id(p) for layer in layers.values() for p in (layer.down, layer.up)}
    return Cost(
        layers=tuple(_describe(name, layer, positions[name]) for name, layer in layers.items()),
        macs=sum(module.weight.numel() * positions[name] for name, module in dense.items()),
        params=sum(p.numel() for p in model.parameters() if id(p) not in factors),
    )


def _positions(model: nn.Module, modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, int]:
    """Return at how many places each module is applied to one sample, over all its calls."""
    seen = dict.fromkeys(modules, 0)

    def count(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, _inputs: object, y: Tensor) -> None:
            spatial = isinstance(module, nn.Conv2d | LowRankConv2d)
            seen[name] += y.numel() // y.shape[1 if spatial else -1]

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen


def _describe(name: str, layer: LowRankLayer, positions: int) -> Layer:
    if isinstance(layer, LowRankConv2d):
        return Layer(
            name,
            "conv2d",
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            positions,
            layer.rank,
        )
    return Layer(
        name, "linear", layer.in_features, layer.out_features, (), (), (), (), positions, layer.rank
    )
