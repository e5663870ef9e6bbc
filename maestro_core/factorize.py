"""Factorise a network's layers in place, and run it at given ranks without changing it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import Tensor, nn
from torch.func import functional_call

from maestro_core.layers import LowRankConv2d, LowRankLayer, LowRankLinear, why_dense

# They read `.weight` of these children instead of calling them.
_READS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True, slots=True)
class Factorized:
    """What `factorize_` did: the layers in two factors, and those left dense with the reason."""

    low_rank: tuple[str, ...]
    dense: dict[str, str]


def factorize_(model: nn.Module, keep: Sequence[str] = ()) -> Factorized:
    """Replace every linear and convolution layer inside `model` by its factors at full rank.

    `keep` holds patterns (`fc?`, `head.*`) of module names to leave dense.
    The forward pass is unchanged to 1e-5. Parameters are new: make the optimiser afterwards.

    Raises:
        ValueError: a pattern in `keep` matches no linear or convolution layer.
    """
    found = {name: module for name, module in model.named_modules() if _is_candidate(module)}
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(f"keep: '{pattern}' matches no linear or convolution layer")
    users = Counter(
        id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False)
    )
    dense: dict[str, str] = {}
    for name, module in found.items():
        reason = _why_dense(model, name, module, keep, users)
        if reason:
            dense[name] = reason
        else:
            _replace_(model, module, _factors(module))
    return Factorized(tuple(name for name in found if name not in dense), dense)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Return the factorised layers by name, in module order; a shared one by its first name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear | LowRankConv2d)
    }


def forward_at(
    model: nn.Module,
    ranks: Mapping[str, int],
    *inputs: Tensor,
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Return `model(*inputs)` with the named layers cut to their ranks, all others whole.

    `buffers` take the place of the model's own of those names (normalisation.py).
    Gradients reach the model's own parameters through prefix views. The model is lent the views
    during the call (torch.func.functional_call), so calls from several threads need copies of it.

    Raises:
        ValueError: a name that is not a factorised layer, or a rank that it doesn't have.
    """
    views = dict(buffers)
    for name, rank in ranks.items():
        layer = _layer(model, name)
        if not 0 <= rank <= layer.rank:
            raise ValueError(f"layer '{name}' has ranks 0..{layer.rank}, not {rank}")
        if rank < layer.rank:
            views[f"{name}.down"] = layer.down[:rank]
            views[f"{name}.up"] = layer.up[:rank]
    output: Tensor = functional_call(model, views, inputs) if views else model(*inputs)
    return output


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _why_dense(
    model: nn.Module, name: str, module: nn.Module, keep: Sequence[str], users: Counter[int]
) -> str:
    if not name:
        return "it is the whole model: wrap it in a container"
    if any(fnmatchcase(name, pattern) for pattern in keep):
        return "kept"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} may compute something else"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), _READS_CHILDREN):
        return "its parent reads its weight instead of calling it"
    if any(users[id(tensor)] > 1 for tensor in module.parameters()):
        return "another module uses the same parameter"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks"
    return why_dense(module) if isinstance(module, nn.Linear | nn.Conv2d) else ""


def _factors(module: nn.Module) -> LowRankLayer:
    if isinstance(module, nn.Conv2d):
        return LowRankConv2d.from_dense(module)
    if isinstance(module, nn.Linear):
        return LowRankLinear.from_dense(module)
    raise TypeError(f"{type(module).__name__} is no linear or convolution layer")


def _replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent, child in list(_places(model, old)):
        setattr(parent, child, new)


def _places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield every (parent, name) where `module` hangs; a shared module has several."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                yield parent, name


def _layer(model: nn.Module, name: str) -> LowRankLayer:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, LowRankLinear | LowRankConv2d):
        known = ", ".join(low_rank_layers(model)) or "none"
        raise ValueError(f"'{name}' is not a factorised layer; they are: {known}")
    return layer
