"""What a network must be that points are to be exported of: looked at before it is trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from maestro_core import graph
from maestro_core.accounting import measure
from maestro_core.artifact import Image
from maestro_core.attention import LowRankAttention
from maestro_core.factorize import low_rank_layers, outline
from maestro_core.layers import LowRankEmbedding, LowRankLayer
from maestro_core.lod import truncate_
from maestro_core.template import INPUT, OUTPUT, ExportError, loaded, make_template

COARSE = 1e-2  # of the largest output, where factors are at random


def check_exportable(model: nn.Module, keep: Sequence[str], image: Image, labels: int) -> list[str]:
    """Refuse a network that no training would make an artifact of; it is left as it is.

    Return the names of its factorised layers. A copy of it is exported at rank 1, its factors at
    random, and run.

    Raises:
        ExportError: an embedding is not kept dense, a parameter is not a number, factors or outputs
            are not float32, there is not one output for each label, an answer depends on what else
            is in its batch, batch normalisation has a forward of its own, no parameter is trained,
            a factorised layer is computed again in the backward pass, or torch or ONNX Runtime
            can't run the network, or they answer differently.
        ValueError: a factorised layer is never called, or a pattern in `keep` matches none.
    """
    check_embeddings(model, keep)
    for name, parameter in model.named_parameters():
        if parameter.isnan().any():
            raise ExportError(f"'{name}' holds values that are not numbers")
    with _refusing("the network can't be copied"):
        copied = outline(model, keep).eval()
    _check_tensors(copied)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, image.height, image.width, len(image.mean), generator=generator)
    x = x.permute(0, 3, 1, 2)  # as pictures lie in memory: `view` may not take what comes of them
    with torch.random.fork_rng(devices=[]):
        check_outputs(copied, x, labels)  # of whole layers outputs may lie in another way
        for layer in low_rank_layers(copied).values():
            truncate_(layer, min(1, layer.rank))
            layer.down.data /= layer.down.norm()  # what goes through is neither blown up nor lost
        alone = check_outputs(copied, x[:1], labels)
        expected = check_outputs(copied, x, labels)
        if _differ(alone, expected[:1]):
            raise ExportError(
                "the network's answer depends on what else is in its batch, or on chance: a server "
                "puts requests together (batch normalisation must have running statistics)"
            )
        with _refusing("torch can't export the network"):
            cost = measure(copied, x[:1])
            template, weights = graph.pack(make_template(copied, x), cost.layers)
        check_outputs(copied.train(), x, labels)
        with _refusing("the network can't be trained"):
            _check_backward(copied, x)
    if template.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise ExportError(
            f"torch can export the network for batches of {len(x)} alone: its forward may not loop "
            f"over a batch, and takes the size from x.shape[0], not from len(x)"
        )
    point = graph.build(template, cost.layers, [layer.max_rank for layer in cost.layers])
    with (
        _refusing("ONNX Runtime can't run the network"),
        loaded(point.SerializeToString(), weights) as session,
    ):
        outputs = [session.run([OUTPUT], {INPUT: x[:n].numpy()})[0] for n in (len(x), 1)]
    if any(_differ(torch.from_numpy(y), expected[: len(y)]) for y in outputs):
        raise ExportError("ONNX Runtime's output differs from torch's, before training")
    return [layer.name for layer in cost.layers]


def check_embeddings(model: nn.Module, keep: Sequence[str]) -> None:
    """Refuse a network with an embedding in two factors, or one that is not kept from them.

    Raises:
        ExportError: there is one; graphs of points have no such node yet.
    """
    for name, module in model.named_modules():
        kept = isinstance(module, nn.Embedding) and any(fnmatchcase(name, at) for at in keep)
        if isinstance(module, nn.Embedding | LowRankEmbedding) and not kept:
            raise ExportError(
                f"'{name}' is an embedding, which can be exported only dense: "
                f"name it in `keep` of the hyper-parameters"
            )


def check_outputs(model: nn.Module, x: Tensor, labels: int) -> Tensor:
    """Return the output; refuse a network that has not one for each label."""
    mode = " in training" if model.training else ""
    try:
        with torch.inference_mode():
            y = model(x)
    except Exception as error:  # of a network that we do not know
        _check_reading(model, error)
        raise ExportError(f"the network fails{mode} on a batch of {len(x)}: {error}") from error
    shape = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
    if not isinstance(y, Tensor) or shape != (len(x), labels):
        raise ExportError(
            f"the network's output{mode} for a batch of {len(x)} is {shape}; for {labels} labels "
            f"it must be ({len(x)}, {labels})"
        )
    if y.dtype != torch.float32:
        raise ExportError(f"the network's output{mode} is {_type(y)}; it must be float32")
    return y


def _check_tensors(model: nn.Module) -> None:
    """Refuse a network that holds what a checkpoint or a graph can't."""
    for name, layer in low_rank_layers(model).items():
        if layer.down.dtype != torch.float32:
            raise ExportError(
                f"'{name}' holds {_type(layer.down)}, and factors hold float32: convert it, or "
                f"name it in `keep` of the hyper-parameters"
            )
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ExportError(f"'{name}' is a {type(value).__name__}; checkpoints hold tensors")
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if name in (INPUT, OUTPUT):
            raise ExportError(f"'{name}' is what graphs call their own: name the tensor otherwise")


def _check_reading(model: nn.Module, error: Exception) -> None:
    """Say which layer to keep where a network failed since it reads what a dense one has."""
    if not isinstance(error, AttributeError):
        return
    for name, module in model.named_modules():
        if module is error.obj and isinstance(module, LowRankLayer | LowRankAttention):
            raise ExportError(
                f"the network reads '{error.name}' of '{name}', which it has no more in factors: "
                f"name it in `keep` of the hyper-parameters"
            ) from error


def _check_backward(model: nn.Module, x: Tensor) -> None:
    """Refuse a network of which nothing is trained, or that calls a factorised layer in its
    backward pass.

    Ranks are lent to it for a call (`forward_at`): by then the layer is whole again, and where
    shapes are not compared, gradients are silently those of another rank.
    """
    called: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, layer in low_rank_layers(model).items()
    ]
    y = model(x)
    called.clear()
    if not y.requires_grad:
        raise ExportError(
            "no parameter of the network is trained: one at least must have requires_grad, and "
            "its forward may not be under torch.no_grad"
        )
    torch.autograd.backward(y.sum())
    for handle in handles:
        handle.remove()
    if called:
        raise ExportError(
            f"'{called[0]}' is computed again in the backward pass, as by torch.utils.checkpoint: "
            f"its rank is gone by then; name it in `keep`, or compute it once"
        )


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Say `what` can't be done, and why, where that fails within; a ValueError says so itself.

    Raises:
        ExportError: it failed.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # torch's and onnxruntime's have no class of their own in common
        cause: BaseException = error
        while cause.__cause__:  # those around it say how to report it to torch
            cause = cause.__cause__
        raise ExportError(f"{what}: {cause}") from error


def _differ(output: Tensor, expected: Tensor) -> bool:
    """Return whether outputs differ by more than any rounding; what overflows says nothing."""
    return bool((output - expected).abs().max() > COARSE * expected.abs().max())


def _type(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")
