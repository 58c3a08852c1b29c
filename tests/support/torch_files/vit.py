"""Vision transformer with PatchStem or ConvStem in PyTorch.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929); Touvron et al. 2022 (DeiT III, arXiv
2204.07118); stem: Singh, Croce, Hein 2023 (arXiv 2303.01870).
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    EPS,
    Residual,
    SelfAttention,
    Tokens,
    WithClassToken,
    conv_stem,
    mlp,
    named,
)


def model(
    dim: int,  # width
    depth: int,
    heads: int,
    stem_widths: tuple[int, ...] = (),  # of the ConvStem; empty: PatchStem
    stem_strides: tuple[int, ...] = (16,),
    stem_kernels: tuple[int, ...] = (),
    class_position: bool = True,  # the class token has a position too (DeiT III: it has none)
    gamma_init: float | None = None,  # of the layer scale; None without one
    image_size: int = 224,  # side in pixels; the number of positions follows from it
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    side = image_size
    for stride in stem_strides:
        side = -(-side // stride) if stem_widths else side // stride
    stem = conv_stem(in_channels, stem_widths, stem_strides, stem_kernels, dim)
    embed: dict[str, nn.Module] = {"patch_embed": named(proj=stem), "tokens": Tokens()}
    blocks = nn.Sequential(*[block(dim, heads, gamma_init) for _ in range(depth)])
    positions = 0.02 * torch.randn(1, side**2 + class_position, dim)
    body: dict[str, nn.Module] = {"blocks": blocks, "norm": nn.LayerNorm(dim, eps=EPS)}
    body["head"] = nn.Linear(dim, num_classes)
    return WithClassToken(embed, body, cls_token=torch.zeros(1, 1, dim), pos_embed=positions)


def block(dim: int, heads: int, gamma_init: float | None) -> nn.Module:
    """Build x + ls1(attention(LN(x))), then x + ls2(MLP(LN(x)))."""
    qkv, proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
    attention = SelfAttention(heads, qkv=qkv, proj=proj)
    norm1, norm2 = (nn.LayerNorm(dim, eps=EPS) for _ in range(2))
    ls1, ls2 = (
        nn.Identity() if gamma_init is None else LayerScale(dim, gamma_init) for _ in range(2)
    )
    first = {"norm1": norm1, "attn": attention, "ls1": ls1}
    return Residual(first, {"norm2": norm2, "mlp": mlp(dim), "ls2": ls2})


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, dim: int, gamma_init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), gamma_init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
