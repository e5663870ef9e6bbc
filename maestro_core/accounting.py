"""What a network costs: its factorised layers as the artifact knows them, and all the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from maestro_core.artifact import Layer
from maestro_core.data import Inputs
from maestro_core.factorize import low_rank_layers
from maestro_core.layers import LowRankConv2d, LowRankEmbedding, LowRankLayer


@dataclass(frozen=True, slots=True)
class Embedding(Layer):
    """A table of `in_features` vectors, and the projections that are tied to it.

    The projections are at `positions` places, as a linear layer is. At `lookups` places a vector is
    looked up, which costs nothing in the dense table and rank · out_features MACs in two factors.
    """

    lookups: int

    def macs(self, rank: int) -> int:
        """Return the multiply-accumulates of `rank` for one sample."""
        read = 0 if self.is_dense(rank) else rank * self.out_features * self.lookups
        return self.params(rank) * self.positions + read


@dataclass(frozen=True, slots=True)
class Cost:
    """The factorised layers in module order, and what no rank changes.

    `macs` and `params` are those of the rest: layers left dense, biases, normalisation; of these
    parameters `table_params` are in embeddings. MACs are those of linear, convolution and embedding
    layers and of the four maps of an attention, in factors or left dense, for one sample; products
    of queries, keys and values are not among them.
    """

    layers: tuple[Layer, ...]
    macs: int
    params: int
    table_params: int = 0

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

    def embedding_params_at(self, ranks: Sequence[int]) -> int:
        """Return how many of `params_at` are in embeddings and the projections tied to them."""
        return self.table_params + sum(
            layer.params(rank)
            for layer, rank in zip(self.layers, ranks, strict=True)
            if isinstance(layer, Embedding)
        )

    @property
    def dense_embedding_params(self) -> int:
        """Return how many of `dense_params` are in embeddings and projections tied to them."""
        return self.table_params + sum(
            layer.out_features * layer.fan_in
            for layer in self.layers
            if isinstance(layer, Embedding)
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


def measure(model: nn.Module, x: Inputs) -> Cost:
    """Return what `model` costs for one sample like `x`, (1, …); it is run once to see the shapes.

    Raises:
        ValueError: a factorised layer is never called, so its positions are unknown.
    """
    layers = low_rank_layers(model)
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLayer | nn.Linear | _ConvNd)
    }
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    positions, attention_macs = _run(model, modules, attentions, x)
    factors = {id(p) for layer in layers.values() for p in (layer.down, layer.up)}
    return Cost(
        layers=tuple(
            _describe(name, layer, _users(name, layer, modules, positions))
            for name, layer in layers.items()
        ),
        macs=sum(
            module.weight.numel() * positions[name]
            for name, module in modules.items()
            if isinstance(module, nn.Linear | _ConvNd)
        )
        + attention_macs,
        params=sum(p.numel() for p in model.parameters() if id(p) not in factors),
        table_params=sum(p.numel() for p in _tables(model)),
    )


def _users(
    name: str,
    layer: LowRankLayer,
    modules: Mapping[str, nn.Module],
    positions: Mapping[str, int],
) -> list[tuple[LowRankLayer, int]]:
    """Return the modules that have the factors of `layer`, itself among them, with their positions.

    Raises:
        ValueError: none of them is ever called.
    """
    users = [
        (module, positions[other])
        for other, module in modules.items()
        if isinstance(module, LowRankLayer)
        and (module.down is layer.down or module.down is layer.up)
    ]
    if not any(places for _, places in users):
        raise ValueError(f"layer '{name}' is factorised but never called")
    return users


def _tables(model: nn.Module) -> list[Tensor]:
    """Return the tables of dense embeddings, each once."""
    found = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return list({id(weight): weight for weight in found}.values())


def _run(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    attentions: Sequence[nn.MultiheadAttention],
    x: Inputs,
) -> tuple[dict[str, int], int]:
    """Return at how many places each module is applied to one sample, over all its calls.

    And the MACs of the maps of `attentions`, which none of the modules is called for.
    """
    seen = dict.fromkeys(modules, 0)
    macs = 0

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            # A transposed convolution is applied at every place of its input.
            at = inputs[0] if isinstance(module, _ConvTransposeNd) else y
            spatial = len(module.kernel_size) if isinstance(module, _ConvNd | LowRankConv2d) else 0
            seen[name] += at.numel() // at.shape[-1 - spatial]

        return hook

    def attend(
        attention: nn.MultiheadAttention,
        inputs: tuple[Tensor, ...],
        named: Mapping[str, Tensor],
        _y: object,
    ) -> None:
        nonlocal macs
        given = {**dict(zip(("query", "key", "value"), inputs, strict=False)), **named}
        # Each number of an input is multiplied once for each of `embed_dim` outputs of its map;
        # the output map reads as many numbers as the query's.
        numbers = sum(given[name].numel() for name in ("query", "key", "value", "query"))
        macs += attention.embed_dim * numbers

    handles = [
        *(module.register_forward_hook(count(name)) for name, module in modules.items()),
        *(module.register_forward_hook(attend, with_kwargs=True) for module in attentions),
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen, macs


def _describe(name: str, layer: LowRankLayer, users: Sequence[tuple[LowRankLayer, int]]) -> Layer:
    """Return what the artifact knows of `layer`; `users` have its factors, with their positions."""
    lookups = sum(places for user, places in users if isinstance(user, LowRankEmbedding))
    positions = sum(places for user, places in users if not isinstance(user, LowRankEmbedding))
    tables = [user for user, _ in users if isinstance(user, LowRankEmbedding)]
    if tables:
        sizes = (tables[0].num_embeddings, tables[0].embedding_dim)
        return Embedding(name, "linear", *sizes, (), (), (), (), positions, layer.rank, lookups)
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
    sizes = (layer.down.shape[1], layer.up.shape[1])
    return Layer(name, "linear", *sizes, (), (), (), (), positions, layer.rank)
