"""Linear, convolution and embedding layers in two ordered factors, cut by a prefix view.

Knows how one layer computes at a rank. Which layers of a network to factorise is factorize.py's.
"""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOMAIN = "maestro"
OPSET = 1


class LowRankLinear(nn.Module):
    """A linear map `y = up[:r]ᵀ down[:r] x + bias` whose rank is chosen at each call.

    `down` is (rank, in), `up` is (rank, out): row-major in rank, so that a smaller rank is a
    contiguous prefix. The most important component comes first (Maestro, ICML 2024, §3).
    """

    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(rank, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        _init_(self.down, self.up)

    @classmethod
    def from_dense(cls, dense: nn.Linear) -> Self:
        """Return the layer of full rank that computes what `dense` does; nothing is shared."""
        layer = cls(dense.in_features, dense.out_features, 0, bias=dense.bias is not None)
        _take_factors_(layer, dense)
        return layer

    @classmethod
    def tied(cls, dense: nn.Linear, embedding: "LowRankEmbedding") -> Self:
        """Return `dense`, whose weight was the table of `embedding`, with the factors of that.

        They change places: y = down[:r]ᵀ up[:r] x of the embedding's own. They are the same
        parameters, so both are trained and cut together.
        """
        layer = cls(dense.in_features, dense.out_features, 0, bias=dense.bias is not None)
        layer.down, layer.up = embedding.up, embedding.down
        _take_rest_(layer, dense)
        return layer

    @property
    def rank(self) -> int:
        """Return how many components there are."""
        return self.down.shape[0]

    def forward(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return (…, out) for x (…, in) with the first `rank` components; None means all.

        Raises:
            ValueError: the rank is not in 0..self.rank.
        """
        if torch.onnx.is_in_onnx_export():
            return _symbolic("LowRankLinear", self, x, (*x.shape[:-1], self.out_features), {})
        down, up = prefix(self, rank)
        if _is_cheaper_whole(down, up, x.shape[:-1].numel()):
            return F.linear(x, up.t() @ down, self.bias)
        return F.linear(F.linear(x, down), up.t(), self.bias)  # (…, in) -> (…, r) -> (…, out)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class LowRankConv2d(nn.Module):
    """A convolution in two: `down` (rank, in, kh, kw), then the 1×1 `up` (rank, out) and the bias.

    The window (stride, padding, dilation) is the first one's. The matrix that is factorised is
    out × (in·kh·kw) (Maestro, ICML 2024, §3). Zero padding and one group only. `down` has its
    channels innermost in memory, as pictures have (data.py): kernels read it as it lies.
    """

    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        rank: int,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.down = nn.Parameter(_as_read(torch.empty(rank, in_channels, *kernel_size)))
        self.up = nn.Parameter(torch.empty(rank, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        _init_(self.down, self.up)

    @classmethod
    def from_dense(cls, dense: nn.Conv2d) -> Self:
        """Return the layer of full rank that computes what `dense` does; nothing is shared.

        Raises:
            ValueError: `dense` has groups, or padding that is not the same zeros on both sides.
        """
        reason = why_dense(dense)
        if reason:
            raise ValueError(f"this convolution has {reason}")
        layer = cls(
            dense.in_channels,
            dense.out_channels,
            _pair(dense.kernel_size),
            0,
            _pair(dense.stride),
            _padding(dense),
            _pair(dense.dilation),
            bias=dense.bias is not None,
        )
        _take_factors_(layer, dense)
        return layer

    @property
    def rank(self) -> int:
        """Return how many components there are."""
        return self.down.shape[0]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that come out of a picture of this height and width."""
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        (ph, pw), (dh, dw) = self.padding, self.dilation
        return (
            (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1,
            (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1,
        )

    def forward(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return (b, out, h', w') for x (b, in, h, w) with the first `rank` components.

        Raises:
            ValueError: the rank is not in 0..self.rank.
        """
        size = self.output_size(x.shape[-2], x.shape[-1])
        if torch.onnx.is_in_onnx_export():
            shape = (*x.shape[:-3], self.out_channels, *size)
            return _symbolic("LowRankConv2d", self, x, shape, self._window())
        down, up = prefix(self, rank)
        if down.shape[0] == 0:  # torch refuses a convolution to no channels
            y = torch.einsum("...rhw,ro->...ohw", x.new_empty(*x.shape[:-3], 0, *size), up)
            return y if self.bias is None else y + self.bias[:, None, None]
        if self.is_cheaper_whole(x, down, up):
            windows = down.permute(0, 2, 3, 1)  # (r, kh, kw, in)
            whole = (up.t() @ windows.flatten(1)).view(-1, *windows.shape[1:]).permute(0, 3, 1, 2)
            return F.conv2d(x, whole, self.bias, self.stride, self.padding, self.dilation)
        return self.expand(self.reduce(x, down), up)

    def reduce(self, x: Tensor, down: Tensor) -> Tensor:
        """Return what the first factor makes of x (b, in, h, w): (b, r, h', w')."""
        return F.conv2d(x, down, None, self.stride, self.padding, self.dilation)

    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        """Return what the second factor makes of h (b, r, h', w'): (b, out, h', w')."""
        return F.conv2d(h, up.t().contiguous()[:, :, None, None], self.bias)

    def is_cheaper_whole(self, x: Tensor, down: Tensor, up: Tensor) -> bool:
        """Return whether to multiply the factors first saves MACs, for this batch."""
        height, width = self.output_size(x.shape[-2], x.shape[-1])
        return _is_cheaper_whole(down, up, x.shape[:-3].numel() * height * width)

    def _window(self) -> dict[str, Sequence[int]]:
        """Return the attributes of ONNX's Conv; its pads are all the begins, then all the ends."""
        return {
            "strides": self.stride,
            "pads": (*self.padding, *self.padding),
            "dilations": self.dilation,
        }

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, rank={self.rank}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        )


class LowRankEmbedding(nn.Module):
    """A table of vectors, row i `up[:r]ᵀ down[:r, i]`, whose rank is chosen at each call.

    `down` is (rank, num_embeddings), `up` is (rank, embedding_dim). Unlike a dense table it costs
    MACs to look up, rank · embedding_dim; what it saves is parameters, and MACs in the projection
    tied to it (`LowRankLinear.tied`). Column `padding_idx` of `down` is not trained by lookups.
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.down = nn.Parameter(torch.empty(rank, num_embeddings))
        self.up = nn.Parameter(torch.empty(rank, embedding_dim))
        _init_(self.down, self.up)

    @classmethod
    def from_dense(cls, dense: nn.Embedding) -> Self:
        """Return the table of full rank that holds what `dense` does; nothing is shared.

        Raises:
            ValueError: `dense` changes its rows when they are read, or their gradients.
        """
        reason = why_dense(dense)
        if reason:
            raise ValueError(f"this embedding has {reason}")
        layer = cls(dense.num_embeddings, dense.embedding_dim, 0, dense.padding_idx)
        # The table is in × out, a linear layer's weight out × in: the factors change places.
        layer.up, layer.down = _factors(dense.weight)
        layer.train(dense.training)
        return layer

    @classmethod
    def tied(cls, dense: nn.Embedding, embedding: "LowRankEmbedding") -> Self:
        """Return `dense`, whose table was that of `embedding`, with the very same factors."""
        layer = cls(dense.num_embeddings, dense.embedding_dim, 0, dense.padding_idx)
        layer.down, layer.up = embedding.down, embedding.up
        layer.train(dense.training)
        return layer

    @property
    def rank(self) -> int:
        """Return how many components there are."""
        return self.down.shape[0]

    def forward(self, tokens: Tensor, rank: int | None = None) -> Tensor:
        """Return (…, embedding_dim) for tokens (…) int64 with the first `rank` components.

        Raises:
            ValueError: the rank is not in 0..self.rank.
        """
        down, up = prefix(self, rank)
        return F.embedding(tokens, down.t(), self.padding_idx) @ up  # (…) -> (…, r) -> (…, dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


LowRankLayer = LowRankLinear | LowRankConv2d | LowRankEmbedding


def prefix(layer: LowRankLayer, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return views of the first `rank` rows of `down` and `up`; None means all.

    Raises:
        ValueError: the rank is not in 0..layer.rank.
    """
    if rank is None:
        return layer.down, layer.up
    if not 0 <= rank <= layer.rank:
        raise ValueError(f"this layer has ranks 0..{layer.rank}, not {rank}")
    return layer.down[:rank], layer.up[:rank]


def why_dense(module: nn.Module) -> str:
    """Return why `module` can't be factorised, or an empty string."""
    if isinstance(module, nn.MultiheadAttention) and (
        module.bias_k is not None or module.add_zero_attn
    ):
        return "a key and a value of its own: only those of the inputs are factorised"
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    ):
        return "max_norm, scale_grad_by_freq or sparse: only plain tables are factorised"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"groups={module.groups}: only 1 is factorised"
        if module.padding_mode != "zeros":
            return f"padding_mode='{module.padding_mode}': only zeros is factorised"
        if module.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ):
            return "padding='same' of unequal sides"
    return ""


def _is_cheaper_whole(down: Tensor, up: Tensor, positions: int) -> bool:
    """Return whether multiplying the factors first saves MACs, over all positions of a batch.

    Above the rank at which dense is cheaper (accounting) a training step costs what a dense one
    does: ResNet-9, batch 64, one core of an AMD EPYC: 1.2 of it without, 1.0 with.
    """
    rank, fan_in, out = down.shape[0], down.shape[1:].numel(), up.shape[1]
    whole = out * fan_in
    return whole * (positions + rank) < rank * (out + fan_in) * positions


def _init_(down: Tensor, up: Tensor) -> None:
    for factor in (down, up):
        if factor.numel():
            bound = factor[0].numel() ** -0.5
            nn.init.uniform_(factor, -bound, bound)


def _take_factors_(layer: LowRankLinear | LowRankConv2d, dense: nn.Linear | nn.Conv2d) -> None:
    layer.down, layer.up = _factors(dense.weight)
    _take_rest_(layer, dense)


def _take_rest_(layer: LowRankLinear | LowRankConv2d, dense: nn.Linear | nn.Conv2d) -> None:
    """Give `layer` the bias and the mode of `dense`."""
    if dense.bias is not None:
        layer.bias = nn.Parameter(dense.bias.detach().clone(), dense.bias.requires_grad)
    layer.train(dense.training)


def _factors(weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Return √S Qᵀ (rank, in, …) and (P √S)ᵀ (rank, out) of W = P S Qᵀ, (out, in, …) (§3.2).

    Where S is 0, as in a layer that begins at zero, rows of the first are drawn, the same every
    time: were both factors zero, neither would have a gradient.
    """
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    p, s, qt = torch.linalg.svd(exact.flatten(1), full_matrices=False)
    root = s.sqrt()
    drawn = torch.randn(qt.shape, generator=torch.Generator().manual_seed(0), dtype=qt.dtype)
    drawn = drawn.to(qt.device) / qt.shape[1] ** 0.5
    rows = torch.where(s[:, None] > 0, root[:, None] * qt, drawn)
    down = rows.reshape(-1, *weight.shape[1:])
    first, second = (
        nn.Parameter(_as_read(factor.to(weight.dtype)), weight.requires_grad)
        for factor in (down, (p * root).t())
    )
    return first, second


def _as_read(factor: Tensor) -> Tensor:
    """Return a factor row-major in rank, and with channels innermost if it has positions."""
    innermost = torch.channels_last if factor.dim() == 4 else torch.contiguous_format
    return factor.contiguous(memory_format=innermost)


def _padding(dense: nn.Conv2d) -> tuple[int, int]:
    if dense.padding == "valid":
        return (0, 0)
    if isinstance(dense.padding, str):
        ((kh, kw), (dh, dw)) = dense.kernel_size, dense.dilation
        return (dh * (kh - 1) // 2, dw * (kw - 1) // 2)
    return _pair(dense.padding)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return (first, second)


def _symbolic(
    kind: str,
    layer: LowRankLinear | LowRankConv2d,
    x: Tensor,
    shape: Sequence[int | torch.SymInt],
    attributes: dict[str, Sequence[int]],
) -> Tensor:
    """Return the one node that stands for the layer in the template (graph.py expands it)."""
    inputs = (x, layer.down, layer.up, *(() if layer.bias is None else (layer.bias,)))
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}",
        inputs,
        attrs={name: list(values) for name, values in attributes.items()},
        dtype=x.dtype,
        shape=shape,
        version=OPSET,
    )
