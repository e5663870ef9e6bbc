"""Whole networks: factorised in place, and run at given ranks."""

import pytest
import torch
from torch import Tensor, nn

from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.layers import LowRankConv2d, LowRankLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.fc1 = nn.Linear(6 * 36, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.conv(x)).relu()).relu()
        logits: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return logits


class Shared(nn.Module):
    """One module under two names, and two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.tied = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tied(self.again(self.first(x).relu())))
        return logits


def test_factorising_leaves_the_forward_pass_unchanged() -> None:
    model, x = Net().eval(), torch.randn(4, 2, 8, 8)
    before = model(x)

    done = factorize_(model)

    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    assert done.low_rank == ("conv", "fc1", "fc2")
    assert list(low_rank_layers(model)) == ["conv", "fc1", "fc2"]


def test_a_grouped_convolution_is_left_dense_and_said_so() -> None:
    model = Net()

    done = factorize_(model)

    assert isinstance(model.depthwise, nn.Conv2d)
    assert done.dense == {"depthwise": "groups=6: only 1 is factorised"}


def test_padding_that_is_not_zeros_is_left_dense_and_said_so() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"))

    assert "circular" in factorize_(model).dense["0"]


@pytest.mark.parametrize(
    ("keep", "low_rank"), [(["fc2"], ("conv", "fc1")), (["fc?"], ("conv",)), (["conv"], None)]
)
def test_only_the_layers_named_in_keep_stay_dense(
    keep: list[str], low_rank: tuple[str, ...] | None
) -> None:
    model = Net()

    done = factorize_(model, keep)

    assert done.low_rank == (low_rank or ("fc1", "fc2"))
    assert set(done.dense) == {"conv", "depthwise", "fc1", "fc2"} - set(done.low_rank)


def test_a_pattern_that_matches_nothing_is_refused_before_anything_changes() -> None:
    model = Net()

    with pytest.raises(ValueError, match="'fc9' matches no"):
        factorize_(model, ["fc1", "fc9"])
    assert not low_rank_layers(model)


def test_a_shared_module_stays_shared_and_a_tied_weight_stays_tied() -> None:
    model, x = Shared(), torch.randn(3, 8)
    before = model(x)

    done = factorize_(model)

    assert done.low_rank == ("first",)
    assert model.again is model.first
    assert model.head.weight is model.tied.weight
    assert set(done.dense) == {"tied", "head"}
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_a_shared_module_is_cut_at_every_use() -> None:
    model, x = Shared(), torch.randn(3, 8)
    factorize_(model)
    (layer,) = low_rank_layers(model).values()

    y = forward_at(model, {"first": 3}, x)

    expected = model.head(model.tied(layer(layer(x, 3).relu(), 3)))
    torch.testing.assert_close(y, expected)


def test_attention_that_reads_its_children_still_runs() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    before = model(x)

    done = factorize_(model)

    assert done.low_rank == ()
    assert set(done.dense) == {"self_attn.out_proj", "linear1", "linear2"}
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_forward_at_equals_the_layers_called_with_ranks() -> None:
    model, x = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7)), torch.randn(4, 9)
    factorize_(model)
    first, second = low_rank_layers(model).values()

    y = forward_at(model, {"0": 3, "2": 5}, x)

    torch.testing.assert_close(y, second(first(x, 3).relu(), 5))


def test_forward_at_sends_gradients_to_the_model_and_changes_nothing() -> None:
    model, x = Net(), torch.randn(4, 2, 8, 8)
    factorize_(model)
    names = [name for name, _ in model.named_parameters()]
    model.eval()
    before = model(x)

    loss = forward_at(model, {"fc1": 2}, x).square().sum()
    torch.autograd.backward(loss)

    down = model.get_parameter("fc1.down").grad
    assert down is not None
    assert down[:2].abs().max() > 0
    assert down[2:].abs().max() == 0
    assert model.get_parameter("conv.down").grad is not None
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(x), before)


def test_forward_at_cuts_by_views_of_the_same_memory() -> None:
    model = nn.Sequential(nn.Linear(9, 8))
    factorize_(model)
    seen = []
    layer = low_rank_layers(model)["0"]
    layer.register_forward_hook(lambda layer, *_: seen.append(layer.down))

    forward_at(model, {"0": 3}, torch.randn(1, 9))

    assert seen[0].shape == (3, 9)
    assert seen[0].data_ptr() == layer.down.data_ptr()


def test_a_forward_pass_that_fails_leaves_the_model_whole() -> None:
    model = Net()
    factorize_(model)

    with pytest.raises(RuntimeError):
        forward_at(model, {"conv": 1, "fc1": 2}, torch.randn(1, 2, 5, 5))

    assert low_rank_layers(model)["fc1"].rank == 12
    assert low_rank_layers(model)["conv"].rank == 6


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"fc1": 13}, r"layer 'fc1' has ranks 0\.\.12, not 13"),
        ({"fc1": -1}, r"layer 'fc1' has ranks 0\.\.12, not -1"),
        ({"fc9": 1}, r"'fc9' is not a factorised layer; they are: conv, fc1, fc2"),
        ({"norm": 1}, r"'norm' is not a factorised layer"),
    ],
)
def test_a_wrong_layer_or_rank_is_refused(ranks: dict[str, int], message: str) -> None:
    model = Net()
    factorize_(model)

    with pytest.raises(ValueError, match=message):
        forward_at(model, ranks, torch.randn(1, 2, 8, 8))


def test_factors_keep_type_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 3)).double()
    model[0].weight.requires_grad_(False)

    factorize_(model)

    assert isinstance(model[0], LowRankLinear)
    assert isinstance(model[1], LowRankConv2d)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not model[0].down.requires_grad
    assert not model[0].up.requires_grad
    assert model[1].down.requires_grad
