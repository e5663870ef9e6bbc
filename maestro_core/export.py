"""From a trained network and its points to the artifact, checked against torch before it is saved.

Test pictures are used here and nowhere else: they score the points.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maestro_core import artifact, graph
from maestro_core.accounting import Cost, measure
from maestro_core.artifact import Artifact, Image, Manifest, Metric, OperatingPoint, Score
from maestro_core.artifact import Tensor as TensorSpec
from maestro_core.attention import LowRankAttention
from maestro_core.data import Pictures
from maestro_core.evaluation import evaluate
from maestro_core.factorize import forward_at, low_rank_layers, outline
from maestro_core.layers import LowRankEmbedding, LowRankLayer
from maestro_core.lod import truncate_
from maestro_core.normalisation import evaluating
from maestro_core.search import Point, by_name

INPUT, OUTPUT = "image", "logits"
NORMALISATION = "BatchNormalization"
TOLERANCE = 1e-4
COARSE = 1e-2  # of the largest output, where factors are at random
ROUNDINGS = 4  # times what 32-bit floats do to torch's own outputs: two runtimes round in two ways
_UNLIKELY = 1_000_003.0  # no tensor is full of it, nor of what comes after
CHECKED = 64  # pictures on which a point is compared with torch


class ExportError(ValueError):
    """A network whose points can't be exported, or don't compute what torch computes."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the manifest says of the artifact beyond its network and points.

    `scored_on` is the data set and which part of it: "MNIST test".
    """

    name: str
    task: str
    labels: tuple[str, ...]
    scored_on: str
    provenance: dict[str, Any]


def export(
    model: nn.Module,
    cost: Cost,
    trained: Sequence[Point],
    test: Pictures,
    description: Description,
    path: Path,
    on_point: Callable[[], None],
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> Artifact:
    """Score every point, one rank per layer of `cost`, and write the artifact at `path`.

    `extras` are further files, path -> bytes (`held_out`).

    Raises:
        ExportError: a point's ONNX output differs from torch's by more than 1e-4 of the largest,
            and by more than rounding explains; there is not one output for each label; or an
            embedding is in two factors.
        ArtifactError: something is at `path` that is no artifact, or the disk does not take it;
            what was there is untouched.
    """
    artifact.check_replaceable(path)
    check_embeddings(model, keep=("*",))
    model.eval()
    x = test.batch(slice(0, CHECKED))[0].cpu()
    reference = copy.deepcopy(model).cpu()  # a GPU rounds in its own way, to 10 bits by default
    _check_outputs(reference, x, len(description.labels))
    template, shared = graph.pack(make_template(reference, x), cost.layers)
    weights = bytearray(shared)
    private = [graph.place_(weights, _normalisation(template, point)) for point in trained]
    contents = {
        **extras,
        artifact.WEIGHTS: bytes(weights),
        artifact.TEMPLATE: template.SerializeToString(),
    }
    points = []
    for i, (point, own) in enumerate(zip(trained, private, strict=True)):
        name = f"points/{i:02}.onnx"
        contents[name] = graph.build(template, cost.layers, point.ranks, own).SerializeToString()
        named = by_name(cost, point.ranks)
        statistics = {name: value.cpu() for name, value in point.statistics.items()}
        _check_point(
            contents[name], contents[artifact.WEIGHTS], reference, named, statistics, x, name
        )
        result = evaluate(model, test, named, point.statistics)
        points.append(
            OperatingPoint(
                ranks=point.ranks,
                precision="fp32",
                score=Score.of_share(result.correct, result.n),
                macs=cost.macs_at(point.ranks),
                params=cost.params_at(point.ranks),
                graph=name,
            )
        )
        on_point()
    shape = (-1, *x.shape[1:])
    return artifact.save(path, _manifest(description, cost, points, test, shape), contents)


def _manifest(
    description: Description,
    cost: Cost,
    points: Sequence[OperatingPoint],
    test: Pictures,
    shape: tuple[int, ...],
) -> Manifest:
    """Return what the artifact says of itself; `shape` is of its input."""
    return Manifest(
        format=artifact.FORMAT,
        name=description.name,
        version="1",
        task=description.task,
        input=TensorSpec(INPUT, "float32", shape, test.image),
        output=TensorSpec(OUTPUT, "float32", (-1, len(description.labels))),
        labels=description.labels,
        metric=Metric("top-1 accuracy", description.scored_on, len(test), higher_is_better=True),
        dense_macs=cost.dense_macs,
        dense_params=cost.dense_params,
        layers=cost.layers,
        points=tuple(points),
        files={},
        provenance=description.provenance,
    )


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


def check_exportable(model: nn.Module, keep: Sequence[str], image: Image, labels: int) -> list[str]:
    """Refuse a network that no training would make an artifact of; it is left as it is.

    Return the names of its factorised layers. A copy of it is exported at rank 1, its factors at
    random, and run.

    Raises:
        ExportError: an embedding is not kept dense, a parameter is not a number, factors or outputs
            are not float32, there is not one output for each label, an answer depends on what else
            is in its batch, a factorised layer is computed again in the backward pass, or torch or
            ONNX Runtime can't run the network, or they answer differently.
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
        _check_outputs(copied, x, labels)  # of whole layers outputs may lie in another way
        for layer in low_rank_layers(copied).values():
            truncate_(layer, min(1, layer.rank))
            layer.down.data /= layer.down.norm()  # what goes through is neither blown up nor lost
        alone = _check_outputs(copied, x[:1], labels)
        expected = _check_outputs(copied, x, labels)
        if _differ(alone, expected[:1]):
            raise ExportError(
                "the network's answer depends on what else is in its batch, or on chance: a server "
                "puts requests together (batch normalisation must have running statistics)"
            )
        with _refusing("torch can't export the network"):
            cost = measure(copied, x[:1])
            template, weights = graph.pack(make_template(copied, x), cost.layers)
        _check_outputs(copied.train(), x, labels)
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
        _loaded(point.SerializeToString(), weights) as session,
    ):
        outputs = [session.run([OUTPUT], {INPUT: x[:n].numpy()})[0] for n in (len(x), 1)]
    if any(_differ(torch.from_numpy(y), expected[: len(y)]) for y in outputs):
        raise ExportError("ONNX Runtime's output differs from torch's, before training")
    return [layer.name for layer in cost.layers]


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


