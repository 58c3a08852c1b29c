"""CaiT in PyTorch.

Source: Touvron et al. 2021 (arXiv 2103.17239).
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    EPS,
    ClassAttention,
    Residual,
    Tokens,
    WithClassToken,
    conv_stem,
    mlp,
    named,
    split,
)


def model(
    dim: int,  # width, number of blocks on the patches, attention heads
    depth: int,
    heads: int,
    gamma_init: float = 1e-5,  # of the layer scales
    class_depth: int = 2,  # layers in which only the class token attends
    stem_strides: tuple[int, ...] = (16,),  # of the one convolution; its kernel is as large
    image_size: int = 224,  # side in pixels; the number of positions follows from it
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    stem = conv_stem(in_channels, (), stem_strides, project=dim)
    blocks = nn.Sequential(*[block(dim, heads, gamma_init) for _ in range(depth)])
    last = nn.Sequential(*[ClassBlock(dim, heads, gamma_init) for _ in range(class_depth)])
    body = {"blocks_token_only": last, "norm": nn.LayerNorm(dim, eps=EPS)}
    body["head"] = nn.Linear(dim, num_classes)
    positions = 0.02 * torch.randn(1, (image_size // stem_strides[0]) ** 2, dim)
    return WithClassToken(
        {"patch_embed": named(proj=stem), "tokens": Tokens()},
        body,
        {"blocks": blocks},
        cls_token=0.02 * torch.randn(1, 1, dim),
        pos_embed=positions,
    )


def block(dim: int, heads: int, gamma: float) -> nn.Module:
    """Build x + gamma_1 * attention(LN(x)), then x + gamma_2 * MLP(LN(x))."""
    norm1, norm2 = (nn.LayerNorm(dim, eps=EPS) for _ in range(2))
    gamma_1, gamma_2 = (torch.full((dim,), float(gamma)) for _ in range(2))
    return Residual(
        {"norm1": norm1, "attn": TalkingHeads(dim, heads), "gamma_1": gamma_1},
        {"norm2": norm2, "mlp": mlp(dim), "gamma_2": gamma_2},
    )


class TalkingHeads(nn.Module):
    """Attention whose heads are mixed linearly before (proj_l) and after (proj_w) the softmax."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.proj_l, self.proj_w = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.qkv(x), 3, self.heads)
        weights = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        weights = self.proj_l(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        weights = self.proj_w(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
    """The class token attends to itself and the patches, which stay as they are."""

    def __init__(self, dim: int, heads: int, gamma: float) -> None:
        super().__init__()
        scales = (nn.Parameter(torch.full((dim,), float(gamma))) for _ in range(2))
        self.gamma_1, self.gamma_2 = scales
        self.norm1, self.attn = nn.LayerNorm(dim, eps=EPS), ClassAttention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1] + self.gamma_1 * self.attn(self.norm1(x))
        token = token + self.gamma_2 * self.mlp(self.norm2(token))
        return torch.cat([token, x[:, 1:]], 1)
