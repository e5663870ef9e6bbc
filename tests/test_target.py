"""Training to a size: the law of λ, landing on known figures, and runs that get there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from torch import Tensor, nn

from maestro_core import checkpoint
from maestro_core.accounting import Cost, measure
from maestro_core.data import Data
from maestro_core.evaluation import evaluate
from maestro_core.factorize import factorize_, low_rank_layers
from maestro_core.frontier import Chain
from maestro_core.lod import importance, truncate_
from maestro_core.schedule import HyperParameters, Phase
from maestro_core.target import (
    Pursuit,
    Quantity,
    Target,
    TargetMissed,
    dual_ascent,
    first_weight,
    planned,
)
from maestro_core.training import train_
from tests.stops import Stops
from tests.test_training import IMAGE, pictures

HYPER = HyperParameters(
    phases=(Phase("ordered", 8, 0.05),),
    batch_size=32,
    momentum=0.9,
    weight_decay=1e-4,
    lasso=0.0,
    threshold=1e-5,
    seed=3,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(IMAGE.height * IMAGE.width, 40)
        self.fc2 = nn.Linear(40, 30)
        self.head = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x.flatten(1)).relu()
        logits: Tensor = self.head(self.fc2(x).relu())
        return logits


def network() -> Net:
    torch.manual_seed(0)
    model = Net()
    factorize_(model)
    return model


def cost_of(model: nn.Module) -> Cost:
    return measure(model, torch.zeros(1, 1, IMAGE.height, IMAGE.width))


def train(model: nn.Module, data: Data, root: Path, hyper: HyperParameters, **run: Any) -> None:
    def whole() -> Chain:
        return [tuple(layer.rank for layer in low_rank_layers(model).values())]

    train_(model, data, hyper, whole, root, {"recipe": "x"}, run.get("bar", Progress(disable=True)))


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(pictures(300, 0), pictures(100, 1), pictures(100, 2), "blobs", "0")


@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize("share", [0.35, 0.7])
def test_training_ends_within_5_percent_of_the_target(
    data: Data, tmp_path: Path, quantity: Quantity, share: float
) -> None:
    model, target = network(), Target(quantity, share)

    train(model, data, tmp_path, replace(HYPER, target=target))

    cost = cost_of(model)
    reached = target.of(cost, [layer.max_rank for layer in cost.layers])
    assert 0.95 <= reached / share <= 1.05
    assert evaluate(model, data.validation).accuracy > 0.9


def test_a_resumed_run_ends_with_the_same_bits_and_weight(data: Data, tmp_path: Path) -> None:
    hyper = replace(HYPER, target=Target("macs", 0.5))
    whole, stopped, resumed = network(), network(), network()

    train(whole, data, tmp_path / "whole", hyper)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, data, tmp_path / "cut", hyper, bar=Stops(45))
    train(resumed, data, tmp_path / "cut", hyper)

    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [checkpoint.read_state(tmp_path / run / "epoch-0008") for run in ("whole", "cut")]
    assert states[0].lasso == states[1].lasso > 0


def test_a_target_below_rank_1_everywhere_can_not_be_reached(data: Data, tmp_path: Path) -> None:
    with pytest.raises(TargetMissed, match=r"target 0\.01 of the dense macs: with rank 1 in every"):
        train(network(), data, tmp_path, replace(HYPER, target=Target("macs", 0.01)))
    assert not list(tmp_path.iterdir())


def test_a_target_that_training_does_not_come_near_says_how_far_it_came() -> None:
    model = network()
    layers = list(low_rank_layers(model).values())

    with pytest.raises(TargetMissed, match=r"came to 1\.000 only; it needs more ordered epochs"):
        Pursuit(Target("macs", 0.2), cost_of(model), 1.0).landing(layers)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 35.0])
def test_a_target_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"a share of the dense network, 0\.\.1, not"):
        Target("macs", share)


def test_a_target_needs_one_ordered_phase() -> None:
    with pytest.raises(ValueError, match="needs one ordered phase"):
        replace(HYPER, phases=(Phase("dense", 1, 0.1),), target=Target("macs", 0.5))


def test_landing_takes_the_least_important_ranks_that_fit() -> None:
    model = network()
    layers = list(low_rank_layers(model).values())
    cost, target = cost_of(model), Target("params", 0.5)
    for layer, size, rank in zip(layers, (1e-3, 10.0, 1.0), (14, 9, 2), strict=True):
        truncate_(layer, rank)
        layer.up.data.fill_(size)

    ranks = Pursuit(target, cost, 1.0).landing(layers)

    assert target.of(cost, [14, 9, 2]) > 0.6
    assert ranks[1:] == [9, 2], "a layer that matters lost ranks"
    assert ranks[0] < 14
    assert 0.95 <= target.of(cost, ranks) / 0.5 <= 1.05


def test_no_layer_loses_its_last_rank() -> None:
    model = network()
    layers = list(low_rank_layers(model).values())
    layers[2].up.data *= 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pursuit = Pursuit(Target("params", 0.3), cost_of(model), weight=1e-3)

    pursuit.step_(layers, optimizer, rate=0.1, done=0.1)

    assert importance(layers[2])[-1] > 0
    assert layers[2].rank == 3
    assert layers[0].rank > 0


@given(st.floats(1e-9, 1.0), st.floats(-1, 1), st.floats(0, 1))
def test_the_weight_rises_where_the_network_is_too_large(
    weight: float, excess: float, passed: float
) -> None:
    after = dual_ascent(weight, excess, passed)

    assert after > 0
    assert (after - weight) * excess >= 0


@given(st.floats(0.01, 0.99))
def test_the_plan_falls_from_the_whole_network_to_the_target(share: float) -> None:
    sizes = [planned(share, done / 20) for done in range(21)]

    assert sizes[0] == 1
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[14:] == pytest.approx([share] * 7)


def test_the_first_weight_is_for_the_typical_layer() -> None:
    layers = list(low_rank_layers(network()).values())

    weight = first_weight(layers, rate=0.5, steps=100)

    norms = [float(layer.up[-1].detach().norm()) / layer.rank**0.5 for layer in layers]
    assert weight == pytest.approx(sorted(norms)[1] / 20)


def test_ranks_and_layers_of_zeros_do_not_set_the_first_weight() -> None:
    first, second, head = low_rank_layers(network()).values()
    second.up.data[20:] = 0
    head.up.data.zero_()

    weight = first_weight([first, second, head, head, head], rate=0.5, steps=100)

    norms = [
        float(first.up[-1].detach().norm()) / 6,
        float(second.up[19].detach().norm()) / 20**0.5,
    ]
    assert weight == pytest.approx(sum(norms) / 2 / 20)
    assert first_weight([head], rate=0.5, steps=100) == pytest.approx(1 / 20)


def test_a_network_whose_layers_begin_at_zero_gets_to_its_target(
    data: Data, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Net()
    for layer in (model.fc2, model.head):
        nn.init.zeros_(layer.weight)
    factorize_(model)
    target = Target("macs", 0.5)

    train(model, data, tmp_path, replace(HYPER, target=target))

    ranks = [layer.rank for layer in low_rank_layers(model).values()]
    assert target.of(cost_of(model), ranks) <= target.most
