"""Layers that several networks of this folder share.

An exported file holds those that its network needs, so that it depends on nothing but PyTorch.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPS = 1e-6  # of layer norms
ACTIVATIONS = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "hard_swish": nn.Hardswish,
}


def mlp(dim: int) -> nn.Module:
    """Return a linear map to four times the width, exact GELU, and a linear map back."""
    layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
    return nn.Sequential(OrderedDict(layers))


class ClassAttention(nn.Module):
    """The class token's query against all tokens: [B, N, D] -> [B, 1, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        q, k, v = (f(t).unflatten(2, (self.heads, -1)).transpose(1, 2) for f, t in tokens)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Added(nn.Module):
    """x + fn(LN(x)); names as in lucidrains' vit-pytorch, whose two wrappers this is."""

    def __init__(self, dim: int, inner: nn.Module) -> None:
        super().__init__()
        self.fn = nn.ModuleDict({"norm": nn.LayerNorm(dim), "fn": inner})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn["fn"](self.fn["norm"](x))


class ScaledAttention(nn.Module):
    """Softmax attention of all tokens to all with logits times `scale`; q, k, v without bias."""

    def __init__(self, dim: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3 D] -> three of [B, heads, N, D / heads]
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Blocks of attention and MLP; call `one` for the block of a number."""

    def __init__(
        self, dim: int, depth: int, heads: int, hidden: int, activation: str, scale: float
    ) -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        self.layers = nn.ModuleList()
        for _ in range(depth):
            first, second = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
            parts = [first, act(), nn.Dropout(0.1), second, nn.Dropout(0.1)]
            mlp = nn.Sequential(OrderedDict(net=nn.Sequential(*parts)))
            attention = ScaledAttention(dim, heads, scale)
            self.layers.append(nn.Sequential(Added(dim, attention), Added(dim, mlp)))

    def one(self, number: int, x: Tensor) -> Tensor:
        """Apply block `number` to x [B, N, D]."""
        return self.layers[number](x)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(len(self.layers)):
            x = self.one(number, x)
        return x


def patches(images: Tensor, side: int) -> Tensor:
    """Return the pixels of each patch, channels last: [B, C, H, W] -> [B, N, side * side * C]."""
    x = images.unfold(2, side, side).unfold(3, side, side)  # [B, C, H', W', side, side]
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_stem(
    ins: int,
    widths: Sequence[int],
    strides: Sequence[int],
    kernels: Sequence[int] = (),
    project: int = 0,
) -> nn.Module:
    """Return convolution (3x3 if no `kernels` are given), layer norm, GELU for each width, 1x1 to
    `project`; named `stem`.
    """
    layers: list[nn.Module] = []
    for out, stride, k in zip(widths, strides, kernels or (3,) * len(widths), strict=True):
        conv = nn.Conv2d(ins, out, k, stride=stride, padding=k // 2)
        layers += [conv, ChannelNorm(out, eps=EPS), nn.GELU()]
        ins = out
    if project:
        layers.append(nn.Conv2d(ins, project, 1))
    return nn.Sequential(OrderedDict(stem=nn.Sequential(*layers)))


class Normalize(nn.Module):
    """(images - mean) / std for each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def normalized(
    net: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """Return the network behind its normalisation: the names `normalize.*` and `model.*`.

    Without a mean or a standard deviation it is returned as it is.
    """
    if mean is None or std is None:
        return net
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=net))
