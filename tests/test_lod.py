"""The method's parts, each against an oracle written another way."""

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.layers import LowRankConv2d, LowRankLayer, LowRankLinear
from maestro_core.lod import group_lasso, importance, sample, shrink_, truncate_


def test_every_pair_of_layer_and_rank_is_as_likely() -> None:
    rng, ranks, draws = Random(0), (3, 0, 1, 6), 20_000

    counts = Counter(sample(ranks, rng) for _ in range(draws))

    pairs = {(i, b) for i, r in enumerate(ranks) for b in range(1, r + 1)}
    assert set(counts) == pairs
    expected = draws / len(pairs)
    chi_squared = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001


@given(st.lists(st.integers(0, 2048), min_size=1, max_size=8), st.integers())
def test_a_sampled_rank_is_one_the_layer_has(ranks: list[int], seed: int) -> None:
    if sum(ranks) == 0:
        with pytest.raises(ValueError, match="at rank 0: nothing to sample"):
            sample(ranks, Random(seed))
        return

    index, rank = sample(ranks, Random(seed))

    assert 1 <= rank <= ranks[index]


def test_sampling_makes_no_list_of_the_pairs() -> None:
    index, rank = sample([10**15, 10**15], Random(1))

    assert 1 <= rank <= 10**15
    assert index in (0, 1)


def double_sum(factor: Tensor) -> Tensor:
    """Return Σ_b ‖factor[b:]‖ by its definition."""
    return torch.stack([factor[b:].norm() for b in range(len(factor))]).sum()


def test_group_lasso_is_its_definition_and_so_is_its_gradient() -> None:
    layers: list[LowRankLayer] = [
        LowRankLinear(5, 7, 4).double(),
        LowRankConv2d(2, 3, (3, 2), 3).double(),
    ]

    lasso = group_lasso(layers)
    factors = [factor for layer in layers for factor in (layer.down, layer.up)]
    gradients = torch.autograd.grad(lasso, factors)
    expected = torch.stack([double_sum(factor) for factor in factors]).sum()

    torch.testing.assert_close(lasso, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, factors), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("zeros", [slice(0, 4), slice(2, 4), slice(1, 2)])
def test_group_lasso_has_no_nan_at_zero(zeros: slice) -> None:
    layer = LowRankLinear(5, 7, 4)
    layer.down.data[zeros] = 0
    layer.up.data[zeros] = 0

    torch.autograd.backward(group_lasso([layer]))

    for factor in (layer.down, layer.up):
        assert factor.grad is not None
        assert factor.grad.isfinite().all()
        assert (factor.grad[zeros] == 0).all()


def test_group_lasso_accepts_a_layer_at_rank_zero() -> None:
    empty = LowRankLinear(5, 7, 0)
    whole = LowRankLinear(5, 7, 2)

    assert group_lasso([empty, whole]) == group_lasso([whole])


def test_importance_bounds_what_a_cut_discards_and_never_rises() -> None:
    layer = LowRankConv2d(3, 8, (3, 3), 8)

    values = importance(layer)

    assert values.shape == (8,)
    assert (values.diff() <= 0).all()
    for b in range(8):
        discarded = layer.up[b:].t() @ layer.down[b:].flatten(1)
        assert discarded.norm() <= values[b] * (1 + 1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.head = nn.Linear(6, 4)
        factorize_(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        return logits


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30)
        self.head.weight = self.embedding.weight
        factorize_(self)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(tokens).relu())
        return logits


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss = model(torch.randn(8, 2, 6, 6)).square().mean()
    torch.autograd.backward(loss)
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


@pytest.mark.parametrize(("make", "moments"), [(sgd, 1), (adam, 2)])
def test_shrinking_removes_rows_from_weights_gradients_and_optimiser_state(
    make: Callable[[nn.Module], torch.optim.Optimizer], moments: int
) -> None:
    model = Net()
    optimizer = make(model)
    step(model, optimizer)
    layers = low_rank_layers(model)
    identity = [id(p) for p in model.parameters()]
    layers["conv"].down.data[4:] = 0
    layers["head"].up.data[1:] *= 1e-9
    x = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        before = model(x)

    ranks = shrink_(model, optimizer, 1e-5)

    assert ranks == {"conv": 4, "head": 1}
    assert [id(p) for p in model.parameters()] == identity
    for layer in layers.values():
        for factor in (layer.down, layer.up):
            assert factor.untyped_storage().nbytes() == factor.nbytes
            assert factor.grad is not None
            assert factor.grad.shape == factor.shape
            state = optimizer.state[factor]
            assert [v.shape for v in state.values() if v.dim()] == [factor.shape] * moments
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    step(model, optimizer)
    assert model(x).isfinite().all()


def test_a_table_shrinks_with_its_projection_and_their_optimiser_state() -> None:
    model = Language()
    optimizer = adam(model)
    tokens = torch.randint(30, (4, 6))
    torch.autograd.backward(model(tokens).square().mean())
    optimizer.step()
    layer = low_rank_layers(model)["embedding"]
    layer.up.data[5:] = 0
    before = model(tokens).detach()

    ranks = shrink_(model, optimizer, 1e-5)

    assert ranks == {"embedding": 5}
    assert model.head.down.shape == (5, 8)
    for factor in (layer.down, layer.up):
        assert [v.shape for v in optimizer.state[factor].values() if v.dim()] == [factor.shape] * 2
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-6)
    torch.autograd.backward(model(tokens).square().mean())
    optimizer.step()
    assert model(tokens).isfinite().all()


def test_shrinking_equals_running_at_those_ranks() -> None:
    model, x = Net(), torch.randn(3, 2, 6, 6)
    expected = forward_at(model, {"conv": 2, "head": 3}, x)

    for name, rank in (("conv", 2), ("head", 3)):
        truncate_(low_rank_layers(model)[name], rank)

    assert torch.equal(model(x), expected)


def test_ranks_only_fall_and_a_removed_rank_never_returns() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    low_rank_layers(model)["conv"].down.data[3:] = 0
    shrink_(model, optimizer, 1e-5)

    step(model, optimizer)

    assert shrink_(model, optimizer, 0.0)["conv"] <= 3
    with pytest.raises(ValueError, match=r"ranks 0\.\.3, not 4"):
        truncate_(low_rank_layers(model)["conv"], 4)


def test_a_layer_can_shrink_to_nothing_and_training_goes_on() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    low_rank_layers(model)["conv"].up.data.zero_()

    ranks = shrink_(model, optimizer, 1e-5)
    step(model, optimizer)

    assert ranks["conv"] == 0
    assert model(torch.randn(3, 2, 6, 6)).shape == (3, 4)
