"""The benchmark networks: the size of the published ones, and nested chains."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.networks import Network, encoder, lenet, resnet18
from server.engine import Engine


@pytest.fixture(scope="module", params=[resnet18, encoder, lenet], ids=lambda make: make.__name__)
def network(request: pytest.FixtureRequest) -> Network:
    made: Network = request.param()
    return made


def macs(network: Network, ranks: tuple[int, ...]) -> int:
    return sum(layer.macs(rank) for layer, rank in zip(network.layers, ranks, strict=True))


def test_resnet18_is_the_published_one() -> None:
    """21 layers, ranks that sum to 4,325, 0.555 GMACs (Maestro, ICML 2024, Table 1)."""
    network = resnet18()

    assert len(network.layers) == 21
    assert sum(layer.max_rank for layer in network.layers) == 4325
    assert round(macs(network, network.uniform(1)) / 1e9, 3) == 0.555


def test_lenet_is_the_published_one() -> None:
    """281,640 MACs and 44,426 parameters, 236 of them biases (Maestro, ICML 2024)."""
    network = lenet()
    whole = network.uniform(1)

    assert macs(network, whole) == 281_640
    pairs = zip(network.layers, whole, strict=True)
    assert sum(layer.params(rank) for layer, rank in pairs) == 44_426 - 236


def test_chains_are_nested_and_end_whole(network: Network) -> None:
    full = tuple(layer.max_rank for layer in network.layers)
    for chain in (network.uniform_chain(16), network.staggered_chain(16, 4)):
        assert chain[0] == network.uniform(1 / 16)
        assert chain[-1] == full
        assert all(a <= b for low, high in pairwise(chain) for a, b in zip(low, high, strict=True))


def test_a_layer_of_a_staggered_chain_grows_at_few_points(network: Network) -> None:
    by_layer = zip(*network.staggered_chain(16, 4), strict=True)

    assert max(len(set(ranks)) for ranks in by_layer) <= 6


def test_outputs_differ_between_points_and_are_finite(network: Network, tmp_path: Path) -> None:
    model = network.save(tmp_path / "net.maestro", [network.uniform(1 / 8), network.uniform(1)])
    engine = Engine(model)
    x = np.random.default_rng(0).standard_normal((2, *network.input_shape), np.float32)

    low, high = engine.run(x, 0), engine.run(x, 1)

    assert np.isfinite(low).all()
    assert np.isfinite(high).all()
    assert not np.allclose(low, high)
