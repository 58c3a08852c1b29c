"""ViTAE-S in PyTorch: convolutions beside attention, of several dilations where the map shrinks.

Source: Xu et al. 2021 (arXiv 2106.03348), with the names of Annbless/ViTAE. Parity:
tests/models/cifar/test_hybrids.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    widths: tuple[int, ...] = (64, 64, 192),
    dims: tuple[int, ...] = (64, 64, 384),
    ratios: tuple[int, ...] = (4, 2, 2),
    kernels: tuple[int, ...] = (7, 3, 3),
    dilations: tuple[int, ...] = (4, 3, 2),
    depth: int = 14,
    heads: int = 6,
    mlp_ratio: int = 3,
    groups: int = 96,
    activation: str = "gelu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      widths, dims, ratios, kernels, dilations: of the cells that shrink the map: channels of their
        convolutions, of their tokens, how far they shrink it, windows, and how many dilations.
      depth, heads, mlp_ratio, groups: of the cells behind them; groups of their convolutions.
      activation: for GELU, a name in ACTIVATIONS.
    """
    cells, ins, act = [], in_channels, ACTIVATIONS[activation]()
    for i, row in enumerate(zip(widths, dims, ratios, kernels, dilations, strict=True)):
        cells.append(Stage(Reduction(ins, *row, act, last=i == len(dims) - 1)))
        ins = dims[i]
    normal = [Normal(ins, heads, mlp_ratio * ins, groups, act) for _ in range(depth)]
    cells[-1].NC = nn.ModuleList(normal)
    return ViTAE(cells, ins, num_classes)


class ViTAE(nn.Module):
    """Stages, mean over the tokens, linear."""

    def __init__(self, stages: Sequence[nn.Module], dim: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*stages)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


class Stage(nn.Module):
    """A cell that shrinks the map, then cells that keep it; [B, C, H, W] throughout."""

    def __init__(self, reduction: nn.Module) -> None:
        super().__init__()
        self.RC = reduction
        self.NC = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        x = self.RC(x)
        for cell in self.NC:
            x = cell(x)
        return x


def tokens(x: Tensor) -> Tensor:
    """Turn [B, C, H, W] into [B, H * W, C]."""
    return x.flatten(2).mT


class Reduction(nn.Module):
    """Performer over what the pyramid sees, plus convolutions; x + MLP(LN(x)). Or the pyramid."""

    def __init__(
        self,
        ins: int,
        width: int,
        dim: int,
        ratio: int,
        kernel: int,
        dilations: int,
        act: nn.Module,
        *,
        last: bool,
    ) -> None:
        super().__init__()
        self.PCM = None if last else beside(ins, width, dim, ratio)
        self.PRM = Pyramid(ins, width, ratio, kernel, dilations, act)
        self.attn = None if last else Performer(dilations * width, dim, act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.PRM(x)
        if self.PCM is None or self.attn is None:
            return y
        z = self.PCM(x)
        return self.attn(tokens(y), tokens(z)).mT.unflatten(2, z.shape[2:])


def beside(ins: int, width: int, dim: int, ratio: int) -> nn.Module:
    """Return three 3x3 convolutions that shrink the map by `ratio`."""
    steps = round(math.log2(ratio))
    first, second, third = (2 if i < steps else 1 for i in range(3))
    return nn.Sequential(
        nn.Conv2d(ins, width, 3, first, 1),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, second, 1),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        nn.Conv2d(width, dim, 3, third, 1),
        nn.SiLU(),
    )


class Pyramid(nn.Module):
    """Convolutions of dilation 1, 2, ... side by side, each activated."""

    def __init__(
        self, ins: int, width: int, ratio: int, kernel: int, dilations: int, act: nn.Module
    ) -> None:
        super().__init__()
        convs = []
        for dilation in range(1, dilations + 1):
            padding = math.ceil(((kernel - 1) * dilation + 1 - ratio) / 2)
            conv = nn.Conv2d(ins, width, kernel, ratio, padding, dilation)
            convs.append(nn.Sequential(conv, act))
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], 1)


class Performer(nn.Module):
    """Attention through fixed positive random features, beside convolutions, then the MLP."""

    def __init__(self, ins: int, dim: int, act: nn.Module) -> None:
        super().__init__()
        count = dim // 2
        w = nn.init.orthogonal_(torch.empty(count, dim)) * math.sqrt(count)
        self.w = nn.Parameter(w, requires_grad=False)
        self.kqv, self.proj = nn.Linear(ins, 3 * dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(ins), nn.LayerNorm(dim)
        linears = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(linears[0], act, linears[1], nn.Dropout(0.1))
        self.dropout = nn.Dropout(0.1)

    def features(self, x: Tensor) -> Tensor:
        """Return exp(w.x - |x|^2 / 2) / sqrt(m)."""
        half = x.square().sum(-1, keepdim=True) / 2
        return (x @ self.w.T - half).exp() / math.sqrt(len(self.w))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, -1)
        keys, queries = self.features(k), self.features(q)
        total = queries @ keys.sum(1).unsqueeze(2)
        attended = queries @ (keys.mT @ v) / (total + 1e-8)
        x = v + self.dropout(self.proj(attended)) + z
        return x + self.mlp(self.norm2(x))


class Normal(nn.Module):
    """x + attention(LN(x)) + three grouped 3x3 convolutions of x, then x + MLP(LN(x))."""

    def __init__(self, dim: int, heads: int, wide: int, groups: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        linears = {"fc1": nn.Linear(dim, wide), "fc2": nn.Linear(wide, dim)}
        self.mlp = nn.ModuleDict(linears)
        self.PCM = nn.Sequential(
            nn.Conv2d(dim, wide, 3, padding=1, groups=groups),
            nn.BatchNorm2d(wide),
            nn.SiLU(),
            nn.Conv2d(wide, dim, 3, padding=1, groups=groups),
            nn.BatchNorm2d(dim),
            nn.SiLU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=groups),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = tokens(x)
        y = y + self.attn(self.norm1(y)) + tokens(self.PCM(x))
        hidden = self.act(self.mlp["fc1"](self.norm2(y)))
        return (y + self.mlp["fc2"](hidden)).mT.unflatten(2, x.shape[2:])


class Attention(nn.Module):
    """Softmax attention of all tokens to all, scaled by the root of the head's width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3 D] -> three of [B, heads, N, D / heads]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))
