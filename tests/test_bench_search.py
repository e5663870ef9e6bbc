"""The rules that a search is compared with, and the comparison, on figures known beforehand."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from benchmarks.host_points import Candidate, Network, Plan
from benchmarks.search import against, energy_chain, singular_values, uniform_chain
from maestro_core import artifact, held_out
from maestro_core.frontier import RankTable
from tests.conftest import TINY_LAYERS, tiny_contents, tiny_manifest, tiny_template

TABLES = (RankTable((1, 6), (1.0, 6.0), (2.0, 1.0)), RankTable((1, 10), (1.0, 9.0), (2.0, 1.0)))


def candidate(correct: int, p50_ms: float) -> Candidate:
    return Candidate(Plan((1, 1), frozenset()), ModelProto(), correct, 1000, p50_ms)


@pytest.fixture
def network(tmp_path: Path) -> Network:
    x = np.zeros((4, 1, 8, 8), np.float32)
    extra = held_out.contents(x, np.arange(4), ("conv", "fc"), TABLES)
    contents = {**tiny_contents(), **extra}
    return Network.of(artifact.save(tmp_path / "tiny.maestro", tiny_manifest(), contents))


def test_singular_values_are_those_of_the_product(network: Network) -> None:
    tensors = {t.name: numpy_helper.to_array(t) for t in tiny_template().graph.initializer}

    found = singular_values(network)

    for layer in TINY_LAYERS:
        down = tensors[f"{layer.name}.down"].reshape(layer.max_rank, -1)
        dense = tensors[f"{layer.name}.up"].T @ down
        values = np.linalg.svd(dense, compute_uv=False)[: layer.max_rank]
        assert found[layer.name] == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("rule", ["uniform", "energy"])
def test_a_chain_grows_to_the_whole_network_and_its_ranks_are_allowed(
    network: Network, rule: str
) -> None:
    chain = uniform_chain(TINY_LAYERS) if rule == "uniform" else energy_chain(network)

    assert chain[-1] == (6, 10)
    assert len(set(chain)) == len(chain) > 3
    for less, more in pairwise(chain):
        assert all(a <= b for a, b in zip(less, more, strict=True))
    for ranks in chain:
        for layer, rank in zip(TINY_LAYERS, ranks, strict=True):
            assert 1 <= rank <= layer.max_rank
            assert rank == layer.max_rank or not layer.is_dense(rank)


def test_faster_at_the_same_accuracy_is_said() -> None:
    found = against(
        [candidate(900, 1.0), candidate(950, 1.5)],
        [candidate(900, 1.25), candidate(950, 1.5)],
        floor=0,
    )

    assert found["least_latency_ratio_at_equal_accuracy"] == 0.8
    assert found["a_tenth_faster_somewhere"]
    assert found["below_by_more_than_the_interval"] == []


def test_only_what_is_below_the_interval_counts_as_below() -> None:
    ours = [candidate(900, 1.0)]

    within = against(ours, [candidate(910, 1.0)], floor=0)
    below = against(ours, [candidate(950, 1.0)], floor=0)
    faster = against(ours, [candidate(500, 0.9)], floor=0)
    useless = against(ours, [candidate(500, 0.9)], floor=900)

    assert within["below_by_more_than_the_interval"] == []
    assert len(below["below_by_more_than_the_interval"]) == 1
    assert useless["below_by_more_than_the_interval"] == []
    assert len(faster["below_by_more_than_the_interval"]) == 1
    assert below["least_latency_ratio_at_equal_accuracy"] is None
