"""A low-rank convolution and its normalisation in one: the same as one after the other."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from maestro_core import normalised as module
from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.layers import LowRankConv2d
from maestro_core.lod import truncate_
from maestro_core.models.resnet import ResNet18
from maestro_core.normalised import normalised


class Pair(nn.Module):
    """A convolution of rank 5 with 16 outputs, and its normalisation."""

    def __init__(self, norm: nn.BatchNorm2d | None = None, *, bias: bool = False) -> None:
        super().__init__()
        self.convolution = LowRankConv2d(6, 16, (3, 3), 5, (2, 2), (1, 1), bias=bias)
        self.norm = nn.BatchNorm2d(16) if norm is None else norm
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return normalised(self.convolution, self.norm, x)


class Doubled(nn.BatchNorm2d):
    """A normalisation of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Apart(nn.Module):
    """What `pair` is, one after the other, in a copy."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        copied = copy.deepcopy(pair)
        self.convolution, self.norm = copied.convolution, copied.norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.convolution(x))
        return y


@pytest.fixture
def in_one(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that outputs are put into when they are computed in one."""
    outputs: list[Tensor] = []
    apply: Callable[..., Tensor] = module._Normalised.apply

    def counted(*given: Tensor) -> Tensor:
        outputs.append(apply(*given))
        return outputs[-1]

    monkeypatch.setattr(module._Normalised, "apply", counted)
    return outputs


