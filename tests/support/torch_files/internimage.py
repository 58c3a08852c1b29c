"""InternImage in PyTorch alone: its deformable convolution samples by `grid_sample`.

Sources: Wang et al. 2022 (arXiv 2211.05778); with a PatchStem: Singh, Croce, Hein 2023 (arXiv
2303.01870), appendix C.3.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    EPS,
    ChannelNorm,
    ChannelsFirst,
    ChannelsLast,
    Mean,
    PixelConv,
    Residual,
    conv,
    mlp,
    named,
)

SIDE = 3  # of the grid of points


def model(
    depths: tuple[int, ...],  # blocks of each stage
    dims: tuple[int, ...],
    groups: tuple[int, ...],  # of channels that share their offsets
    stem_widths: tuple[int, ...] = (32, 64),  # of the ConvStem; empty: PatchStem
    stem_strides: tuple[int, ...] = (2, 2),
    stem_kernels: tuple[int, ...] = (),
    head_dim: int = 768,
    offset_scale: float = 1.0,
    gamma_init: float | None = None,  # of the layer scale; None without one
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    if stem_widths:
        embed = stem(in_channels, stem_widths, stem_strides, stem_kernels)
    else:
        (stride,) = stem_strides
        patches = nn.Conv2d(in_channels, dims[0], stride, stride=stride)
        embed = nn.Sequential(patches, second(ChannelNorm(dims[0], eps=EPS)))
    levels = []
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        blocks = [block(dim, groups[i], offset_scale, gamma_init) for _ in range(depth)]
        parts: dict[str, nn.Module] = {"blocks": nn.Sequential(*blocks)}
        parts["norm"] = nn.Sequential(nn.LayerNorm(dim, EPS))
        if i + 1 < len(dims):
            half = PixelConv(dim, dims[i + 1], SIDE, 2, 1, bias=False)
            norm = second(nn.LayerNorm(dims[i + 1], EPS))
            parts["downsample"] = named(conv=half, norm=norm)
        levels.append(named(**parts))
    features = nn.Sequential(
        nn.Conv2d(dims[-1], head_dim, 1, bias=False),
        nn.Sequential(nn.BatchNorm2d(head_dim)),
        nn.GELU(),
    )
    body = {"patch_embed": embed, "last": ChannelsLast(), "levels": nn.Sequential(*levels)}
    head = nn.Linear(head_dim, num_classes)
    return named(**body, first=ChannelsFirst(), conv_head=features, mean=Mean(), head=head)


def second(layer: nn.Module) -> nn.Module:
    """Give a layer the name 1, where the authors have a permutation before it."""
    return nn.Sequential(nn.Identity(), layer)


def stem(
    ins: int, widths: tuple[int, ...], strides: tuple[int, ...], kernels: tuple[int, ...]
) -> nn.Module:
    """Build convolutions with layer norms, and GELUs between."""
    layers: dict[str, nn.Module] = {}
    rows = zip(widths, strides, kernels or (3,) * len(widths), strict=True)
    for n, (out, stride, k) in enumerate(rows, 1):
        layers |= {f"act{n - 1}": nn.GELU()} if n > 1 else {}
        layers[f"conv{n}"] = conv(ins, out, k, stride, bias=True)
        layers[f"norm{n}"] = second(ChannelNorm(out, eps=EPS))
        ins = out
    return named(**layers)


def block(dim: int, groups: int, scale: float, gamma_init: float | None) -> nn.Module:
    """Build x + DCNv3(LN(x)), then x + MLP(LN(x)), of [B, H, W, C]."""
    parts = {"dcn": DeformableConv(dim, groups, scale), "mlp": mlp(dim)}
    branches = []
    for n, (name, layer) in enumerate(parts.items(), 1):
        branch: dict[str, Any] = {f"norm{n}": nn.Sequential(nn.LayerNorm(dim, EPS)), name: layer}
        if gamma_init is not None:
            branch[f"gamma{n}"] = torch.full((dim,), gamma_init)
        branches.append(branch)
    return Residual(*branches)


class DeformableConv(nn.Module):
    """A weighted sum of nine places of each pixel and group, which the input moves and weighs."""

    def __init__(self, dim: int, groups: int, scale: float) -> None:
        super().__init__()
        depthwise, norm = PixelConv(dim, dim, SIDE, padding=1, groups=dim), nn.LayerNorm(dim, EPS)
        self.dw_conv = nn.Sequential(depthwise, second(norm), nn.GELU())
        self.offset = nn.Linear(dim, groups * SIDE**2 * 2)
        self.mask = nn.Linear(dim, groups * SIDE**2)
        self.input_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.groups, self.scale = groups, scale
        for layer in (self.offset, self.mask):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        groups, around = self.groups, self.dw_conv(x)
        value = self.input_proj(x).permute(0, 3, 1, 2).unflatten(1, (groups, -1)).flatten(0, 1)
        offsets = self.offset(around).unflatten(3, (groups, SIDE**2, 2))
        offsets = offsets.permute(0, 3, 4, 1, 2, 5).flatten(0, 1)
        mask = self.mask(around).unflatten(3, (groups, SIDE**2)).softmax(4)
        mask = mask.permute(0, 3, 4, 1, 2).flatten(0, 1)
        out = deformed(value, offsets, mask, self.scale)
        return self.output_proj(out.unflatten(0, (-1, groups)).flatten(1, 2).permute(0, 2, 3, 1))


def deformed(value: Tensor, offsets: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Sum samples of [N, D, H, W] at nine places [N, 9, H, W, (x, y)], weighed by [N, 9, H, W].

    Of the points, whose columns are the outer index, one after the other is sampled.
    """
    size = torch.tensor(value.shape[:1:-1], dtype=value.dtype, device=value.device)
    rows, columns = (
        torch.arange(n, dtype=value.dtype, device=value.device) for n in value.shape[2:]
    )
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    total = torch.zeros_like(value)
    for point in range(SIDE**2):
        around = torch.tensor([point // SIDE - 1, point % SIDE - 1], dtype=value.dtype)
        at = pixels + scale * (around.to(value.device) + offsets[:, point])
        sampled = nn.functional.grid_sample(value, (2 * at + 1) / size - 1, align_corners=False)
        total = total + mask[:, point, None] * sampled
    return total
