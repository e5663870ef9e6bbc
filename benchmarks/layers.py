"""`maestro bench layers`: one layer as two factors, dense, or in the gauge form, by rank.

The gauge form picks r outputs whose rows of `up` are well conditioned, makes the first factor
compute them, and the second only the others: r (m + n - r) multiply-accumulates, always below
dense, for a gather that puts the outputs in order (FlexRank, 2026, "GAR"; with pivots).
Shows which form a host should run, and how far the rule by MACs, r (m + n) > m n, is from it.
"""

import argparse
import random
import time
from collections.abc import Sequence
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from benchmarks import arguments, networks, report
from benchmarks.effort import Precision
from benchmarks.profiler import measure
from maestro_core.artifact import Layer
from maestro_core.host import Elsewhere
from server.engine import session_options

FORMS = ("factors", "dense", "gauge")
SHARES = (0.125, 0.25, 0.5, 0.75, 0.875)  # of the rank at which factors cost what dense does


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and write it where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench layers", description=__doc__)
    parser.add_argument("--budget-s", type=arguments.positive, default=60.0, help="per network")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "layers.json")
    chosen = parser.parse_args(argv)
    result: dict[str, Any] = {**report.conditions(), "intra_op_threads": 1, "batch": 1}
    for network in (networks.resnet18(), networks.encoder()):
        unique = {_signature(layer): layer for layer in network.layers[::-1]}  # the first of each
        chosen_layers = [layer for layer in unique.values() if layer.out_features > 10]
        elsewhere = Elsewhere()
        rows = compared(chosen_layers, chosen.budget_s)
        result[network.name] = {
            "cores_used_by_others": elsewhere.share(),
            "fastest": {form: sum(row["fastest"] == form for row in rows) for form in FORMS},
            "best_over_factors": [_best_over_factors(network.layers, rows, s) for s in SHARES],
            "rows": rows,
        }
    report.write(result, chosen.out)


def compared(layers: Sequence[Layer], budget_s: float) -> list[dict[str, Any]]:
    """Return each layer's latency in each form, ms, at ranks up to where dense has as few MACs."""
    cells = [(layer, rank) for layer in layers for rank in _ranks(layer)]
    sessions = [_session(layer, rank, form) for (layer, rank), form in product(cells, FORMS)]
    measured = measure(
        lambda i, *_: sessions[i][0].run(None, {"x": sessions[i][1]}),
        range(len(sessions)),
        (1,),
        budget_s=budget_s,
        precision=Precision(relative=0.01, absolute_ms=0.001, min_runs=100),
        rng=random.Random(0),
        clock=time.perf_counter,
    )
    p50 = [latency.p50_ms for latency in measured.latencies]
    return [
        _row(layer, rank, dict(zip(FORMS, p50[3 * i : 3 * i + 3], strict=True)))
        for i, (layer, rank) in enumerate(cells)
    ]


def _row(layer: Layer, rank: int, times_ms: dict[str, float]) -> dict[str, Any]:
    dense_macs = layer.out_features * layer.fan_in
    return {
        "layer": layer.name,
        "out": layer.out_features,
        "fan_in": layer.fan_in,
        "positions": layer.positions,
        "rank": rank,
        "macs_over_dense": round(rank * (layer.out_features + layer.fan_in) / dense_macs, 3),
        **{f"{form}_ms": round(ms, 4) for form, ms in times_ms.items()},
        "factors_over_dense": round(times_ms["factors"] / times_ms["dense"], 3),
        "gauge_over_factors": round(times_ms["gauge"] / times_ms["factors"], 3),
        "fastest": min(times_ms, key=lambda form: times_ms[form]),
    }


def _best_over_factors(
    layers: Sequence[Layer], rows: Sequence[dict[str, Any]], share: float
) -> float:
    """Return what a whole network would gain if each layer ran in its fastest form."""
    by_cell = {(row["layer"], row["rank"]): row for row in rows}
    names = {_signature(layer): layer.name for layer in layers[::-1]}  # the first of each kind
    found = [
        by_cell[names[_signature(layer)], _rank(layer, share)]
        for layer in layers
        if layer.out_features > 10
    ]
    best = float(sum(min(row[f"{form}_ms"] for form in FORMS) for row in found))
    return round(best / float(sum(row["factors_ms"] for row in found)), 3)


