"""What went wrong in other code for this method and is not held by a test elsewhere."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from maestro_core.accounting import measure
from maestro_core.artifact import Image
from maestro_core.data import Data, Pictures
from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.frontier import Chain
from maestro_core.layers import LowRankLayer
from maestro_core.lod import sample, truncate_
from maestro_core.schedule import HyperParameters, Phase
from maestro_core.search import SearchParameters, find_chain
from maestro_core.training import train_

HYPER = HyperParameters(
    phases=(Phase("ordered", 2, 0.05),),
    batch_size=20,
    momentum=0.9,
    weight_decay=0.0,
    lasso=0.0,
    threshold=0.0,
    seed=1,
)
NESTED = Phase("nested", 1, 0.05)
STEPS = 2 * 10  # two epochs of 200 pictures


class Unused(Pictures):
    """A split that fails the test when it is read."""

    def batch(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        pytest.fail(f"pictures {indices} were read")

    def augmented(
        self, batches: Sequence[Tensor], distortion: float = 0.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pytest.fail(f"pictures {batches} were read, distorted by {distortion}")


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (200, 5, 5, 1), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 4, (200,), generator=generator)
    seen = Pictures(pixels, labels, Image("L", 5, 5, (0.5,), (0.25,)))
    return Data(seen, seen, Unused(pixels, labels, seen.image), "noise", "0")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 16), nn.Linear(16, 4)
    )
    factorize_(model)
    return model


def train(model: nn.Module, data: Data, root: Path, hyper: HyperParameters = HYPER) -> Chain:
    def find() -> Chain:
        cost = measure(model, torch.zeros(1, 1, 5, 5))
        parameters = SearchParameters(points=4, least_macs=0.1, probes=4)
        return find_chain(model, cost, data.validation, parameters, lambda *_: None)

    return train_(model, data, hyper, find, root, {"recipe": "noise"}, Progress(disable=True))


def test_every_step_of_ordered_training_is_one_pass_with_at_most_one_layer_cut(
    data: Data, tmp_path: Path
) -> None:
    """A misspelt option once switched the sampling off, and nothing said so."""
    model = network()
    whole = [layer.rank for layer in low_rank_layers(model).values()]
    passes: list[list[int]] = []
    for position, layer in enumerate(low_rank_layers(model).values()):

        def see(module: LowRankLayer, _inputs: object, position: int = position) -> None:
            if not module.training:
                return
            if position == 0:
                passes.append([])
            passes[-1].append(module.down.shape[0])

        layer.register_forward_pre_hook(see)

    train(model, data, tmp_path)

    cut = [sum(rank < most for rank, most in zip(ranks, whole, strict=True)) for ranks in passes]
    assert len(passes) == STEPS
    assert set(cut) == {0, 1}
    assert cut.count(1) > STEPS // 2


def test_training_and_search_never_read_the_test_pictures(data: Data, tmp_path: Path) -> None:
    chain = train(network(), data, tmp_path, replace(HYPER, phases=(*HYPER.phases, NESTED)))

    assert len(chain) > 2, "too short a chain to have been trained on"


def test_training_needs_no_global_random_state(data: Data, tmp_path: Path) -> None:
    """Ranks came from an unseeded generator, so that no run could be repeated."""
    first, again = network(), network()
    hyper = replace(HYPER, phases=(*HYPER.phases, NESTED))

    train(first, data, tmp_path / "a", hyper)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    train(again, data, tmp_path / "b", hyper)

    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_normalisation_keeps_its_momentum_and_its_statistics(data: Data, tmp_path: Path) -> None:
    """Statistics were reset before an evaluation and the momentum was never put back."""
    model = network()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)

    train(model, data, tmp_path)

    assert norm.momentum == 0.1
    assert int(norm.num_batches_tracked or 0) == STEPS


def test_all_layers_at_rank_zero_end_the_sampling_with_an_error() -> None:
    """The sampler looped forever."""
    with pytest.raises(ValueError, match="all 3 layers are at rank 0"):
        sample([0, 0, 0], Random(0))


@pytest.mark.parametrize("width", [25, 49])
def test_a_layer_cut_to_a_rank_uses_exactly_that_rank(width: int) -> None:
    """Ranks as fractions, rounded up, were one too many from width 25 on."""
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    factorize_(model)
    (layer,) = low_rank_layers(model).values()
    for rank in range(width + 1):
        product = forward_at(model, {"0": rank}, torch.eye(width, dtype=torch.float32))

        expected = layer.down[:rank].t() @ layer.up[:rank]
        torch.testing.assert_close(product, expected, atol=1e-5, rtol=1e-4)


def test_a_layer_between_dense_ones_can_be_sampled() -> None:
    """A network with any layer left dense could not be trained."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    factorize_(model, keep=["0", "2"])

    output = forward_at(model, {"1": 2}, torch.randn(4, 8))
    torch.autograd.backward(output.square().sum())

    (layer,) = low_rank_layers(model).values()
    assert layer.down.grad is not None
    assert int(layer.down.grad.count_nonzero(1).bool().sum()) == 2
    assert all(isinstance(model[i], nn.Linear) for i in (0, 2))


def test_a_shrunk_network_computes_what_the_cut_one_did_and_is_smaller() -> None:
    """Conversions multiplied factors whose removed ranks were only masked."""
    model = network().eval()
    x = torch.randn(5, 1, 5, 5)
    before = forward_at(model, {"0": 2, "3": 7}, x)
    size = sum(p.numel() for p in model.parameters())

    truncate_(model.get_submodule("0"), 2)  # type: ignore[arg-type]
    truncate_(model.get_submodule("3"), 7)  # type: ignore[arg-type]

    torch.testing.assert_close(model(x), before)
    removed = (6 - 2) * (9 + 6) + (16 - 7) * (54 + 16)
    assert sum(p.numel() for p in model.parameters()) == size - removed
