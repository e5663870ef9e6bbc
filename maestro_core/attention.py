"""Attention whose four maps are low-rank layers; how those compute at a rank is layers.py's."""

from math import sqrt
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_core.layers import LowRankLinear, why_dense


class LowRankAttention(nn.Module):
    """nn.MultiheadAttention with its query, key, value and output maps as four low-rank layers.

    Each map is one matrix for all heads together, with a rank of its own (Maestro, ICML 2024, §3).
    """

    def __init__(
        self,
        query: LowRankLinear,
        key: LowRankLinear,
        value: LowRankLinear,
        output: LowRankLinear,
        heads: int,
        dropout: float,
        batch_first: bool,
    ) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.value = value
        self.output = output
        self.heads = heads
        self.dropout = dropout
        self.batch_first = batch_first

    @classmethod
    def from_dense(cls, dense: nn.MultiheadAttention) -> Self:
        """Return the attention of full rank that computes what `dense` does; nothing is shared.

        Raises:
            ValueError: `dense` adds a key and a value of its own.
        """
        reason = why_dense(dense)
        if reason:
            raise ValueError(f"this attention has {reason}")
        if dense.in_proj_weight is None:  # keys or values of another width
            weights = (dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight)
        else:
            weights = dense.in_proj_weight.chunk(3)
        biases = (None,) * 3 if dense.in_proj_bias is None else dense.in_proj_bias.chunk(3)
        trained = all(parameter.requires_grad for parameter in dense.parameters(recurse=False))
        query, key, value = (
            LowRankLinear.from_dense(_linear(weight, bias, trained))
            for weight, bias in zip(weights, biases, strict=True)
        )
        output = LowRankLinear.from_dense(dense.out_proj)
        attention = cls(
            query, key, value, output, dense.num_heads, dense.dropout, dense.batch_first
        )
        return attention.train(dense.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002  a hint about attn_mask, which is applied anyway
    ) -> tuple[Tensor, Tensor | None]:
        """Return what nn.MultiheadAttention does: (b, t, d), or as `batch_first` says, and weights.

        The weights are (b, t, s), or (b, heads, t, s) where they are not averaged, or None.
        A mask is True where nothing may be attended to, or is added. A query that may attend to
        nothing finds zeros, or with weights NaN. Samples without a batch around them are taken too.
        """
        single = query.dim() == 2
        batch = 0 if self.batch_first or single else 1
        q, k, v = (
            self._split(layer(x.unsqueeze(0) if single else x.movedim(batch, 0)))
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        scores = q @ k.transpose(-1, -2) / sqrt(q.shape[-1])  # (b, heads, t, s)
        if attn_mask is not None:
            shape = scores.shape if attn_mask.dim() == 3 else attn_mask.shape
            scores = _masked(scores, attn_mask.view(shape))
        if key_padding_mask is not None:
            # Not len(): it would fix the size of the batch in an exported graph.
            scores = _masked(scores, key_padding_mask.view(scores.shape[0], 1, 1, -1))
        if need_weights or (attn_mask is None and key_padding_mask is None):
            weights = scores.softmax(-1)
        else:
            weights = _softmax_or_zeros(scores)
        weights = F.dropout(weights, self.dropout, self.training)
        y = self.output((weights @ v).transpose(1, 2).flatten(2))  # (b, t, d)
        shown = weights.mean(1) if average_attn_weights else weights
        if single:
            return y[0], shown[0] if need_weights else None
        return y.movedim(0, batch), shown if need_weights else None

    def _split(self, x: Tensor) -> Tensor:
        x = x.view(*x.shape[:2], self.heads, -1)
        return x.transpose(1, 2)  # (b, t, d) -> (b, heads, t, d')

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), trained)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), trained)  # type: ignore[assignment]
    return layer


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _softmax_or_zeros(scores: Tensor) -> Tensor:
    """Return the softmax of scores (…, s), zeros where all are −∞; gradients are finite there."""
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