def _ranks(layer: Layer) -> list[int]:
    return sorted({_rank(layer, share) for share in SHARES})


def _rank(layer: Layer, share: float) -> int:
    even = layer.out_features * layer.fan_in / (layer.out_features + layer.fan_in)
    return max(1, round(share * even))


def _signature(layer: Layer) -> tuple[object, ...]:
    return (
        layer.kind,
        layer.in_features,
        layer.out_features,
        layer.kernel,
        layer.stride,
        layer.positions,
    )


def _session(layer: Layer, rank: int, form: str) -> tuple[ort.InferenceSession, np.ndarray]:
    model, shape = _model(layer, rank, form)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    session = ort.InferenceSession(model.SerializeToString(), session_options(1))
    return session, x


def _model(layer: Layer, rank: int, form: str) -> tuple[ModelProto, tuple[int, ...]]:
    """Return one layer with random weights between two cheap operators, and its input's shape."""
    side = isqrt(layer.positions)
    is_conv = layer.kind == "conv2d"
    if is_conv:
        across = side * layer.stride[0]
        shape: tuple[int, ...] = (1, layer.in_features, across, across)
    else:
        shape = (1, layer.positions, layer.in_features)
    weights: dict[str, np.ndarray] = {}
    body = _conv(layer, rank, form, weights) if is_conv else _linear(layer, rank, form, weights)
    nodes = [*body, helper.make_node("Relu", ["z"], ["y"])]
    graph = helper.make_graph(
        nodes,
        form,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10), shape


def _linear(layer: Layer, rank: int, form: str, weights: dict[str, np.ndarray]) -> list[NodeProto]:
    m, n = layer.out_features, layer.in_features
    if form == "dense":
        weights["w"] = _normal(n, m)
        return [helper.make_node("MatMul", ["x", "w"], ["z"])]
    weights["down"] = _normal(n, rank)
    weights["up"] = _normal(rank, m if form == "factors" else m - rank)
    first = helper.make_node("MatMul", ["x", "down"], ["h"])
    if form == "factors":
        return [first, helper.make_node("MatMul", ["h", "up"], ["z"])]
    weights["order"] = np.random.default_rng(0).permutation(m)
    return [
        first,
        helper.make_node("MatMul", ["h", "up"], ["rest"]),
        helper.make_node("Concat", ["h", "rest"], ["all"], axis=-1),
        helper.make_node("Gather", ["all", "order"], ["z"], axis=-1),
    ]


def _conv(layer: Layer, rank: int, form: str, weights: dict[str, np.ndarray]) -> list[NodeProto]:
    m, n = layer.out_features, layer.in_features
    window: dict[str, Any] = {
        "strides": layer.stride,
        "pads": [*layer.padding, *layer.padding],
        "dilations": layer.dilation,
    }
    if form == "dense":
        weights["w"] = _normal(m, n, *layer.kernel)
        return [helper.make_node("Conv", ["x", "w"], ["z"], **window)]
    weights["down"] = _normal(rank, n, *layer.kernel)
    weights["up"] = _normal(m if form == "factors" else m - rank, rank, 1, 1)
    first = helper.make_node("Conv", ["x", "down"], ["h"], **window)
    if form == "factors":
        return [first, helper.make_node("Conv", ["h", "up"], ["z"])]
    weights["order"] = np.random.default_rng(0).permutation(m)
    return [
        first,
        helper.make_node("Conv", ["h", "up"], ["rest"]),
        helper.make_node("Concat", ["h", "rest"], ["all"], axis=1),
        helper.make_node("Gather", ["all", "order"], ["z"], axis=1),
    ]


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


if __name__ == "__main__":
    main()
