"""ViTAE-S in PyTorch: convolutions parallel to attention, of several dilations where the map
shrinks.

Source: Xu et al. 2021 (arXiv 2106.03348), with the names of Annbless/ViTAE.
"""

import math

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    EPS,
    Mean,
    SelfAttention,
    conv,
    mlp,
    named,
)


def model(
    widths: tuple[int, ...] = (64, 64, 192),  # of the convolutions of the cells that shrink the map
    dims: tuple[int, ...] = (64, 64, 384),
    ratios: tuple[int, ...] = (4, 2, 2),
    kernels: tuple[int, ...] = (7, 3, 3),
    dilations: tuple[int, ...] = (4, 3, 2),
    depth: int = 14,  # of the cells after them; groups of their convolutions
    heads: int = 6,
    mlp_ratio: int = 3,
    groups: int = 96,
    activation: str = "gelu",  # for GELU, a name in ACTIVATIONS
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, ins, cells = ACTIVATIONS[activation], in_channels, []
    for width, dim, ratio, kernel, count in zip(
        widths, dims, ratios, kernels, dilations, strict=True
    ):
        pyramid = Pyramid(ins, width, ratio, kernel, count, act)
        attention = Performer(count * width, dim, act)
        cells.append(Reduction(beside(ins, width, dim, ratio), pyramid, attention))
        ins = dim
    blocks = [Normal(ins, heads, mlp_ratio * ins, groups, act) for _ in range(depth)]
    last = named(RC=named(PRM=pyramid), NC=nn.Sequential(*blocks))
    layers = nn.Sequential(*(named(RC=cell) for cell in cells[:-1]), last)
    return named(layers=layers, mean=Mean(), head=nn.Linear(ins, num_classes))


class Reduction(nn.Module):
    """Performer over what the pyramid sees, plus convolutions; x + MLP(LN(x))."""

    def __init__(self, beside: nn.Module, pyramid: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.PCM, self.PRM, self.attn = beside, pyramid, attention

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.PRM(x), self.PCM(x)
        return self.attn(y.flatten(2).mT, z.flatten(2).mT).mT.unflatten(2, z.shape[2:])


def beside(ins: int, width: int, dim: int, ratio: int) -> nn.Module:
    """Build three 3x3 convolutions that shrink the map by `ratio`."""
    steps = round(math.log2(ratio))
    first, second, third = (2 if i < steps else 1 for i in range(3))
    layers = [conv(ins, width, 3, first, bias=True), nn.SiLU()]
    layers += [conv(width, width, 3, second, bias=True), nn.BatchNorm2d(width), nn.SiLU()]
    return nn.Sequential(*layers, conv(width, dim, 3, third, bias=True), nn.SiLU())


class Pyramid(nn.Module):
    """Convolutions of dilation 1, 2, ... side by side, each activated."""

    def __init__(
        self, ins: int, width: int, ratio: int, kernel: int, dilations: int, act: type[nn.Module]
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for dilation in range(1, dilations + 1):
            padding = math.ceil(((kernel - 1) * dilation + 1 - ratio) / 2)
            dilated = nn.Conv2d(ins, width, kernel, ratio, padding, dilation)
            self.convs.append(nn.Sequential(dilated, act()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.convs], 1)


class Performer(nn.Module):
    """Attention through fixed positive random features, parallel to convolutions, then the MLP."""

    def __init__(self, ins: int, dim: int, act: type[nn.Module]) -> None:
        super().__init__()
        count = dim // 2
        w = nn.init.orthogonal_(torch.empty(count, dim)) * math.sqrt(count)
        self.w = nn.Parameter(w, requires_grad=False)
        self.kqv, self.proj = nn.Linear(ins, 3 * dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(ins), nn.LayerNorm(dim)
        linears = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(linears[0], act(), linears[1], nn.Dropout(0.1))
        self.dropout = nn.Dropout(0.1)

    def features(self, x: Tensor) -> Tensor:
        """Compute exp(w.x - |x|^2 / 2) / sqrt(m)."""
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

    def __init__(self, dim: int, heads: int, wide: int, groups: int, act: type[nn.Module]) -> None:
        super().__init__()
        qkv, proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = SelfAttention(heads, qkv=qkv, proj=proj)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim, wide, act)
        convs = [conv(a, b, groups=groups, bias=True) for a, b in ((dim, wide), (wide, dim))]
        layers = [convs[0], nn.BatchNorm2d(wide), nn.SiLU(), convs[1], nn.BatchNorm2d(dim)]
        last = conv(dim, dim, groups=groups, bias=True)
        self.PCM = nn.Sequential(*layers, nn.SiLU(), last, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).mT
        y = y + self.attn(self.norm1(y)) + self.PCM(x).flatten(2).mT
        return (y + self.mlp(self.norm2(y))).mT.unflatten(2, x.shape[2:])
