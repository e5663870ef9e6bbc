"""Measures each layer alone, as two factors by rank and dense: what a search needs of a host.

Layers alike in all that latency depends on are measured once.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper

from benchmarks.effort import CancelledError, Precision, Progress
from benchmarks.profiler import Turn, alone, measure
from benchmarks.smoothing import isotonic
from maestro_core import graph
from maestro_core.artifact import ArtifactError, Layer
from server.engine import session_options
from server.interrupt import Interrupt, InterruptedRunError

T = TypeVar("T")
Call = Callable[[Interrupt], T]

# To the end of the budget, all of them: one that left early would have seen another host.
_UNTIL_TIME = Precision(relative=0.0, absolute_ms=0.0)
_DENSE = -1  # in the place of a rank


@dataclass(frozen=True, slots=True)
class Measuring:
    """How to measure: seconds at most, threads of a run, and what the server hands in."""

    budget_s: float
    intra_op_threads: int = 1
    batch: int = 1
    seed: int = 0
    turn: Turn = alone
    progress: Callable[[Progress], object] = lambda _: None
    cancelled: Callable[[], bool] = lambda: False

    def in_turns(self, calls: Iterable[Call[T]]) -> Iterator[T]:
        """Yield what each call returns, each made once serving lets it, again if interrupted.

        A call is expected to take as long as the one before it.

        Raises:
            CancelledError: `cancelled` said so.
        """
        took_s = 0.0
        for call in calls:
            found, took_s = self._in_turn(call, took_s)
            yield found

    def _in_turn(self, call: Call[T], expected_s: float) -> tuple[T, float]:
        """Return what the call returns, and the seconds that it took."""
        while not self.cancelled():
            with self.turn(expected_s, math.inf) as interrupt, suppress(InterruptedRunError):
                began_s = time.perf_counter()
                return call(interrupt), time.perf_counter() - began_s
        raise CancelledError

    def p50_ms(self, runs: Sequence[Call[object]]) -> list[float]:
        """Return the median latency, ms, of each of these, run in interleaved rounds.

        All are run until the budget is spent, so that they can be compared.

        Raises:
            CancelledError: `cancelled` said so.
        """
        measured = measure(
            lambda i, _, interrupt: runs[i](interrupt),
            range(len(runs)),
            (1,),
            budget_s=self.budget_s,
            precision=_UNTIL_TIME,
            rng=random.Random(self.seed),
            clock=time.perf_counter,
            turn=self.turn,
            progress=self.progress,
            cancelled=self.cancelled,
        )
        return [latency.p50_ms for latency in measured.latencies]


@dataclass(frozen=True, slots=True)
class LayerLatency:
    """A layer alone: ms in two factors, by rank and never falling, and ms dense."""

    factors_ms: Mapping[int, float]
    dense_ms: float

    def is_dense(self, rank: int) -> bool:
        """Return whether dense is faster than factors of this rank, or those were not measured."""
        return self.dense_ms < self.factors_ms.get(rank, math.inf)


def layer_latencies(
    template: ModelProto,
    layers: Sequence[Layer],
    grids: Sequence[Sequence[int]],
    dense: Mapping[str, TensorProto],
    folder: Path,
    measuring: Measuring,
) -> list[LayerLatency]:
    """Return the latency of each layer, dense and as factors of each rank of its grid.

    `folder` holds the weights file, `dense` the dense weights that are not in it. Two factors never
    get faster as rank grows: what is measured is made so.
    """
    shapes = input_shapes(template, layers, measuring.batch)
    nodes = {node.input[1]: node for node in template.graph.node if node.domain == graph.DOMAIN}
    alone: dict[tuple[object, ...], tuple[ModelProto, Layer]] = {}
    signatures = []
    for layer, shape in zip(layers, shapes, strict=True):
        signature = (*_window(layer), layer.out_features, layer.max_rank, shape)
        node = nodes[f"{layer.name}.down"]
        alone.setdefault(signature, (_alone(template, node, layer, shape), layer))
        signatures.append(signature)
    pairs = list(zip(signatures, grids, strict=True))
    cells = sorted({(s, rank) for s, grid in pairs for rank in (*grid, _DENSE)}, key=repr)
    runs = []
    for signature, rank in cells:
        model, layer = alone[signature]
        ranks, names = ([layer.max_rank], [layer.name]) if rank == _DENSE else ([rank], [])
        runs.append(runner(graph.build(model, [layer], ranks, dense, names), folder, measuring))
    found = dict(zip(cells, measuring.p50_ms(runs), strict=True))
    return [
        LayerLatency(
            _rising({rank: found[signature, rank] for rank in grid}), found[signature, _DENSE]
        )
        for signature, grid in pairs
    ]


def input_shapes(
    template: ModelProto, layers: Sequence[Layer], batch: int
) -> list[tuple[int, ...]]:
    """Return the shape of what each layer reads, in the order of `layers`.

    What ONNX does not find, as behind a recurrent layer, is as the template says.

    Raises:
        ArtifactError: that does not know a shape either; names the layer.
    """
    whole = graph.build(template, layers, [layer.max_rank for layer in layers])
    whole.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    inferred = onnx.shape_inference.infer_shapes(whole, data_prop=True).graph
    symbol = template.graph.input[0].type.tensor_type.shape.dim[0].dim_param or None
    shapes: dict[str, tuple[int, ...]] = {}
    for value in (*template.graph.value_info, *inferred.value_info, *inferred.input):
        dims = value.type.tensor_type.shape.dim
        shape = tuple(batch if d.dim_param == symbol else d.dim_value for d in dims)
        if shape and all(shape):
            shapes[value.name] = shape
    reads = {n.input[1]: n.input[0] for n in template.graph.node if n.domain == graph.DOMAIN}
    for layer in layers:
        if reads[f"{layer.name}.down"] not in shapes:
            raise ArtifactError(
                f"layer '{layer.name}' reads a tensor whose shape the graph does not say, so a "
                f"search can't measure it alone: calibrate the artifact's own points, without one"
            )
    return [shapes[reads[f"{layer.name}.down"]] for layer in layers]


def runner(model: ModelProto, folder: Path, measuring: Measuring) -> Call[object]:
    """Return what runs a graph over the weights file in `folder`, on random inputs."""
    session = session_of(model, folder, measuring.intra_op_threads)
    (spec,) = model.graph.input
    sizes = [dim.dim_value or measuring.batch for dim in spec.type.tensor_type.shape.dim]
    feed = {spec.name: np.random.default_rng(0).standard_normal(sizes, np.float32)}
    return partial(Interrupt.run, session=session, names=None, feed=feed)


def session_of(model: ModelProto, folder: Path, intra_op_threads: int) -> ort.InferenceSession:
    """Return a session of a graph that is not on disk; its weights file is in `folder`."""
    options = session_options(intra_op_threads)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _alone(
    template: ModelProto, node: NodeProto, layer: Layer, shape: tuple[int, ...]
) -> ModelProto:
    """Return a template with this node only."""
    floats = TensorProto.FLOAT
    reads = {*node.input, f"{layer.name}.dense"}
    known = (*template.graph.value_info, *template.graph.output)
    answer = next(value for value in known if value.name == node.output[0])
    body = helper.make_graph(
        [node],
        layer.name,
        [helper.make_tensor_value_info(node.input[0], floats, shape)],
        [answer],
        [tensor for tensor in template.graph.initializer if tensor.name in reads],
    )
    return helper.make_model(
        body, opset_imports=template.opset_import, ir_version=template.ir_version
    )


def _window(layer: Layer) -> tuple[object, ...]:
    return layer.kind, layer.kernel, layer.stride, layer.padding, layer.dilation


def _rising(times_ms: Mapping[int, float]) -> dict[int, float]:
    if not times_ms:
        return {}
    ranks = sorted(times_ms)
    rising = np.exp(isotonic(np.log([times_ms[rank] for rank in ranks])))
    return dict(zip(ranks, rising.tolist(), strict=True))