def _check_outputs(model: nn.Module, x: Tensor, labels: int) -> Tensor:
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


def _check_backward(model: nn.Module, x: Tensor) -> None:
    """Refuse a network that calls a factorised layer in its backward pass.

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
    if y.requires_grad:
        torch.autograd.backward(y.sum())
    for handle in handles:
        handle.remove()
    if called:
        raise ExportError(
            f"'{called[0]}' is computed again in the backward pass, as by torch.utils.checkpoint: "
            f"its rank is gone by then; name it in `keep`, or compute it once"
        )


def _type(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


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


def _differ(output: Tensor, expected: Tensor) -> bool:
    """Return whether outputs differ by more than any rounding; what overflows says nothing."""
    return bool((output - expected).abs().max() > COARSE * expected.abs().max())


def make_template(model: nn.Module, x: Tensor) -> ModelProto:
    """Return `model` in ONNX, factorised layers as nodes (graph.py) for x (b >= 2, …)."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is missing is fine
    with warnings.catch_warnings(), _own_normalisation(model), _own_tensors(model) as own:
        # torch's exporter calls functions that torch itself deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    if program is None:
        raise ExportError("torch made no ONNX program of the network")
    template = program.model_proto
    for node in template.graph.node:
        if node.op_type == NORMALISATION:
            node.domain = ""
    _rename_(template, model)
    for tensor in template.graph.initializer:
        if tensor.name in own:
            value = own[tensor.name].detach().cpu().numpy()
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    _strip_(template)
    return template


@contextmanager
def _own_normalisation(model: nn.Module) -> Iterator[None]:
    """Export batch normalisation as a node of its own within, where there are points.

    The exporter would fuse it into a dense convolution before it (one that is kept, or has groups),
    with the statistics of the whole network for all points.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not low_rank_layers(model):
        layers = []
    for layer in layers:
        layer.forward = partial(_normalise, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _own_tensors(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Put others in the place of factors and statistics within, no two alike; yield those by name.

    The exporter would make one initializer of two that are equal, as the empty ones of rank 0 are,
    and the statistics of layers that have seen nothing yet.
    """
    places: dict[str, tuple[nn.Module, str]] = {
        f"{name}.{factor}": (layer, factor)
        for name, layer in low_rank_layers(model).items()
        for factor in ("down", "up")
    }
    if places:  # else normalisation is fused, with the statistics that it has
        places |= {
            f"{name}.{statistic}": (module, statistic)
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
            for statistic in ("running_mean", "running_var")
        }
    own: dict[str, Tensor] = {name: getattr(*place) for name, place in places.items()}
    for i, (name, (module, attribute)) in enumerate(places.items()):
        rows, *rest = own[name].shape
        value = own[name].detach().new_full((max(1, rows), *rest), _UNLIKELY + i)
        is_factor = isinstance(own[name], nn.Parameter)
        setattr(module, attribute, nn.Parameter(value) if is_factor else value)
    try:
        yield own
    finally:
        for name, (module, attribute) in places.items():
            setattr(module, attribute, own[name])


