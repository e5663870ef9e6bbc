"""The proximal step, against the definition of the penalty and the condition for a minimum."""

import pytest
import torch
from torch import Tensor, nn

from maestro_core.layers import LowRankConv2d, LowRankLinear
from maestro_core.lod import group_lasso, importance
from maestro_core.proximal import proximal_step_


def layers() -> list[LowRankLinear | LowRankConv2d]:
    torch.manual_seed(0)
    return [LowRankLinear(7, 5, 5).double(), LowRankConv2d(2, 4, (3, 2), 3).double()]


def factors(of: list[LowRankLinear | LowRankConv2d]) -> list[nn.Parameter]:
    return [factor for layer in of for factor in (layer.down, layer.up)]


@pytest.mark.parametrize("weight", [0.01, 0.2, 1.0])
def test_nothing_near_is_lower(weight: float) -> None:
    """The sum is convex: what no small change improves is its minimum."""
    found = layers()
    before = [factor.detach().clone() for factor in factors(found)]

    def value() -> Tensor:
        moved = sum((x - z).square().sum() for x, z in zip(factors(found), before, strict=True))
        return 0.5 * moved + weight * group_lasso(found).detach()

    proximal_step_(found, weight)

    least = value()
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(50):
            kept = [factor.detach().clone() for factor in factors(found)]
            for factor in factors(found):
                draw = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                factor.data += size * draw * (torch.rand((), generator=generator) < 0.5)
            assert value() >= least - 1e-12
            for factor, old in zip(factors(found), kept, strict=True):
                factor.data = old


def test_one_row_alone_is_soft_thresholded() -> None:
    layer = LowRankLinear(3, 2, 1).double()
    layer.down.data = torch.tensor([[3.0, 0.0, 4.0]]).double()
    layer.up.data = torch.tensor([[0.3, 0.4]]).double()

    proximal_step_([layer], 1.0)

    torch.testing.assert_close(layer.down.data, torch.tensor([[2.4, 0.0, 3.2]]).double())
    assert torch.equal(layer.up.data, torch.zeros(1, 2).double())


def test_zeros_are_exact_and_last_and_stay() -> None:
    found = layers()
    for layer in found:
        layer.up.data[:1] *= 9
        layer.down.data[:1] *= 9

    proximal_step_(found, 0.7)
    first = [importance(layer) for layer in found]
    proximal_step_(found, 0.01)

    for layer, before in zip(found, first, strict=True):
        zeros = before == 0
        assert zeros.any()
        assert not zeros.all()
        assert torch.equal(zeros.sort().values, zeros), "a rank is zero before one that is not"
        assert (importance(layer)[zeros] == 0).all()
        assert layer.down.isfinite().all()


def test_no_weight_and_no_rank_change_nothing() -> None:
    found = [*layers(), LowRankLinear(3, 2, 0).double()]
    before = [factor.detach().clone() for factor in factors(found)]

    proximal_step_(found, 0.0)
    proximal_step_([found[-1]], 1.0)

    assert all(torch.equal(a, b) for a, b in zip(factors(found), before, strict=True))


def test_with_momentum_it_rests_where_the_sum_of_loss_and_lasso_is_least() -> None:
    """Without data in the way: ½ a (w − 1)² + λ |w| is least at 1 − λ / a."""
    layer = LowRankLinear(1, 1, 1, bias=False).double()
    layer.down.data.fill_(0.5)
    layer.up.data.fill_(0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)

    for _ in range(2_000):
        loss = 0.5 * ((layer.down - 1).square().sum() + 2 * (layer.up - 1).square().sum())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        proximal_step_([layer], 0.3 * 0.05 / (1 - 0.9))

    assert layer.down.item() == pytest.approx(0.7, abs=1e-6)
    assert layer.up.item() == pytest.approx(1 - 0.3 / 2, abs=1e-6)


def test_frozen_factors_stay_as_they_are() -> None:
    frozen, trained = layers()
    frozen.requires_grad_(False)
    before = [factor.detach().clone() for factor in factors([frozen, trained])]

    proximal_step_([frozen, trained], 0.2)

    after = factors([frozen, trained])
    assert all(torch.equal(a, b) for a, b in zip(after[:2], before[:2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after[2:], before[2:], strict=True))
