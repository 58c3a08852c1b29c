"""PVTv2-B1 "linear" in PyTorch: keys and values from 7 x 7 means of the map.

Source: Wang et al. 2022 (arXiv 2106.13797), with the names and details of timm 1.0.9.
"""

from torch import Tensor, nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    EPS,
    ChannelsLast,
    Mean,
    PixelConv,
    Residual,
    attend,
    named,
    split,
)

MEANS = 7


def model(
    dims: tuple[int, ...] = (64, 128, 320, 512),  # of each stage
    depths: tuple[int, ...] = (2, 2, 2, 2),
    heads: tuple[int, ...] = (1, 2, 5, 8),
    ratios: tuple[int, ...] = (8, 8, 4, 4),  # of feed-forward's hidden units to channels
    patch: int = 4,  # stride of the first convolution, 7x7
    activation: str = "gelu",  # gelu, relu, silu or softplus, in place of every GELU
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, ins = ACTIVATIONS[activation], dims[0]
    embed, stages = named(proj=PixelConv(in_channels, ins, 7, patch, 3), norm=nn.LayerNorm(ins)), []
    for i, (dim, depth, count, ratio) in enumerate(zip(dims, depths, heads, ratios, strict=True)):
        blocks = [block(dim, count, ratio * dim, act) for _ in range(depth)]
        parts: dict[str, nn.Module] = {}
        if i:
            shrink = PixelConv(ins, dim, 3, 2, 1)
            parts["downsample"] = named(proj=shrink, norm=nn.LayerNorm(dim))
        parts |= {"blocks": nn.Sequential(*blocks), "norm": nn.LayerNorm(dim, eps=EPS)}
        stages.append(named(**parts))
        ins = dim
    layers = {"patch_embed": embed, "stages": nn.Sequential(*stages), "mean": Mean(1, 2)}
    return named(last=ChannelsLast(), **layers, head=nn.Linear(ins, num_classes))


def block(dim: int, heads: int, hidden: int, act: type[nn.Module]) -> nn.Module:
    """Build x + attention(LN(x)), then x + feed-forward(LN(x)), with ReLU and 3x3 inside."""
    first, last = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    depthwise = PixelConv(hidden, hidden, 3, padding=1, groups=hidden)
    feed = named(fc1=first, relu=nn.ReLU(), dwconv=depthwise, act=act(), fc2=last)
    attention = {"norm1": nn.LayerNorm(dim, eps=EPS), "attn": Attention(dim, heads, act)}
    return Residual(attention, {"norm2": nn.LayerNorm(dim, eps=EPS), "mlp": feed})


class Attention(nn.Module):
    """Attention of all pixels to 7 x 7 means, which a small map repeats its pixels in."""

    def __init__(self, dim: int, heads: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm, self.act = nn.LayerNorm(dim), act()

    def forward(self, x: Tensor) -> Tensor:
        means = nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), MEANS)
        means = self.act(self.norm(self.sr(means).flatten(2).mT))
        k, v = split(self.kv(means), 2, self.heads)
        (q,) = split(self.q(x).flatten(1, 2), 1, self.heads)
        return self.proj(attend(q, k, v).unflatten(1, x.shape[1:3]))
