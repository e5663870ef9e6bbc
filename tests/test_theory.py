"""Linear networks, where the method's result is known in closed form (Maestro, §4).

With white data the best ordered factors are the truncated SVD; with y = x, the PCA.
"""

from random import Random

import pytest
import torch
from torch import Tensor

from maestro_core.layers import LowRankLinear
from maestro_core.lod import group_lasso, importance, sample

EYE = torch.eye(10, dtype=torch.float64)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected).norm() / expected.norm())


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    q: Tensor = torch.linalg.qr(draw).Q
    return q


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_every_prefix_of_a_linear_network_is_the_truncated_svd(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = orthonormal(9, 3, generator), orthonormal(6, 3, generator)
    s = torch.tensor([9.0, 6.0, 4.0], dtype=torch.float64)
    target = (p * s) @ q.t()  # y = x target, rank 3
    torch.manual_seed(seed)
    layer = LowRankLinear(9, 6, 6, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    rng = Random(seed)

    for _ in range(10_000):
        _, rank = sample([layer.rank], rng)
        optimizer.zero_grad()
        torch.autograd.backward((layer(EYE[:9, :9], rank) - target).square().mean())
        optimizer.step()

    for rank in range(1, 7):
        best = (p[:, :rank] * s[:rank]) @ q[:, :rank].t()
        assert relative_error(layer(EYE[:9, :9], rank), best) <= 5e-3


@pytest.mark.slow
def test_it_is_the_truncated_svd_on_samples_of_a_ball_too() -> None:
    """Data are drawn as ranks are (T2): x is uniform in a ball, scaled so that E xxᵀ = I."""
    generator = torch.Generator().manual_seed(0)
    p, q = orthonormal(9, 3, generator), orthonormal(6, 3, generator)
    s = torch.tensor([9.0, 6.0, 4.0], dtype=torch.float64)
    target = (p * s) @ q.t()
    torch.manual_seed(0)
    layer = LowRankLinear(9, 6, 6, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.03)
    falling = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3_000, 4_500])
    rng = Random(0)

    for _ in range(6_000):
        way = torch.randn(256, 9, generator=generator, dtype=torch.float64)
        radius = torch.rand(256, 1, generator=generator, dtype=torch.float64) ** (1 / 9)
        x = 11**0.5 * radius * way / way.norm(dim=1, keepdim=True)
        _, rank = sample([layer.rank], rng)
        optimizer.zero_grad()
        torch.autograd.backward((layer(x, rank) - x @ target).square().mean())
        optimizer.step()
        falling.step()

    for rank in range(1, 7):
        best = (p[:, :rank] * s[:rank]) @ q[:, :rank].t()
        assert relative_error(layer(EYE[:9, :9], rank), best) <= 2e-2


@pytest.mark.slow
def test_data_puts_ranks_in_another_order_than_singular_values() -> None:
    """Inputs along the smallest singular value are the largest (T4): it comes first."""
    generator = torch.Generator().manual_seed(0)
    axes, q = orthonormal(9, 9, generator), orthonormal(6, 3, generator)
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    energies = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    target = (axes[:, :3] * s) @ q.t()
    scale = torch.cat([energies / s, torch.ones(6, dtype=torch.float64)])
    x = scale[:, None] * axes.t()  # x target has rows of these energies, then zeros
    torch.manual_seed(0)
    layer = LowRankLinear(9, 6, 6, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    rng = Random(0)

    for _ in range(10_000):
        _, rank = sample([layer.rank], rng)
        optimizer.zero_grad()
        torch.autograd.backward((layer(x, rank) - x @ target).square().mean())
        optimizer.step()

    norms = (layer.up.norm(dim=1) * layer.down.norm(dim=1)).tolist()
    assert norms[:3] == pytest.approx([1.0, 2.0, 3.0], rel=0.02)
    assert max(norms[3:]) < 0.05
    for rank in range(1, 4):
        ours = q[:, 3 - rank :]
        best = target @ ours @ ours.t()
        assert relative_error(layer(EYE[:9, :9], rank), best) <= 2e-2


def autoencoder(
    seed: int, hierarchical: bool, steps: int = 2_500, until: int = 2_500
) -> tuple[LowRankLinear, Tensor]:
    """Train 10→10 on three points with lasso 1e-2; return it and their principal axes (3, 10).

    From step `until` on there are two points.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    layer = LowRankLinear(10, 10, 10, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rng = Random(seed)
    for step in range(steps):
        if step == until:
            x = x[:2]
        _, rank = sample([layer.rank], rng)
        plain = layer.down.norm(dim=1).sum() + layer.up.norm(dim=1).sum()
        lasso = group_lasso([layer]) if hierarchical else plain
        whole, cut = (layer(x) - x).square().mean(), (layer(x, rank) - x).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(whole + cut + 1e-2 * lasso)
        optimizer.step()
    return layer, torch.linalg.svd(x).Vh[: len(x)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_linear_autoencoder_is_the_pca(seed: int) -> None:
    layer, axes = autoencoder(seed, hierarchical=False)

    norms = layer.up.norm(dim=1) * layer.down.norm(dim=1)
    assert ((norms[:3] > 0.96) & (norms[:3] < 1.01)).all()
    assert norms[3:].max() < 6e-7
    assert relative_error(layer(EYE, 3), axes.t() @ axes) <= 0.05
    assert relative_error(layer(EYE, 1), axes[:1].t() @ axes[:1]) <= 0.05


@pytest.mark.slow
def test_a_rank_that_the_data_no_longer_needs_decays() -> None:
    """The paper's Fig. 7 (T3b)."""
    before, _ = autoencoder(0, hierarchical=False, steps=1_200)
    after, axes = autoencoder(0, hierarchical=False, steps=6_000, until=1_200)

    assert (before.up[2].norm() * before.down[2].norm()) > 0.9
    assert importance(after)[2] < 1e-5
    assert (after.up[:2].norm(dim=1) * after.down[:2].norm(dim=1)).min() > 0.9
    assert relative_error(after(EYE, 2), axes.t() @ axes) <= 0.05


@pytest.mark.slow
def test_the_hierarchical_lasso_finds_the_rank_of_the_data() -> None:
    layer, axes = autoencoder(0, hierarchical=True)

    values = importance(layer)
    assert values[2] > 0.9
    assert values[3] < 2e-5
    assert relative_error(layer(EYE, 3), axes.t() @ axes) <= 0.1