def gradients(model: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the gradients of a loss that no symmetry of the output hides: by x and parameters."""
    x = x.clone().requires_grad_()
    loss = (model(x).tanh() * weights).sum()
    return list(torch.autograd.grad(loss, [x, *model.parameters()]))


@pytest.mark.parametrize("rank", [1, 4, 5])
@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(nn.BatchNorm2d(16), id="usual"),
        pytest.param(nn.BatchNorm2d(16, momentum=None), id="mean of all batches"),
        pytest.param(nn.BatchNorm2d(16, eps=0.1, momentum=0.3), id="other constants"),
        pytest.param(nn.BatchNorm2d(16, track_running_stats=False), id="nothing kept"),
    ],
)
def test_values_gradients_and_statistics_are_those_of_the_two_layers(
    norm: nn.BatchNorm2d, rank: int, in_one: list[Tensor]
) -> None:
    torch.manual_seed(0)
    pair = Pair(copy.deepcopy(norm)).double()
    truncate_(pair.convolution, rank)
    apart = Apart(pair)
    x, weights = 3 + torch.randn(4, 6, 9, 7).double(), torch.randn(4, 16, 5, 4).double()

    for _ in range(2):
        torch.testing.assert_close(
            gradients(pair, x, weights), gradients(apart, x, weights), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(pair(x), apart(x), rtol=1e-9, atol=1e-9)
    for kept, expected in zip(pair.buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(kept, expected, rtol=1e-9, atol=1e-9)
    assert len(in_one) == 4


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pictures_of_few_places_in_either_layout(
    layout: torch.memory_format, side: int, rank: int, in_one: list[Tensor]
) -> None:
    torch.manual_seed(0)
    pair = Pair().double()
    truncate_(pair.convolution, rank)
    x = torch.randn(8, 6, side, side).double().contiguous(memory_format=layout)
    weights = torch.randn(8, 16, side // 2, side // 2).double()

    torch.testing.assert_close(
        gradients(pair, x, weights), gradients(Apart(pair), x, weights), rtol=1e-9, atol=1e-9
    )
    assert in_one


def test_numbers_are_exact_in_single_precision(in_one: list[Tensor]) -> None:
    torch.manual_seed(0)
    pair = Pair()
    exact = Apart(pair).double()
    x = 5 + torch.randn(32, 6, 16, 16)  # its mean is five times its deviation

    torch.testing.assert_close(pair(x).double(), exact(x.double()), rtol=0, atol=1e-4)
    assert in_one


def test_a_mean_that_would_cost_the_variance_its_digits_is_left_to_the_two_layers(
    in_one: list[Tensor],
) -> None:
    torch.manual_seed(0)
    pair = Pair()
    pair.convolution.padding = (0, 0)  # zeros at the edges would be variance
    apart = Apart(pair)
    x = 1000 + torch.randn(32, 6, 16, 16)

    torch.testing.assert_close(pair(x), apart(x), rtol=0, atol=0)
    torch.testing.assert_close(pair.norm.running_var, apart.norm.running_var, rtol=0, atol=0)
    assert pair.norm.num_batches_tracked == 1
    assert not in_one


def cancelling(rank: int) -> Pair:
    """Return a pair of that rank whose outputs have no mean where its inputs all have the same."""
    torch.manual_seed(0)
    pair = Pair(nn.BatchNorm2d(64))
    pair.convolution = LowRankConv2d(64, 64, (1, 1), rank, bias=False)
    with torch.no_grad():
        pair.convolution.down.copy_(torch.eye(rank, 64).view_as(pair.convolution.down))
        up = pair.convolution.up.normal_()
        up.sub_(up.mean(0))
    return pair


@pytest.mark.parametrize("mean", [100, 3_000, 10_000])
def test_means_that_cancel_are_left_to_the_two_layers(mean: int, in_one: list[Tensor]) -> None:
    pair = cancelling(4)
    apart = Apart(pair)
    x = mean + torch.randn(32, 64, 8, 8)

    torch.testing.assert_close(pair(x), apart(x), rtol=0, atol=0)
    assert not in_one


def test_many_small_means_that_cancel_are_exact_in_one(in_one: list[Tensor]) -> None:
    pair = cancelling(16)
    exact = Apart(pair).double()
    x = 10 + torch.randn(32, 64, 8, 8)  # their sizes add up to thirty times the deviation

    torch.testing.assert_close(pair(x).double(), exact(x.double()), rtol=0, atol=1e-3)
    assert in_one


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda pair: pair.eval(), id="inference"),
        pytest.param(lambda pair: pair.norm.eval(), id="frozen statistics"),
        pytest.param(lambda pair: pair.convolution.eval(), id="statistics of a point"),
        pytest.param(lambda pair: truncate_(pair.convolution, 0), id="rank 0"),
    ],
)
def test_elsewhere_it_is_the_two_layers(
    change: Callable[[Pair], object], in_one: list[Tensor]
) -> None:
    pair = Pair()
    change(pair)
    apart = Apart(pair)
    x = torch.randn(4, 6, 9, 7)

    torch.testing.assert_close(pair(x), apart(x), rtol=0, atol=0)
    assert not in_one


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(Pair(bias=True), id="bias"),
        pytest.param(Pair(nn.BatchNorm2d(16, affine=False)), id="no scale"),
        pytest.param(Pair(Doubled(16)), id="derived"),
    ],
)
def test_layers_of_other_kinds_are_called_one_after_the_other(
    pair: Pair, in_one: list[Tensor]
) -> None:
    apart = Apart(pair)
    x = torch.randn(4, 6, 9, 7)

    torch.testing.assert_close(pair(x), apart(x), rtol=0, atol=0)
    assert not in_one


def test_mixed_precision_is_left_to_torch(in_one: list[Tensor]) -> None:
    pair = Pair()

    with torch.autocast("cpu", torch.bfloat16):
        y = pair(torch.randn(4, 6, 9, 7))

    assert y.dtype == torch.bfloat16
    assert not in_one


def test_few_digits_are_left_to_torch(in_one: list[Tensor]) -> None:
    assert Pair().bfloat16()(torch.randn(4, 6, 9, 7).bfloat16()).dtype == torch.bfloat16
    assert not in_one


def test_less_is_kept_for_the_backward_pass() -> None:
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _ = model(x)
        return sum(sizes.values())

    pair, x = Pair(), torch.randn(8, 6, 32, 32)
    assert kept(pair) < kept(Apart(pair)) - 0.9 * 4 * 8 * 16 * 16 * 16  # y, float32


def test_one_place_has_no_variance(in_one: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Pair()(torch.randn(1, 6, 1, 1))
    assert not in_one


def test_a_cut_layer_trains_the_components_that_it_keeps(in_one: list[Tensor]) -> None:
    model = nn.Sequential(Pair())
    y = forward_at(model, {"0.convolution": 2}, torch.randn(4, 6, 9, 7))
    torch.autograd.backward((y * torch.randn_like(y)).sum())

    up = model[0].get_parameter("convolution.up").grad
    assert in_one
    assert up is not None
    assert up[:2].any()
    assert not up[2:].any()


def test_a_network_at_half_of_its_ranks_computes_what_its_layers_say(
    in_one: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = ResNet18().double()
    factorize_(model)
    for layer in low_rank_layers(model).values():
        truncate_(layer, layer.rank // 2)
    other = copy.deepcopy(model)
    x = torch.randn(4, 3, 16, 16).double()
    y = model(x)
    assert len(in_one) == 12, "the stem, eight convolutions to 64 or 128, and three shortcuts"

    monkeypatch.setattr(module, "_is_cheaper", lambda *_: False)
    torch.testing.assert_close(y, other(x), rtol=1e-9, atol=1e-9)
    for kept, expected in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(kept, expected, rtol=1e-9, atol=1e-9)
