"""The chain of a small network: nested, verified, and chosen by validation alone."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maestro_core.accounting import Cost, measure
from maestro_core.artifact import Image
from maestro_core.data import Pictures
from maestro_core.evaluation import evaluate
from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.frontier import Chain
from maestro_core.normalisation import recalibrate
from maestro_core.search import SearchParameters, by_name, error_tables, find_chain, make_points

PARAMETERS = SearchParameters(points=5, least_macs=0.3, probes=8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.fc(self.norm(self.conv(x)).relu().flatten(1)).relu())
        return logits


@pytest.fixture(scope="module")
def model() -> Net:
    """Return a network whose answers are about equally often each of the three."""
    torch.manual_seed(0)
    net = Net()
    factorize_(net)
    with torch.no_grad():
        for layer in low_rank_layers(net).values():
            layer.up.mul_(3 * 0.7 ** torch.arange(layer.rank)[:, None])  # as ordered as if trained
        net.head.bias.sub_(net.eval()(torch.randn(500, 1, 6, 6) * 1.2).mean(0))
    return net.train()


@pytest.fixture(scope="module")
def pictures(model: Net) -> Pictures:
    """Return pictures labelled by the whole network itself, so cutting it can only harm."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (700, 6, 6, 1), generator=generator).to(torch.uint8)
    image = Image("L", 6, 6, (0.5,), (0.25,))
    x, _ = Pictures(pixels, torch.zeros(700, dtype=torch.int64), image).batch(slice(None))
    with torch.no_grad():
        logits = model.eval()(x)
    model.train()
    return Pictures(pixels, logits.argmax(1), image)


@pytest.fixture(scope="module")
def cost(model: Net) -> Cost:
    return measure(model, torch.zeros(1, 1, 6, 6))


def chain_of(model: Net, cost: Cost, pictures: Pictures) -> Chain:
    return find_chain(model, cost, pictures, PARAMETERS, lambda *_: None)


def test_evaluation_is_that_of_one_pass_over_everything(model: Net, pictures: Pictures) -> None:
    x, labels = pictures.batch(slice(None))

    result = evaluate(model, pictures, {"fc": 2})

    assert model.training, "its mode is put back"
    with torch.no_grad():
        logits = forward_at(model.eval(), {"fc": 2}, x)
    model.train()
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    assert (result.correct, result.n) == (int((logits.argmax(1) == labels).sum()), 700)


def test_the_chain_is_nested_from_the_least_macs_to_the_whole_network(
    model: Net, cost: Cost, pictures: Pictures
) -> None:
    chain = chain_of(model, cost, pictures)

    macs = [cost.macs_at(ranks) for ranks in chain]
    assert len(chain) == PARAMETERS.points
    assert chain[-1] == (4, 12, 3)
    assert macs[0] >= PARAMETERS.least_macs * cost.dense_macs
    for less, more in pairwise(chain):
        assert all(a <= b for a, b in zip(less, more, strict=True))
    assert all(a < b for a, b in pairwise(macs))


def test_verified_points_are_each_more_accurate_than_all_cheaper_ones(
    model: Net, cost: Cost, pictures: Pictures
) -> None:
    every = find_chain(model, cost, pictures, SearchParameters(99, 0.0, 99), lambda *_: None)

    points = make_points(model, cost, every, pictures, pictures, lambda *_: None)
    kept = [point.ranks for point in points]

    accuracy = {}
    for ranks in every:
        named = by_name(cost, ranks)
        statistics = recalibrate(model, named, pictures)
        accuracy[ranks] = evaluate(model, pictures, named, statistics).accuracy
    assert 2 <= len(kept) < len(every)
    assert all(accuracy[a] < accuracy[b] for a, b in pairwise(kept))
    for ranks in set(every) - set(kept):
        cheaper = [r for r in kept if cost.macs_at(r) < cost.macs_at(ranks)]
        assert max(accuracy[r] for r in cheaper) >= accuracy[ranks]


def test_the_search_changes_nothing_in_the_network(
    model: Net, cost: Cost, pictures: Pictures
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}

    chain_of(model, cost, pictures)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"points": 1}, "points is 1, at least 2"),
        ({"probes": 0}, "probes is 0, at least 2"),
        ({"samples": -1}, "samples is -1, at least 0"),
        ({"least_macs": -0.1}, r"least_macs < most_macs <= 1, not -0\.1 and 1\.0"),
        ({"most_macs": 0.3}, r"least_macs < most_macs <= 1, not 0\.3 and 0\.3"),
        ({"most_macs": 1.1}, r"least_macs < most_macs <= 1, not 0\.3 and 1\.1"),
    ],
)
def test_parameters_that_find_no_chain_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PARAMETERS, **wrong)


def test_progress_counts_to_its_total(model: Net, cost: Cost, pictures: Pictures) -> None:
    told: list[tuple[int, int]] = []

    find_chain(model, cost, pictures, PARAMETERS, lambda *counts: told.append(counts))

    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {total for _, total in told} == {len(told)}


def test_a_layer_that_may_go_is_tried_at_rank_zero(
    model: Net, cost: Cost, pictures: Pictures
) -> None:
    parameters = replace(PARAMETERS, multiple=4, removable=("f?",))

    tables = error_tables(model, cost, pictures, parameters, lambda *_: None)

    assert [table.ranks for table in tables] == [(4,), (0, 4, 8, 12), (3,)]
    assert tables[1].costs[0] == 0
    assert tables[1].errors[0] > tables[1].errors[1]


def test_a_pattern_that_no_layer_has_is_refused(model: Net, cost: Cost, pictures: Pictures) -> None:
    parameters = replace(PARAMETERS, removable=("fc", "body.*"))

    with pytest.raises(ValueError, match=r"removable: 'body\.\*' matches no layer"):
        find_chain(model, cost, pictures, parameters, lambda *_: None)
