"""Shared parts of the study's transformers: patches, attention, MLP and blocks."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.renaming import keys, row, table
from jaxrobust.models.kernels import attention, convolutions, layers
from jaxrobust.models.kernels.primitives import add_bias
from jaxrobust.models.modules.basic import ACTIVATIONS, LayerNorm, Linear, residual
from jaxrobust.models.modules.draws import (
    Draws,
    Drop,
    Initializer,
    branches,
    dropouts,
    torch_default,
)
from jaxrobust.types import Array

EPS = 1e-5  # of layer norms, PyTorch's default
Place = Callable[[Array], Array]  # a dropout layer


class Mlp(nnx.Module):
    """Linear to `hidden` features, activation, linear to `outs` (0: `ins`); dropout after both.

    With an `init` other than PyTorch's, biases start at 0.
    """

    def __init__(
        self,
        ins: int,
        hidden: int,
        activation: str,
        rngs: Draws,
        outs: int = 0,
        init: Initializer = torch_default,
    ) -> None:
        self.fc1 = Linear(ins, hidden, init=init, rngs=rngs)
        self.fc2 = Linear(hidden, outs or ins, init=init, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array, inside: Place = lambda x: x, behind: Place = lambda x: x) -> Array:
        x, bias = layers.linear(x, self.fc1.kernel[...]), self.fc1.bias[...]
        if self.activation == "gelu":  # includes the bias, which saves a pass
            x = layers.gelu(x, bias)
        else:
            x = ACTIVATIONS[self.activation](add_bias(x, bias))
        return behind(self.fc2(inside(x)))


class Patches(Linear):
    """A linear map of the pixels of each patch, channels last; f[B,H,W,C] -> f[B,H',W',D]."""

    def __init__(self, ins: int, dim: int, patch: int, rngs: Draws) -> None:
        super().__init__(patch * patch * ins, dim, init=torch_default, rngs=rngs)
        self.patch = patch

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].reshape(self.patch, self.patch, x.shape[3], -1)
        return convolutions.conv(x, kernel, self.bias[...], stride=self.patch)


class Attention(nnx.Module):
    """Attention of all tokens to all; `full`: logits scaled by the root of the total width."""

    def __init__(self, dim: int, heads: int, full: bool, rngs: Draws) -> None:
        self.to_qkv = Linear(dim, 3 * dim, bias=False, init=torch_default, rngs=rngs)
        self.to_out = Linear(dim, dim, init=torch_default, rngs=rngs)
        self.heads, self.scale = heads, (dim if full else dim // heads) ** -0.5

    def __call__(self, x: Array) -> Array:
        return self.to_out(attention.self_attention(self.to_qkv(x), self.heads, scale=self.scale))


class TokenAttention(nnx.Module):
    """Attention of all tokens f[...,N,D] to all; queries, keys and values have no bias.

    Heads are `width` wide, whatever D is.
    """

    def __init__(self, dim: int, heads: int, width: int, rngs: Draws) -> None:
        inner = heads * width
        self.qkv = Linear(dim, 3 * inner, bias=False, init=torch_default, rngs=rngs)
        self.proj = Linear(inner, dim, init=torch_default, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        qkv = self.qkv(x.reshape(-1, *x.shape[-2:]))
        return self.proj(attention.self_attention(qkv, self.heads)).reshape(x.shape)


class Block(nnx.Module):
    """Attention and MLP, each after a norm and added; dropout after every map but q, k and v."""

    def __init__(self, v: Any, rngs: Draws, *, full: bool) -> None:
        self.norm1, self.norm2 = (LayerNorm(v.dim, eps=EPS) for _ in range(2))
        self.attn = Attention(v.dim, v.heads, full, rngs)
        self.mlp = Mlp(v.dim, v.hidden, v.activation, rngs)
        self.dropout = v.dropout

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        path1, path2 = branches(drop, 2)
        attended, inside, behind = dropouts(drop, 3, self.dropout, paths=2)
        x = residual(x, self.norm1, lambda y: path1(attended(self.attn(y))))
        return residual(x, self.norm2, lambda y: path2(self.mlp(y, inside, behind)))


class PreNorm(nnx.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x)); attention is called with `train` too."""

    def __init__(self, dim: int, attn: Any, mlp: Any, eps: float = EPS) -> None:
        self.norm1, self.attn = LayerNorm(dim, eps=eps), attn
        self.norm2, self.mlp = LayerNorm(dim, eps=eps), mlp

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        attn_path, mlp_path = branches(drop, 2)
        x = residual(x, self.norm1, lambda y: attn_path(self.attn(y, train)))
        return residual(x, self.norm2, lambda y: mlp_path(self.mlp(y)))


def grid_of(image_size: int, patch: int) -> int:
    """Return the side of the grid of patches; `ValueError` if they do not tile the image."""
    if patch < 1 or image_size < 1 or image_size % patch:
        fitting = [n for n in range(1, image_size + 1) if image_size % n == 0]
        near = [*[n for n in fitting if n < patch][-1:], *[n for n in fitting if n > patch][:1]]
        raise ValueError(
            f"patch={patch} does not divide images of {image_size} px into whole patches; use "
            f"patch={' or '.join(map(str, near)) or 1}, or another image_size"
        )
    return image_size // patch


def check(v: Any, *positive: str) -> None:
    """Raise `ValueError` if a row's activation is unknown or a number is not positive."""
    architecture_checks.check_row(v, **dict.fromkeys((*positive, "in_channels"), 1))
    if "heads" in positive and v.dim % v.heads:
        raise ValueError(
            f"heads={v.heads} must divide dim={v.dim}, because each head gets an equal part"
        )


_LAYER = r"transformer\.layers\.(\d+)\."
# From lucidrains' vit-pytorch, as in kentaroy47's vision-transformers-cifar10.
BLOCK_ROWS = table(
    row(r"cls_token", "cls_token"),
    norms={
        _LAYER + r"0\.fn\.norm": r"blocks.\1.norm1",
        _LAYER + r"1\.fn\.norm": r"blocks.\1.norm2",
        r"mlp_head\.0": "norm",
    },
    linears={
        r"patch_to_embedding": "patch_embed.proj.0",
        _LAYER + r"0\.fn\.fn\.to_qkv": r"blocks.\1.attn.to_qkv",
        _LAYER + r"0\.fn\.fn\.to_out\.0": r"blocks.\1.attn.to_out",
        _LAYER + r"1\.fn\.fn\.net\.0": r"blocks.\1.mlp.fc1",
        _LAYER + r"1\.fn\.fn\.net\.3": r"blocks.\1.mlp.fc2",
    },
)


def block_keys(depth: int) -> list[str]:
    """List the names of all blocks in that code, in order."""
    modules = "0.fn.norm 0.fn.fn.to_qkv:w 0.fn.fn.to_out.0 1.fn.norm 1.fn.fn.net.0 1.fn.fn.net.3"
    return keys("transformer.layers", modules, depth)
