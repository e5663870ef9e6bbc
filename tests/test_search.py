"""The chain of a small network: nested, verified, and chosen by validation alone."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from maestro_core.accounting import measure
from maestro_core.artifact import Image
from maestro_core.data import Pictures
from maestro_core.evaluation import evaluate
from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.search import Candidate, SearchParameters, find_chain, select

PARAMETERS = SearchParameters(points=5, min_accuracy=0.3, probes=8)


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


def chain_of(model: Net, pictures: Pictures) -> list[Candidate]:
    cost = measure(model, torch.zeros(1, 1, 6, 6))
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


def test_the_chain_is_nested_and_each_point_earns_its_cost(model: Net, pictures: Pictures) -> None:
    chain = chain_of(model, pictures)

    assert 3 <= len(chain) <= PARAMETERS.points
    for less, more in pairwise(chain):
        assert all(a <= b for a, b in zip(less.ranks, more.ranks, strict=True))
        assert less.macs < more.macs
        assert less.accuracy < more.accuracy
    assert chain[0].accuracy >= PARAMETERS.min_accuracy


def test_a_point_is_as_accurate_as_the_whole_cut_network_is(model: Net, pictures: Pictures) -> None:
    for candidate in chain_of(model, pictures):
        ranks = dict(zip(("conv", "fc", "head"), candidate.ranks, strict=True))

        assert evaluate(model, pictures, ranks).accuracy == candidate.accuracy


def test_the_search_changes_nothing_in_the_network(model: Net, pictures: Pictures) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}

    chain_of(model, pictures)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_progress_never_passes_its_total(model: Net, pictures: Pictures) -> None:
    told: list[tuple[int, int]] = []
    cost = measure(model, torch.zeros(1, 1, 6, 6))

    find_chain(model, cost, pictures, PARAMETERS, lambda done, total: told.append((done, total)))

    assert len({total for _, total in told}) == 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


CANDIDATES = [
    Candidate((1, 1), 10, 0.2),
    Candidate((1, 2), 20, 0.6),
    Candidate((2, 2), 30, 0.5),
    Candidate((2, 3), 40, 0.8),
    Candidate((3, 3), 50, 0.8),
]


def test_inaccurate_and_beaten_candidates_are_dropped() -> None:
    assert select(CANDIDATES, SearchParameters(9, 0.3, 8)) == [CANDIDATES[1], CANDIDATES[3]]


def test_a_network_that_never_learnt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is 0\.8000, below the least that is wanted, 0\.9"):
        select(CANDIDATES, SearchParameters(9, 0.9, 8))
