"""Factorise a network's layers in place, and run it at given ranks without changing it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maestro_core.attention import LowRankAttention
from maestro_core.data import Inputs
from maestro_core.layers import (
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLayer,
    LowRankLinear,
    why_dense,
)

# It reads the weights of its children instead of calling them.
_READS_CHILDREN = (nn.TransformerEncoderLayer,)
_CANDIDATES = (nn.Linear, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)
_MAPS = ("query", "key", "value", "output")


@dataclass(frozen=True, slots=True)
class Factorized:
    """What `factorize_` did: the layers in two factors, and those left dense with the reason."""

    low_rank: tuple[str, ...]
    dense: dict[str, str]


def factorize_(model: nn.Module, keep: Sequence[str] = ()) -> Factorized:
    """Replace the linear, convolution and embedding layers inside `model` by factors at full rank.

    An attention (nn.MultiheadAttention) becomes four linear layers, `NAME.query` and so on, and a
    projection that shares its weight with an embedding shares its factors.
    `keep` holds patterns (`fc?`, `head.*`) of module names to leave dense.
    The forward pass is unchanged to 1e-5. Parameters are new: make the optimiser afterwards.

    Raises:
        ValueError: a pattern in `keep` matches no such layer, or a weight is not finite.
    """
    found = _candidates(model)
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f"keep: '{pattern}' matches no linear, convolution, embedding or attention layer"
            )
    dense = _why_dense(model, found, keep)
    for name, module in found.items():
        if name not in dense and not all(
            p.is_meta or p.isfinite().all() for p in module.parameters()
        ):
            raise ValueError(f"layer '{name}' holds values that are not finite: it has no factors")
    tables: dict[int, LowRankEmbedding] = {}
    for name, module in sorted(found.items(), key=lambda item: not _is_table(item[1])):
        if name not in dense:  # tables come first: projections take their factors
            _replace_(model, module, _factors(module, tables))
    low_rank = (_parts(name, module) for name, module in found.items() if name not in dense)
    return Factorized(tuple(part for parts in low_rank for part in parts), dense)


def outline(model: nn.Module, keep: Sequence[str] = ()) -> nn.Module:
    """Return a copy of `model`, factorised if it is not, whose new parameters are at random.

    For its shapes: to take the factors that it will have takes a ResNet-50 a minute. Torch's own
    generator is left as it is.

    Raises:
        ValueError: as `factorize_` does.
    """
    hollow = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    copied = copy.deepcopy(model, dict(hollow))
    if not low_rank_layers(copied):
        factorize_(copied, keep)
    filled = {id(hollow[id(p)]): copy.deepcopy(p) for p in model.parameters()}
    generator = torch.Generator().manual_seed(0)
    for p in copied.parameters():
        if id(p) not in filled:
            drawn = 2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1
            laid = torch.empty_like(p, device="cpu", requires_grad=False)  # as factors are read
            filled[id(p)] = nn.Parameter(laid.copy_(drawn), p.requires_grad)
    return copy.deepcopy(copied, filled)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Return the factorised layers by name, in module order; a shared one by its first name.

    Of layers that share their factors, an embedding and its projection, the first stands for all.
    """
    layers: dict[str, LowRankLayer] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer) and id(module.down) not in seen:
            seen |= {id(module.down), id(module.up)}
            layers[name] = module
    return layers


def forward_at(
    model: nn.Module,
    ranks: Mapping[str, int],
    *inputs: Inputs,
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Return `model(*inputs)` with the named layers cut to their ranks, all others whole.

    `buffers` take the place of the model's own of those names (normalisation.py).
    Gradients reach the model's own parameters through prefix views. The model is lent the views
    during the call (torch.func.functional_call), so calls from several threads need copies of it.

    Raises:
        ValueError: a name that is not a factorised layer, or a rank that it doesn't have.
    """
    lent = {id(_tensor(model, name)): value for name, value in buffers.items()}
    for name, rank in ranks.items():
        layer = _layer(model, name)
        if not 0 <= rank <= layer.rank:
            raise ValueError(f"layer '{name}' has ranks 0..{layer.rank}, not {rank}")
        if rank < layer.rank:
            lent |= {id(layer.down): layer.down[:rank], id(layer.up): layer.up[:rank]}
    # By one name of each module: lent by two, torch would give back what it lent in between.
    views = {
        f"{name}.{attribute}".removeprefix("."): lent[id(tensor)]
        for name, module in model.named_modules()
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items())
        if id(tensor) in lent
    }
    output: Tensor = (
        functional_call(model, views, inputs, tie_weights=False) if views else model(*inputs)
    )
    return output


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name what could be factorised; the output map of an attention is part of it."""
    parts = {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _CANDIDATES) and id(module) not in parts
    }


