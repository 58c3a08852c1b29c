"""Layers that several networks of this folder share.

An exported file holds those that its network needs, so that it depends on nothing but PyTorch.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-6  # of layer norms
Layers = Mapping[str, nn.Module]  # under their names
ACTIVATIONS = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "hard_swish": nn.Hardswish,
}


def named(**layers: nn.Module) -> nn.Sequential:
    """Chain layers under their names."""
    return nn.Sequential(OrderedDict(layers))


def mlp(dim: int, hidden: int = 0, act: type[nn.Module] = nn.GELU) -> nn.Module:
    """Build linear maps to `hidden` units (0: four times the width) and back, `act` between."""
    hidden = hidden or 4 * dim
    return named(fc1=nn.Linear(dim, hidden), act=act(), fc2=nn.Linear(hidden, dim))


def conv(
    ins: int,
    outs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    dilation: int = 1,
) -> nn.Conv2d:
    """Build a convolution that keeps the size, but for its stride."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(ins, outs, kernel, stride, padding, dilation, groups, bias)


class SameConv(nn.Conv2d):
    """A 3x3 convolution padded as in TensorFlow: where it has a stride, below and right alone."""

    def __init__(self, ins: int, outs: int, stride: int = 1) -> None:
        super().__init__(ins, outs, 3, stride, int(stride == 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.padding[0] else nn.functional.pad(x, (0, 1, 0, 1)))


class Residual(nn.Module):
    """x + what layers make of x one after another; of several `branches`, so with each in turn.

    A layer `shortcut` (or `downsample`, `res`, `proj`) maps the x that is added; `last` maps the
    sum. A tensor in the place of a layer is a learned factor of the channels.
    """

    def __init__(self, *branches: Mapping[str, Any], **layers: Any) -> None:
        super().__init__()
        branches = branches or (layers,)
        for branch in branches:
            for name, part in branch.items():
                setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))
        self.branches = [tuple(branch) for branch in branches]

    def forward(self, x: Tensor) -> Tensor:
        for names in self.branches:
            y = added = x
            for name in names:
                part = getattr(self, name)
                if name in ("shortcut", "downsample", "res", "proj"):
                    added = part(x)
                elif name != "last":
                    y = part(y) if isinstance(part, nn.Module) else part * y
            x = self.get_submodule("last")(y + added) if "last" in names else y + added
        return x


def stages(
    ins: int, outs: Sequence[int], depths: Sequence[int], block: Callable[..., nn.Module]
) -> dict[str, nn.Module]:
    """Build layer1, layer2, ... of `block(ins, number, stride)`; all but one halve the map."""
    layers: dict[str, nn.Module] = {}
    for i, depth in enumerate(depths):
        rows = [(ins, 2 if i else 1)] + [(outs[i], 1)] * (depth - 1)
        layers[f"layer{i + 1}"] = nn.Sequential(*(block(a, i, stride) for a, stride in rows))
        ins = outs[i]
    return layers


def project(ins: int, outs: int, stride: int, bias: bool = False) -> nn.Module:
    """Build a 1x1 convolution and batch norm where size or channels change, else the identity."""
    if stride == 1 and ins == outs:
        return nn.Identity()
    return nn.Sequential(conv(ins, outs, 1, stride, bias=bias), nn.BatchNorm2d(outs))


def narrow(
    sizes: tuple[int, int, int],
    stride: int,
    act: type[nn.Module],
    middle: nn.Module,
    shortcut: str = "shortcut",
    bias: bool = False,
) -> nn.Module:
    """Build 1x1, `middle` and 1x1, each with its norm; act(that + shortcut), which has that name.

    `sizes` are the channels that come in, inside and that go out; `bias` is of the shortcut.
    """
    ins, inner, outs = sizes
    layers = {"conv1": conv(ins, inner, 1), "bn1": nn.BatchNorm2d(inner), "act1": act()}
    layers |= {"conv2": middle, "bn2": nn.BatchNorm2d(inner), "act2": act()}
    layers |= {"conv3": conv(inner, outs, 1), "bn3": nn.BatchNorm2d(outs)}
    layers[shortcut] = project(ins, outs, stride, bias)
    return Residual(**layers, last=act())


