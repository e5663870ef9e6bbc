"""A torch network in ONNX, its factorised layers as nodes of their own (graph.py)."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnxruntime as ort
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maestro_core import graph
from maestro_core.factorize import low_rank_layers

INPUT, OUTPUT = "image", "logits"
NORMALISATION = "BatchNormalization"
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # which `_normalise` stands for
_UNLIKELY = 1_000_003.0  # no tensor is full of it, nor of what comes after


class ExportError(ValueError):
    """A network whose points can't be exported, or don't compute what torch computes."""


def make_template(model: nn.Module, x: Tensor) -> ModelProto:
    """Return `model` in ONNX, factorised layers as nodes (graph.py) for x (b >= 2, …).

    Raises:
        ExportError: a layer of batch normalisation computes something else, or torch makes nothing.
    """
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
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    if not low_rank_layers(model):
        layers = {}
    for name, layer in layers.items():
        if getattr(layer.forward, "__func__", None) not in _FORWARDS:
            raise ExportError(
                f"'{name}' ({type(layer).__name__}) is batch normalisation with a forward of its "
                f"own, which can't be exported: put what it adds, as an activation, in a module "
                f"of its own"
            )
    for layer in layers.values():
        layer.forward = partial(_normalise, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
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


@contextmanager
def loaded(point: bytes, weights: bytes) -> Iterator[ort.InferenceSession]:
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
