"""Attention in low-rank maps against torch's own."""

import pytest
import torch
from torch import Tensor, nn

from maestro_core.attention import LowRankAttention

ATTENTIONS = [
    pytest.param(nn.MultiheadAttention(12, 3), id="time first"),
    pytest.param(nn.MultiheadAttention(12, 4, bias=False, batch_first=True), id="no bias"),
    pytest.param(nn.MultiheadAttention(12, 2, kdim=7, vdim=5, batch_first=True), id="other widths"),
]


@pytest.mark.parametrize("dense", ATTENTIONS)
@pytest.mark.parametrize("average", [True, False])
def test_attention_at_full_rank_is_the_dense_one(
    dense: nn.MultiheadAttention, average: bool
) -> None:
    dense.eval()
    layer = LowRankAttention.from_dense(dense)
    q, k, v = torch.randn(4, 6, 12), torch.randn(4, 9, dense.kdim), torch.randn(4, 9, dense.vdim)
    if not dense.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.arange(9).expand(4, 9) >= torch.tensor([[9], [4], [6], [1]])
    masks: list[Tensor | None] = [
        None,
        torch.ones(6, 9).triu(1).bool(),
        torch.randn(4 * dense.num_heads, 6, 9),
    ]

    for mask in masks:
        # A mask that is added is of one kind with the other one.
        hidden = padding if mask is None or mask.dtype == torch.bool else padding * -1e9
        given = {"key_padding_mask": hidden, "attn_mask": mask, "average_attn_weights": average}
        for ours, theirs in zip(layer(q, k, v, **given), dense(q, k, v, **given), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert layer(q, k, v, need_weights=False)[1] is None


def test_attention_takes_a_sample_without_a_batch() -> None:
    dense = nn.MultiheadAttention(12, 3).eval()
    x = torch.randn(5, 12)

    found, expected = LowRankAttention.from_dense(dense)(x, x, x), dense(x, x, x)

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_each_map_of_attention_is_one_matrix_for_all_heads() -> None:
    layer = LowRankAttention.from_dense(nn.MultiheadAttention(12, 3))

    assert [child.rank for child in (layer.query, layer.key, layer.value, layer.output)] == [12] * 4


@pytest.mark.parametrize(
    "dense",
    [
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        nn.MultiheadAttention(4, 2, add_zero_attn=True),
    ],
)
def test_attention_with_a_key_of_its_own_is_refused(dense: nn.MultiheadAttention) -> None:
    with pytest.raises(ValueError, match="a key and a value"):
        LowRankAttention.from_dense(dense)


def test_a_query_that_may_attend_to_nothing_finds_zeros_as_in_torch() -> None:
    dense = nn.MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 5, 12, requires_grad=True)
    causal = torch.ones(5, 5).triu(1).bool()
    left = torch.tensor([[True, True, False, False, False], [False] * 5])  # padded on the left
    given = {"attn_mask": causal, "key_padding_mask": left, "need_weights": False}

    found, _ = LowRankAttention.from_dense(dense)(x, x, x, **given)
    torch.autograd.backward(found.sum())

    torch.testing.assert_close(found, dense(x, x, x, **given)[0], rtol=0, atol=1e-5)
    assert x.grad is not None
    assert x.grad.isfinite().all()
