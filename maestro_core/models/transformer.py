"""A transformer from sentence to sentence (Vaswani et al., 2017), normalised before each part.

One table embeds both languages and projects to the vocabulary. Attention has no biases and feed-
forward layers do, as in Pufferfish's: base size (width 512, 6 + 6 layers) is 44.1 M parameters and
the table. Normalisation comes before each part and not after it, so that it trains without a
warm-up of many epochs.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Queries of one sequence to the keys and values of another; each map is one whole matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Return (b, t, d) for x (b, t, d) and memory (b, s, d).

        `mask` (b, s) is True where memory may be seen; with None a place sees none after it.
        """
        q, k, v = (
            layer(of).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, heads, t or s, d')
            for layer, of in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        seen = None if mask is None else mask[:, None, None, :]  # (b, 1, 1, s)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=mask is None)
        return cast(Tensor, self.output(y.transpose(1, 2).flatten(2)))


class FeedForward(nn.Sequential):
    """Two linear layers and a ReLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


class EncoderLayer(nn.Module):
    """Attention to itself and a feed-forward part, each added to what it reads."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (b, s, d) for x (b, s, d); `mask` (b, s) is True where there is a token."""
        h = self.norm1(x)
        x = x + self.dropout(self.attention(h, h, mask))
        return cast(Tensor, x + self.dropout(self.feed_forward(self.norm2(x))))


class DecoderLayer(nn.Module):
    """Attention to what came before, to the source, and a feed-forward part, each added."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return (b, t, d) for x (b, t, d), memory (b, s, d) and its mask (b, s)."""
        h = self.norm1(x)
        x = x + self.dropout(self.attention(h, h, None))
        x = x + self.dropout(self.cross(self.norm2(x), memory, mask))
        return cast(Tensor, x + self.dropout(self.feed_forward(self.norm3(x))))


class Transformer(nn.Module):
    """An encoder of the source and a decoder that says, at each token, what the next one is.

    `pad` is the token that fills sentences up; the encoder's is seen by no other, and the decoder's
    comes last, where nothing before it looks.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 512,
        layers: int = 6,
        heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.1,
        pad: int = 0,
    ) -> None:
        super().__init__()
        self.pad = pad
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(
            EncoderLayer(width, heads, hidden, dropout) for _ in range(layers)
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(
            DecoderLayer(width, heads, hidden, dropout) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # logits begin with variance 1
        for layer in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Return logits (b, t, vocabulary) for source (b, s) and target (b, t), tokens int64."""
        source, target = pair
        mask = source != self.pad
        x = self._embedded(source)
        for layer in self.encoder:
            x = layer(x, mask)
        memory = self.encoder_norm(x)  # (b, s, d)
        y = self._embedded(target)
        for layer in self.decoder:
            y = layer(y, memory, mask)
        return cast(Tensor, self.head(self.decoder_norm(y)))

    def _embedded(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # (b, t, d)
        x = x * x.shape[-1] ** 0.5 + positions(x.shape[1], x.shape[2]).to(x)
        return cast(Tensor, self.dropout(x))


def positions(length: int, width: int) -> Tensor:
    """Return (length, width), sines and cosines of each place (Vaswani et al., 2017, §3.5)."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]