def _rename_(template: ModelProto, model: nn.Module) -> None:
    """Give what the model has under several names, as in a shared module, the first of them."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(tensor), name)
        for tensors in (model.named_parameters, model.named_buffers)
        for name, tensor in tensors(remove_duplicate=False)
    }
    kept: dict[str, TensorProto] = {}
    for tensor in template.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
        kept.setdefault(tensor.name, tensor)
    unique = list(kept.values())
    del template.graph.initializer[:]
    template.graph.initializer.extend(unique)
    for node in template.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _normalise(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Return a node that the exporter does not know, for `make_template` to give its name back."""
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None:
        raise ExportError("a layer of batch normalisation says it has statistics, and has none")
    weight = torch.ones_like(mean) if layer.weight is None else layer.weight
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias
    return torch.onnx.ops.symbolic(
        f"{graph.DOMAIN}::{NORMALISATION}",
        (x, weight, bias, mean, variance),
        attrs={"epsilon": layer.eps},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def _strip_(model: ModelProto) -> None:
    """Remove the exporter's notes: they hold this machine's paths and are most of a small graph."""
    graph = model.graph
    noted = (model, graph, *graph.node, *graph.initializer)
    for part in (*noted, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _normalisation(template: ModelProto, point: Point) -> dict[str, np.ndarray]:
    """Return the statistics of the point that its graph reads, by initializer."""
    read = {tensor.name for tensor in template.graph.initializer}
    return {name: value.cpu().numpy() for name, value in point.statistics.items() if name in read}


def _rounding(
    model: nn.Module,
    ranks: Mapping[str, int],
    x: Tensor,
    statistics: Mapping[str, Tensor],
    expected: np.ndarray,
) -> float:
    """Return by how much `expected` differs, at most, from what 64-bit floats give.

    A deep network adds it up: 2e-4 of the largest output for a ResNet-50 of little training.
    Of a network that converts what it reads, and so can't run in 64 bits, it is 0.
    """
    exact = copy.deepcopy(model).double()
    wide = {name: value.double() for name, value in statistics.items()}
    try:
        with evaluating(exact), torch.inference_mode():
            output = forward_at(exact, ranks, x.double(), buffers=wide)
    except RuntimeError:  # torch's for types that do not fit
        return 0.0
    return float(np.abs(output.numpy() - expected).max())


@contextmanager
def _loaded(point: bytes, weights: bytes) -> Iterator[ort.InferenceSession]:
    """Load the point as plain onnxruntime will, from files that are there within.

    Raises:
        ExportError: the disk of temporary files does not take them.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "point.onnx"
        try:
            path.write_bytes(point)
            path.with_name(graph.LOCATION).write_bytes(weights)
        except OSError as error:
            raise ExportError(f"{directory}: cannot be written: {error.strerror}") from error
        yield ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def _check_point(
    point: bytes,
    weights: bytes,
    reference: nn.Module,
    ranks: Mapping[str, int],
    statistics: Mapping[str, Tensor],
    x: Tensor,
    name: str,
) -> None:
    """Run the point as plain onnxruntime will, from files, with a batch and with one sample.

    Raises:
        ExportError: it does not compute what `reference` does at these ranks.
    """
    with evaluating(reference), torch.inference_mode():
        expected = forward_at(reference, ranks, x, buffers=statistics).numpy()
    with _loaded(point, weights) as session:
        for size in (len(x), 1):
            output = session.run([OUTPUT], {INPUT: x[:size].numpy()})[0]
            error = float(np.abs(output - expected[:size]).max())
            scale = max(1.0, float(np.abs(expected).max()))
            if error <= TOLERANCE * scale:
                continue
            if not error <= ROUNDINGS * _rounding(reference, ranks, x, statistics, expected):
                raise ExportError(
                    f"{name}: ONNX Runtime's output differs from torch's by {error:.2g}, "
                    f"more than {TOLERANCE} of the largest output, {scale:.3g}"
                )