def _why_dense(
    model: nn.Module, found: Mapping[str, nn.Module], keep: Sequence[str]
) -> dict[str, str]:
    """Return by name why a candidate stays dense, for those that do."""
    dense = {name: _own_reason(model, name, module, keep) for name, module in found.items()}
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for tensor in module.parameters(recurse=False):
            users.setdefault(id(tensor), []).append(name)
    tied = {
        name
        for names in users.values()
        if len(names) > 1 and _is_tie(names, found, dense, users)
        for name in names
    }
    for name, module in found.items():
        shared = any(len(users[id(tensor)]) > 1 for tensor in module.parameters())
        if shared and name not in tied:
            dense[name] = dense[name] or "another module uses the same parameter"
    return {name: reason for name, reason in dense.items() if reason}


def _own_reason(model: nn.Module, name: str, module: nn.Module, keep: Sequence[str]) -> str:
    if not name:
        return "it is the whole model: wrap it in a container"
    if any(fnmatchcase(name, pattern) for pattern in keep):
        return "kept"
    if type(module) not in _CANDIDATES:
        return f"{type(module).__name__} may compute something else"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), _READS_CHILDREN):
        return "its parent reads its weight instead of calling it"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward is not its class's"
    return why_dense(module)


def _is_tie(
    names: Sequence[str],
    found: Mapping[str, nn.Module],
    dense: Mapping[str, str],
    users: Mapping[int, Sequence[str]],
) -> bool:
    """Return whether the users of one parameter are an embedding and layers that have its table.

    They must share nothing else, and none of them may stay dense.
    """
    modules = [found.get(name) for name in names]
    if not any(_is_table(module) for module in modules) or any(dense.get(n, "") for n in names):
        return False
    return all(
        isinstance(module, nn.Linear | nn.Embedding)
        and all(len(users[id(p)]) == 1 for p in module.parameters() if p is not module.weight)
        for module in modules
    )


def _parts(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the names of the low-rank layers that take the place of `module`."""
    if isinstance(module, nn.MultiheadAttention):
        return tuple(f"{name}.{part}" for part in _MAPS)
    return (name,)


def _is_table(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Embedding)


def _factors(module: nn.Module, tables: dict[int, LowRankEmbedding]) -> nn.Module:
    """Return the low-rank form of `module`; `tables` holds those made so far, by their weight."""
    if isinstance(module, nn.MultiheadAttention):
        return LowRankAttention.from_dense(module)
    if isinstance(module, nn.Conv2d):
        return LowRankConv2d.from_dense(module)
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise TypeError(f"{type(module).__name__} can't be factorised")
    table = tables.get(id(module.weight))
    if isinstance(module, nn.Linear):
        return LowRankLinear.tied(module, table) if table else LowRankLinear.from_dense(module)
    if table:
        return LowRankEmbedding.tied(module, table)
    tables[id(module.weight)] = LowRankEmbedding.from_dense(module)
    return tables[id(module.weight)]


def _replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent, child in list(_places(model, old)):
        setattr(parent, child, new)


def _places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield every (parent, name) where `module` hangs; a shared module has several."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                yield parent, name


def _tensor(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of that name."""
    prefix, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(prefix), attribute)
    return tensor


def _layer(model: nn.Module, name: str) -> LowRankLayer:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, LowRankLayer):
        known = ", ".join(low_rank_layers(model)) or "none"
        raise ValueError(f"'{name}' is not a factorised layer; they are: {known}")
    return layer