class Squeeze(nn.Module):
    """Scale each channel by a sigmoid of two linear maps of all channels' means."""

    def __init__(self, channels: int, hidden: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        maps = [nn.Linear(channels, hidden, bias=False), nn.Linear(hidden, channels, bias=False)]
        self.fc = nn.Sequential(maps[0], act(), maps[1], nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class ConvSqueeze(nn.Module):
    """The same of two 1x1 convolutions with biases, under torchvision's names."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Mean(nn.Module):
    """The mean over some axes, by default the pixels of [B, C, H, W]."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes or (2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


def residual_net(
    ins: int,
    width: int,
    kernel: int,
    act: type[nn.Module],
    outs: Sequence[int],
    depths: Sequence[int],
    block: Callable[..., nn.Module],
    **last: nn.Module,
) -> nn.Module:
    """Build convolution, norm, activation, `stages`, the mean over the pixels and `last`.

    A convolution of 7x7 has stride 2, and pooling follows.
    """
    first = conv(ins, width, kernel, 2 if kernel == 7 else 1)
    layers = {"conv1": first, "bn1": nn.BatchNorm2d(width), "act": act()}
    layers |= {"pool": nn.MaxPool2d(3, 2, 1)} if kernel == 7 else {}
    return named(**layers, **stages(width, outs, depths, block), mean=Mean(), **last)


class Tokens(nn.Module):
    """[B, C, H, W] -> [B, H * W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


class ChannelsLast(nn.Module):
    """[B, C, H, W] -> [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """[B, H, W, C] -> [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class PixelConv(nn.Conv2d):
    """A convolution of [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Square(nn.Module):
    """[B, N, D] -> [B, D, H, W] of a square map."""

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        return x.mT.unflatten(2, (side, side))


class Patches(nn.Module):
    """The pixels of each patch, channels last: [B, C, H, W] -> [B, N, side * side * C]."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class TokenNorm(nn.BatchNorm1d):
    """Batch norm over images and tokens of [B, N, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class WithClassToken(nn.Module):
    """Layers `embed` of the images, then `patches`, the class token in front, layers `body`.

    The last layer reads the class token alone. `tokens` are `cls_token` and perhaps positions: of
    all tokens, or only of those of the images, which get them after `embed`.
    """

    cls_token: Tensor

    def __init__(
        self, embed: Layers, body: Layers, patches: Layers | None = None, **tokens: Tensor
    ) -> None:
        super().__init__()
        for name, value in tokens.items():
            self.register_parameter(name, nn.Parameter(value))
        parts = (embed, patches or {}, body)
        for name, layer in (pair for part in parts for pair in part.items()):
            self.add_module(name, layer)
        self.parts, self.positions = [*map(tuple, parts)], [*(tokens.keys() - {"cls_token"})]
        self.reader = self.parts[-1][-1]

    def forward(self, images: Tensor) -> Tensor:
        x, positions = images, [self.get_parameter(name) for name in self.positions]
        for part, names in enumerate(self.parts):
            if part == 2:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            if part and positions and positions[0].shape[1] == x.shape[1]:
                x = x + positions.pop()
            for name in names:
                x = self.get_submodule(name)(x[:, 0] if name == self.reader else x)
        return x


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of [..., heads, N, d], whose channels are joined: [..., N, heads * d].

    `bias` and `scale` (0: one over the root of d) are of the logits, `dropout` of the weights.
    """
    scaled = nn.functional.scaled_dot_product_attention
    return scaled(q, k, v, bias, dropout, scale=scale or None).transpose(-3, -2).flatten(-2)


def split(x: Tensor, parts: int, heads: int) -> list[Tensor]:
    """Split [..., N, parts * heads * d] into `parts` of [..., heads, N, d]."""
    return [part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in x.chunk(parts, -1)]


class ClassAttention(nn.Module):
    """The class token's query against all tokens: [B, N, D] -> [B, 1, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        maps = (self.q(x[:, :1]), self.k(x), self.v(x))
        q, k, v = (split(map, 1, self.heads)[0] for map in maps)
        return self.proj(attend(q, k, v))


class SelfAttention(nn.Module):
    """Softmax attention of all tokens to all, [..., N, D]; for scale and dropout see `attend`.

    The maps are that to queries, keys and values, and that of the result.
    """

    def __init__(
        self, heads: int, scale: float = 0.0, dropout: float = 0.0, **maps: nn.Module
    ) -> None:
        super().__init__()
        self.heads, self.scale, self.dropout = heads, scale, dropout
        for name, layer in maps.items():
            self.add_module(name, layer)

    def bias(self, x: Tensor) -> Tensor | None:
        """Add nothing to the logits; a position bias overrides this."""

    def forward(self, x: Tensor) -> Tensor:
        inward, outward = self.children()
        dropout = self.dropout if self.training else 0.0
        q, k, v = split(inward(x), 3, self.heads)
        return outward(attend(q, k, v, self.bias(x), self.scale, dropout))


def vit_block(
    dim: int, heads: int, hidden: int, act: type[nn.Module], scale: float = 0.0
) -> nn.Module:
    """Build x + attention(LN(x)), then x + MLP(LN(x)), under the names of lucidrains' ViT."""
    qkv, out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
    attention = SelfAttention(heads, scale, to_qkv=qkv, to_out=nn.Sequential(out, nn.Dropout(0.1)))
    first, second = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    net = nn.Sequential(first, act(), nn.Dropout(0.1), second, nn.Dropout(0.1))
    branches = (attention, named(net=net))
    layers = (named(norm=nn.LayerNorm(dim), fn=branch) for branch in branches)
    return nn.Sequential(*(Residual(fn=layer) for layer in layers))


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
    """Build `stem`: convolution, layer norm, GELU for each width, and 1x1 to `project`.

    Without widths: one convolution of the patches to `project`.
    """
    if not widths:
        (stride,) = strides
        return nn.Conv2d(ins, project, stride, stride=stride)
    layers: list[nn.Module] = []
    for out, stride, k in zip(widths, strides, kernels or (3,) * len(widths), strict=True):
        layers += [conv(ins, out, k, stride, bias=True), ChannelNorm(out, eps=EPS), nn.GELU()]
        ins = out
    if project:
        layers.append(nn.Conv2d(ins, project, 1))
    return named(stem=nn.Sequential(*layers))
