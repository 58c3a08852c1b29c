"""BoTNet-50 in PyTorch: a ResNet-50 whose last stage attends.

Source: Srinivas et al. 2021 (arXiv 2101.11605), with the names and the unscaled logits of
leaderj1001/BottleneckTransformers.
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import ACTIVATIONS, attend, conv, narrow, residual_net


def model(
    depths: tuple[int, ...] = (3, 4, 6, 3),  # blocks of each stage; those of the last one attend
    width: int = 64,  # inner channels of the first stage's blocks; they double with each stage
    heads: int = 4,
    small_stem: bool = True,  # 3x3 without stride, for 32 px; else 7x7 with stride 2 and pooling
    image_size: int = 32,  # side in pixels; the attention's positions depend on it
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, side = ACTIVATIONS[activation], image_size if small_stem else image_size // 4
    outs = [4 * width << i for i in range(len(depths))]

    def block(ins: int, i: int, stride: int) -> nn.Module:
        inner = width << i
        middle: nn.Module = conv(inner, inner, 3, stride)
        if i == len(depths) - 1:
            attention = Attention(inner, heads, side >> (i + 1 - stride))
            middle = nn.Sequential(attention, *[nn.AvgPool2d(stride)] * (stride > 1))
        return narrow((ins, inner, outs[i]), stride, act, middle, bias=True)

    fc = nn.Sequential(nn.Dropout(0.3), nn.Linear(outs[-1], num_classes))
    kernel = 3 if small_stem else 7
    return residual_net(in_channels, 64, kernel, act, outs, depths, block, fc=fc)


class Attention(nn.Module):
    """Softmax over j of q_i.k_j + r_i.q_j, r the sum of a row's and a column's embedding."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.rel_h = nn.Parameter(torch.randn(1, heads, dim // heads, 1, side))
        self.rel_w = nn.Parameter(torch.randn(1, heads, dim // heads, side, 1))
        self.query, self.key, self.value = (nn.Conv2d(dim, dim, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        # [B, D, H, W] -> [B, heads, N, D / heads]
        parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (part.flatten(2).unflatten(1, (self.heads, -1)).mT for part in parts)
        r = (self.rel_h + self.rel_w).flatten(3).mT
        return attend(q, k, v, r @ q.mT, scale=1).mT.reshape(x.shape)
