"""A small artifact with seeded random weights, made without torch."""

import os

# Before torch is imported: networks this small gain nothing from threads, and threads that wait
# for each other on a busy machine cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Measuring the best number takes seconds for each new host; test_end_to_end has it measured.
os.environ.setdefault("MAESTRO_THREADS", "1")

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from onnx import ModelProto, TensorProto, helper, numpy_helper

from benchmarks.networks import resnet18
from maestro_core import artifact, graph
from maestro_core.artifact import (
    Artifact,
    Image,
    Layer,
    Manifest,
    Metric,
    OperatingPoint,
    Score,
    Tensor,
)
from server.settings import Settings

# A machine that is busy for a moment is not a failed property.
settings.register_profile("maestro", deadline=None)
settings.load_profile("maestro")

TINY_LAYERS = (
    Layer("conv", "conv2d", 1, 6, (3, 3), (1, 1), (1, 1), (1, 1), positions=64, max_rank=6),
    Layer("fc", "linear", 384, 10, (), (), (), (), positions=1, max_rank=10),
)
TINY_RANKS = ((1, 1), (1, 3), (2, 5), (3, 9), (6, 10))


def tiny_template(seed: int = 0) -> ModelProto:
    """Return conv 1→6 3×3, ReLU, linear 384→10 on 8×8 pictures, as torch's exporter would."""
    rng = np.random.default_rng(seed)
    shapes = {
        "conv.down": (6, 1, 3, 3),
        "conv.up": (6, 6),
        "conv.bias": (6,),
        "fc.down": (10, 384),
        "fc.up": (10, 10),
        "fc.bias": (10,),
    }
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node(
            "LowRankConv2d",
            ["x", "conv.down", "conv.up", "conv.bias"],
            ["c"],
            domain=graph.DOMAIN,
            strides=[1, 1],
            pads=[1, 1, 1, 1],
            dilations=[1, 1],
        ),
        helper.make_node("Relu", ["c"], ["a"]),
        helper.make_node("Flatten", ["a"], ["f"]),
        helper.make_node(
            "LowRankLinear", ["f", "fc.down", "fc.up", "fc.bias"], ["y"], domain=graph.DOMAIN
        ),
    ]
    body = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        weights,
        value_info=[helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", 6, 8, 8])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(graph.DOMAIN, 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def tiny_manifest() -> Manifest:
    """Return the manifest of the tiny network, without its files."""
    points = tuple(
        OperatingPoint(
            ranks=ranks,
            precision="fp32",
            score=Score(*(round(base + 0.1 * i, 2) for base in (0.5, 0.48, 0.52))),
            macs=sum(layer.macs(r) for layer, r in zip(TINY_LAYERS, ranks, strict=True)),
            params=sum(layer.params(r) for layer, r in zip(TINY_LAYERS, ranks, strict=True)) + 16,
            graph=f"points/{i:02}.onnx",
        )
        for i, ranks in enumerate(TINY_RANKS)
    )
    return Manifest(
        format=artifact.FORMAT,
        name="tiny",
        version="1",
        task="image-classification",
        input=Tensor("x", "float32", (-1, 1, 8, 8), Image("L", 8, 8, (0.5,), (0.25,))),
        output=Tensor("y", "float32", (-1, 10)),
        labels=tuple("0123456789"),
        metric=Metric("top-1 accuracy", "random", 100, higher_is_better=True),
        dense_macs=sum(layer.macs(layer.max_rank) for layer in TINY_LAYERS),
        dense_params=sum(layer.params(layer.max_rank) for layer in TINY_LAYERS) + 16,
        layers=TINY_LAYERS,
        points=points,
        files={},
        provenance={"recipe": "tiny", "seed": 0},
    )


def tiny_contents() -> dict[str, bytes]:
    """Return the files of the tiny artifact, path -> bytes."""
    template, weights = graph.pack(tiny_template(), TINY_LAYERS)
    contents = {artifact.WEIGHTS: weights, artifact.TEMPLATE: template.SerializeToString()}
    for i, ranks in enumerate(TINY_RANKS):
        point = graph.build(template, TINY_LAYERS, ranks)
        contents[f"points/{i:02}.onnx"] = point.SerializeToString()
    return contents


def tiny_settings(root: Path, **given: Any) -> Settings:
    """Return settings that serve a tiny artifact, saved in `root`, by the shortest calibration."""
    points = artifact.save(root / "tiny.maestro", tiny_manifest(), tiny_contents())
    return Settings(
        artifact=points.path,
        state_dir=root / "state",
        threads=1,
        max_batch=1,
        calibration_budget_s=0.5,
        **given,
    )


@pytest.fixture(scope="session")
def small_resnet(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Return ResNet-18 with random weights and three points, which share most of them."""
    network = resnet18()
    chain = [network.uniform(share) for share in (0.25, 0.5, 0.75)]
    return network.save(tmp_path_factory.mktemp("resnet") / "resnet18.maestro", chain)


@pytest.fixture
def tiny_artifact(tmp_path: Path) -> Artifact:
    """Return an artifact of five points on 8×8 pictures."""
    return artifact.save(tmp_path / "tiny.maestro", tiny_manifest(), tiny_contents())
