"""One layer at a rank, against the dense layer and against sums of its components."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_core.layers import (
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLinear,
)

CONVOLUTIONS = [
    pytest.param(nn.Conv2d(6, 16, 5, stride=2), id="stride"),
    pytest.param(nn.Conv2d(3, 4, (1, 3), padding=(0, 1), bias=False), id="oblong"),
    pytest.param(nn.Conv2d(4, 8, 3, padding=2, dilation=2), id="dilation"),
    pytest.param(nn.Conv2d(4, 8, 5, padding="same"), id="same"),
    pytest.param(nn.Conv2d(4, 8, 3, padding="valid"), id="valid"),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (5, 7, 12)])
def test_linear_at_full_rank_is_the_dense_layer(bias: bool, shape: tuple[int, ...]) -> None:
    dense = nn.Linear(12, 30, bias=bias)
    x = torch.randn(shape)

    torch.testing.assert_close(LowRankLinear.from_dense(dense)(x), dense(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dense", CONVOLUTIONS)
def test_convolution_at_full_rank_is_the_dense_layer(dense: nn.Conv2d) -> None:
    x = torch.randn(2, dense.in_channels, 13, 15)

    y = LowRankConv2d.from_dense(dense)(x)

    torch.testing.assert_close(y, dense(x), rtol=0, atol=1e-5)


def test_embedding_at_full_rank_is_the_dense_table() -> None:
    dense = nn.Embedding(50, 12, padding_idx=3)
    tokens = torch.randint(50, (4, 7))
    tokens[0, 0] = 3

    torch.testing.assert_close(
        LowRankEmbedding.from_dense(dense)(tokens), dense(tokens), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("rank", range(7))
def test_embedding_and_tied_projection_at_a_rank_are_one_explicit_matrix(rank: int) -> None:
    embedding = LowRankEmbedding(20, 6, 6).double()
    dense = nn.Linear(6, 20).double()
    projection = LowRankLinear.tied(dense, embedding)
    table = sum(
        (torch.outer(embedding.down[i], embedding.up[i]) for i in range(rank)),
        torch.zeros(20, 6).double(),
    )
    tokens, x = torch.randint(20, (3, 5)), torch.randn(3, 5, 6).double()

    torch.testing.assert_close(embedding(tokens, rank), table[tokens])
    torch.testing.assert_close(projection(x, rank), F.linear(x, table, dense.bias))


def test_a_padding_row_is_not_trained_by_lookups() -> None:
    layer = LowRankEmbedding(9, 6, 4, padding_idx=2)

    layer(torch.arange(9)).square().sum().backward()

    assert layer.down.grad is not None
    trained = layer.down.grad.abs().sum(0) > 0
    assert trained.tolist() == [i != 2 for i in range(9)]


@pytest.mark.parametrize(
    ("dense", "reason"),
    [
        (nn.Embedding(4, 2, max_norm=1.0), "max_norm"),
        (nn.Embedding(4, 2, sparse=True), "sparse"),
    ],
)
def test_tables_that_change_when_they_are_read_are_refused(
    dense: nn.Embedding, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        LowRankEmbedding.from_dense(dense)


@pytest.mark.parametrize("rank", range(26))
def test_linear_at_a_rank_is_the_sum_of_its_first_components(rank: int) -> None:
    # 25 is the first width at which a rank kept as a fraction comes back one too large.
    layer = LowRankLinear(25, 31, 25).double()
    x = torch.randn(3, 25, dtype=torch.float64)
    matrix = sum(
        (torch.outer(layer.up[i], layer.down[i]) for i in range(rank)), torch.zeros(31, 25).double()
    )

    torch.testing.assert_close(layer(x, rank), F.linear(x, matrix, layer.bias))


@pytest.mark.parametrize("rank", range(5))
@pytest.mark.parametrize("dense", CONVOLUTIONS[:3])
def test_convolution_at_a_rank_is_the_sum_of_its_first_components(
    dense: nn.Conv2d, rank: int
) -> None:
    layer = LowRankConv2d.from_dense(dense)
    layer.up.data *= 3  # not an SVD any more
    kernel = torch.einsum("ro,rikl->oikl", layer.up[:rank], layer.down[:rank])
    x = torch.randn(2, dense.in_channels, 13, 15)

    expected = F.conv2d(x, kernel, dense.bias, dense.stride, layer.padding, dense.dilation)
    assert layer(x, rank).shape == expected.shape
    torch.testing.assert_close(layer(x, rank), expected, rtol=1e-4, atol=1e-5)


def test_truncation_of_a_new_layer_is_the_best_of_its_rank() -> None:
    dense = nn.Linear(9, 7, bias=False)
    layer = LowRankLinear.from_dense(dense)
    p, s, qt = torch.linalg.svd(dense.weight.detach())

    for rank in range(8):
        best = (p[:, :rank] * s[:rank]) @ qt[:rank]
        torch.testing.assert_close(layer(torch.eye(9), rank).T, best, rtol=0, atol=1e-5)


def test_gradients_at_a_rank_reach_that_prefix_alone() -> None:
    for layer, x in (
        (LowRankLinear(6, 5, 4), torch.randn(3, 6)),
        (LowRankConv2d(2, 5, (3, 3), 4), torch.randn(3, 2, 6, 6)),
    ):
        layer(x, 2).square().sum().backward()

        for factor in (layer.down, layer.up):
            assert factor.grad is not None
            assert factor.grad[:2].abs().min() > 0
            assert factor.grad[2:].abs().max() == 0


@pytest.mark.parametrize("layer", [LowRankLinear(6, 5, 4), LowRankConv2d(6, 5, (2, 2), 4)])
def test_rank_zero_is_the_bias_and_can_be_trained(layer: LowRankLinear | LowRankConv2d) -> None:
    x = torch.randn(3, 6) if isinstance(layer, LowRankLinear) else torch.randn(3, 6, 4, 4)
    assert layer.bias is not None
    layer.bias.data.normal_()

    y = layer(x, 0)
    y.sum().backward()

    assert y.shape == layer(x).shape
    expected = layer.bias.view(1, -1, *[1] * (y.dim() - 2)).expand_as(y)
    torch.testing.assert_close(y, expected)
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, torch.full((5,), y.numel() / 5))


def test_a_convolution_at_rank_zero_keeps_its_size_without_a_bias() -> None:
    layer = LowRankConv2d(6, 5, (3, 3), 4, stride=(2, 2), bias=False)

    assert torch.equal(layer(torch.randn(3, 6, 9, 7), 0), torch.zeros(3, 5, 4, 3))


@pytest.mark.parametrize("rank", [-1, 5])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"ranks 0\.\.4, not {rank}"):
        LowRankLinear(6, 5, 4)(torch.randn(1, 6), rank)


@pytest.mark.parametrize(
    ("dense", "reason"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(4, 8, 2, padding="same"), "padding='same'"),
    ],
)
def test_a_convolution_that_two_factors_cannot_do_is_refused(dense: nn.Conv2d, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LowRankConv2d.from_dense(dense)


def test_a_dense_layer_of_zeros_gives_finite_factors() -> None:
    dense = nn.Linear(4, 3)
    nn.init.zeros_(dense.weight)

    layer = LowRankLinear.from_dense(dense)

    assert torch.equal(layer(torch.ones(1, 4)), dense.bias.detach()[None])


def test_factors_share_nothing_with_the_dense_layer() -> None:
    dense = nn.Linear(4, 3)
    layer = LowRankLinear.from_dense(dense)
    x: Tensor = torch.ones(1, 4)
    before = layer(x).clone()

    nn.init.zeros_(dense.weight)
    nn.init.zeros_(dense.bias)

    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("rank", [3, 6, 10])
def test_a_large_batch_is_computed_as_its_parts_are(rank: int) -> None:
    """Above the break-even rank a large batch multiplies the factors first, a small one doesn't."""
    linear, x = LowRankLinear(12, 10, 10).double(), torch.randn(64, 12).double()
    conv, images = LowRankConv2d(3, 10, (2, 2), 10).double(), torch.randn(64, 3, 3, 3).double()

    torch.testing.assert_close(
        linear(x, rank), torch.cat([linear(row, rank) for row in torch.split(x, 1)])
    )
    parts = [conv(image, rank) for image in torch.split(images, 1)]
    torch.testing.assert_close(conv(images, rank), torch.cat(parts))
