"""MLP-Mixer with a class token, which is mixed with the patches and read by the head.

Source: Tolstikhin et al. 2021 (arXiv 2105.01601), as in omihub777/MLP-Mixer-CIFAR (14213f9).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families.vit import PatchEmbed, with_token
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import Names, VariantRow
from jaxrobust.models.interface.renaming import keys, linear_oi, pointwise1_oi, row, table
from jaxrobust.models.modules.basic import Conv, LayerNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.transformer import EPS, Mlp, check, grid_of


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    patch: int = 4  # side in pixels
    dim: int = 128
    depth: int = 8
    token_hidden: int = 512  # of the MLPs over tokens
    hidden: int = 64  # of the MLPs over channels
    class_token: bool = True  # the head's input; else the mean of all patches
    activation: str = "gelu"
    scan: bool = False  # compile one block for all of them


class Block(nnx.Module):
    """Two residual MLPs, each after a norm: over each channel's tokens, and over each token."""

    def __init__(self, v: Variant, tokens: int, rngs: Draws) -> None:
        self.norm1, self.norm2 = (LayerNorm(v.dim, eps=EPS) for _ in range(2))
        self.mlp1 = Mlp(tokens, v.token_hidden, v.activation, rngs)
        self.mlp2 = Mlp(v.dim, v.hidden, v.activation, rngs)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        path1, path2 = branches(drop, 2)
        x = x + path1(self.mlp1(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2))
        return x + path2(self.mlp2(self.norm2(x)))


class Mixer(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, grid: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        conv = Conv(v.in_channels, v.dim, v.patch, stride=v.patch, init=torch_default, rngs=rngs)
        self.patch_embed = PatchEmbed([conv])
        token = jax.random.normal(rngs.params(), (1, 1, v.dim))
        self.cls_token = nnx.Param(token) if v.class_token else None
        tokens = grid * grid + v.class_token
        self.blocks = nnx.List([Block(v, tokens, rngs) for _ in range(v.depth)])
        self.norm = LayerNorm(v.dim, eps=EPS)
        self.head = Linear(v.dim, num_classes, init=torch_default, rngs=rngs)
        self.variant, self.grid = v, grid

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.patch_embed(self.normalize(images).astype(jnp.dtype(v.dtype)), self.grid)
        x = x if self.cls_token is None else with_token(self.cls_token, x)
        x = self.norm(run_blocks(self.blocks, x, **of_one_stage(v, train, key)))
        return self.head(x[:, 0] if v.class_token else x.mean(axis=1))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    check(v, "dim", "depth", "token_hidden", "hidden")
    grid = grid_of(image_size, v.patch)
    return lambda rngs: Mixer(v, num_classes, grid, rngs)


_LAYER = r"mixer_layers\.(\d+)\.mlp([12])\."
TORCH_NAMES = table(
    row(r"cls_token", "cls_token"),
    row(r"mixer_layers\.(\d+)\.mlp1\.(fc[12])\.weight", r"blocks.\1.mlp1.\2.kernel", pointwise1_oi),
    row(r"mixer_layers\.(\d+)\.mlp2\.(fc[12])\.weight", r"blocks.\1.mlp2.\2.kernel", linear_oi),
    row(_LAYER + r"(fc[12])\.bias", r"blocks.\1.mlp\2.\3.bias"),
    convs={r"patch_emb\.0": "patch_embed.proj.0"},
    norms={_LAYER + "ln": r"blocks.\1.norm\2", "ln": "norm"},
    linears={"clf": "head"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of the public code, in its order."""
    names = keys("", f"{'cls_token: ' * v.class_token}patch_emb.0")
    mlps = "mlp1.ln mlp1.fc1 mlp1.fc2 mlp2.ln mlp2.fc1 mlp2.fc2"
    return names + keys("mixer_layers", mlps, v.depth) + keys("", "ln clf")


# Ours: Mixer-S/16, except for the eps of its norms, which is 1e-6 in timm.
_224 = {"patch": 16, "dim": 512, "depth": 8, "token_hidden": 256, "hidden": 2048}
_224 |= {"class_token": False}
_NETWORKS = {
    "cifar_mixer": common.Study("MLP-Mixer (32 px)", counted="0.68"),
    "cifar_mixer_224": common.Study("MLP-Mixer-S/16", _224),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"patch_embed\.proj\..*", head=r"head\..*")
FAMILY = common.family(
    "cifar_mixer", "MLP-Mixer (32 px)", Variant, maker, NAMES, _NETWORKS, any_size=False
)
