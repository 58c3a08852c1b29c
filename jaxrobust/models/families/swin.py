"""Swin Transformer: attention inside windows that shift from block to block.

Source: Liu et al. 2021 (arXiv 2103.14030).
"""

import math
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import Family, Member, Names, TorchVariant, VariantRow
from jaxrobust.models.interface.renaming import Naming, Renaming, drop, keys, linear_oi, row, table
from jaxrobust.models.kernels import attention
from jaxrobust.models.kernels.primitives import widened
from jaxrobust.models.modules import positions
from jaxrobust.models.modules.basic import Conv, LayerNorm, Linear, Mlp, Normalize, residual
from jaxrobust.models.modules.draws import Draws, Drop, branches, normal_02, torch_default
from jaxrobust.types import Array, ModuleMaker

Map = TypeVar("Map", Array, np.ndarray)


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    dim: int  # of the first stage; each stage doubles it
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    patch: int = 4
    window: int = 7
    # Whether to pad a map to full windows with zeros below and right, as timm does, or to reject
    # its size, as Microsoft's code does. A smaller map is one window.
    padded: bool = True
    eps: float = 1e-5  # of the layer norms


VARIANTS = {
    "swin_b": Variant(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": Variant(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    # MIMIR (Xu et al. 2023, arXiv 2312.04960): Microsoft's code with other norms.
    "swin_b_mimir": Variant(128, (2, 2, 18, 2), (4, 8, 16, 32), padded=False, eps=1e-6),
    "swin_l_mimir": Variant(
        *(192, (2, 2, 18, 2), (6, 12, 24, 48)), window=14, padded=False, eps=1e-6
    ),
}


# Windows: maps x f[B,S,S,D], S a multiple of the window w, as f[B*(S/w)^2,w*w,D] and back.


def partition(x: Map, window: int) -> Map:
    """Cut each image into windows, row by row, as a batch."""
    batch, side, _, dim = x.shape
    count = side // window
    x = x.reshape(batch, count, window, count, window, dim).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window * window, dim)


def merged(windows: Map, side: int) -> Map:
    """Reassemble the maps that `partition` cut."""
    _, tokens, dim = windows.shape
    window = math.isqrt(tokens)
    count = side // window
    x = windows.reshape(-1, count, count, window, window, dim).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, side, side, dim)


def relative_index(window: int) -> np.ndarray:
    """Return i[N,N], the place of the bias of a query and a key in the table, by their offset."""
    y, x = np.divmod(np.arange(window**2), window)
    rows, columns = (at[:, None] - at[None] + window - 1 for at in (y, x))
    return rows * (2 * window - 1) + columns


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """Return f[windows,N,N]: -100 for neighbors that only a cyclic shift created, else 0."""
    band = np.digitize(np.arange(side), [side - window, side - shift])
    label = partition((3 * band[:, None] + band[None])[None, :, :, None], window)[:, :, 0]
    return np.where(label[:, :, None] == label[:, None], 0.0, -100.0)


class WindowAttention(nnx.Module):
    """Attention inside each window, with a learned bias for each offset."""

    def __init__(self, dim: int, heads: int, window: int, rngs: Draws) -> None:
        table = ((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nnx.Param(normal_02(rngs.params(), table))
        self.qkv, self.proj = Linear(dim, 3 * dim, rngs=rngs), Linear(dim, dim, rngs=rngs)
        self.heads, self.window = heads, window

    def __call__(self, x: Array, mask: np.ndarray | None) -> Array:
        tokens = x.shape[1]
        index = relative_index(self.window).ravel()
        # Widened, because the gradients of all pairs with one offset are summed in the bias's type.
        (table,) = widened(self.relative_position_bias_table[...])
        bias = table[index].reshape(tokens, tokens, self.heads).transpose(2, 0, 1)
        if mask is not None:
            bias = bias[None] + jnp.asarray(mask, bias.dtype)[:, None]  # for each window
        return self.proj(attention.self_attention(self.qkv(x), self.heads, bias=bias))


class Block(nnx.Module):
    """x plus attention in shifted windows, plus MLP."""

    def __init__(
        self, dim: int, heads: int, window: int, shift: int, eps: float, rngs: Draws
    ) -> None:
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = WindowAttention(dim, heads, window, rngs)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, rngs)
        self.window, self.shift = window, shift

    def windowed(self, x: Array) -> Array:
        """Attend within f[B,S,S,D], shifted and zero-padded to full windows, and undo both."""
        side, shift, missing = x.shape[1], self.shift, -x.shape[1] % self.window
        x = jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x
        x = jnp.pad(x, ((0, 0), (0, missing), (0, missing), (0, 0))) if missing else x
        mask = shift_mask(side + missing, self.window, shift) if shift else None
        x = merged(self.attn(partition(x, self.window), mask), side + missing)[:, :side, :side]
        return jnp.roll(x, (shift, shift), (1, 2)) if shift else x

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        attn_path, mlp_path = branches(drop, 2)
        x = residual(x, self.norm1, lambda y: attn_path(self.windowed(y)))
        return residual(x, self.norm2, lambda y: mlp_path(self.mlp(y)))


class Merge(nnx.Module):
    """Merge 2x2 neighbors (column by column) into a token: LN, then linear to twice the width."""

    def __init__(self, dim: int, eps: float, rngs: Draws) -> None:
        self.norm = LayerNorm(4 * dim, eps=eps)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        batch, side, _, dim = x.shape
        half, odd = -(-side // 2), side % 2
        x = jnp.pad(x, ((0, 0), (0, odd), (0, odd), (0, 0)))
        x = x.reshape(batch, half, 2, half, 2, dim).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(batch, half, half, 4 * dim)))


class Stage(nnx.Module):
    """The merge (except in the first stage), then the blocks; every second one is shifted.

    A map no larger than the window has one window of that `side`, without shifts.
    """

    def __init__(self, v: Variant, stage: int, side: int, rngs: Draws) -> None:
        dim, heads = v.dim << stage, v.heads[stage]
        window = min(v.window, side)
        shift = window // 2 if side > window else 0
        self.downsample = Merge(dim // 2, v.eps, rngs) if stage else None
        shifts = [shift * (i % 2) for i in range(v.depths[stage])]
        self.blocks = nnx.List([Block(dim, heads, window, s, v.eps, rngs) for s in shifts])

    def __call__(self, x: Array, **settings: Any) -> Array:
        x = x if self.downsample is None else self.downsample(x)
        return run_blocks(self.blocks, x, **settings)


class PatchEmbed(nnx.Module):
    """Convolution of each patch, then LN."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        self.proj = Conv(
            v.in_channels, v.dim, v.patch, stride=v.patch, init=torch_default, rngs=rngs
        )
        self.norm = LayerNorm(v.dim, eps=v.eps)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.proj(x))


class Head(nnx.Module):
    """The classifier on the pooled features."""

    def __init__(self, dim: int, num_classes: int, rngs: Draws) -> None:
        self.fc = Linear(dim, num_classes, rngs=rngs)

    def __call__(self, pooled: Array) -> Array:
        return self.fc(pooled)


class Swin(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, image_size: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.patch_embed = PatchEmbed(v, rngs)
        self.layers = nnx.List(
            [Stage(v, i, side, rngs) for i, side in enumerate(_sides(v, image_size))]
        )
        self.norm = LayerNorm(v.dim << (len(v.depths) - 1), eps=v.eps)
        self.head = Head(v.dim << (len(v.depths) - 1), num_classes, rngs)
        self.variant, self.image_size = v, image_size

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v, size = self.variant, self.image_size
        if images.shape[1:3] != (size, size):
            raise ValueError(
                f"images have shape {images.shape}, but this network was created with "
                f"image_size={size}; create it with the size of the images"
            )
        x = self.patch_embed(self.normalize(images).astype(jnp.dtype(v.dtype)))
        for stage, settings in zip(self.layers, of_stages(v, train, key), strict=True):
            x = stage(x, **settings)
        return self.head(self.norm(x).mean(axis=(1, 2)))


def _sides(v: Variant, image_size: int) -> list[int]:
    """List the map sides that decide the windows of each stage."""
    # They are rounded down, as in the reference, although a merge pads odd maps.
    return [max(1, image_size // (v.patch << i)) for i in range(len(v.depths))]


def _check_windows(v: Variant, image_size: int) -> None:
    """Raise `ValueError` for an unpadded map that does not consist of full windows."""
    sides = _sides(v, image_size)
    for i, side in enumerate(sides):
        if side > v.window and side % v.window:
            fits = [w for w in range(2, sides[0] + 1) if not any(s > w and s % w for s in sides)]
            near = min(fits, key=lambda w: (abs(w - v.window), w))
            raise ValueError(
                f"window={v.window} does not divide the map of stage {i + 1}, whose side is {side} "
                f"at image_size={image_size}; use window={near}, or padded=True, which pads with "
                "zeros to full windows"
            )


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    architecture_checks.check_stages(v, "heads", "depths")
    architecture_checks.check_least(v, dim=1, patch=1, window=1, in_channels=1)
    if not v.eps > 0:
        raise ValueError(f"eps={v.eps} must be above 0")
    if any((v.dim << i) % heads for i, heads in enumerate(v.heads)):
        raise ValueError(f"heads={v.heads} must divide dim={v.dim}, which doubles at every stage")
    if image_size < v.patch or image_size % v.patch:
        near = max(v.patch, image_size // v.patch * v.patch)
        raise ValueError(
            f"image_size={image_size} is not a whole number of patches of {v.patch} px; use {near} "
            f"or {near + v.patch}"
        )
    if not v.padded:
        _check_windows(v, image_size)
    return lambda rngs: Swin(v, num_classes, image_size, rngs)


_WINDOW = Variant.window


def sides_of(table: np.ndarray, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the map sides that a position-bias table, and one of `shape`, belong to.

    None: it is not such a table, or the number of heads differs.
    """
    old = math.isqrt(len(table)) if table.ndim == len(shape) == 2 else 0
    if table.shape[1:] != shape[1:] or old**2 != len(table) or old % 2 == 0:
        return None
    return (old + 1) // 2, (math.isqrt(shape[0]) + 1) // 2


def cut_to(table: np.ndarray, old_side: int, new_side: int) -> np.ndarray:
    """Return the biases for a smaller map; every offset keeps its bias."""
    middle, old = slice(old_side - new_side, old_side + new_side - 1), 2 * old_side - 1
    return table.reshape(old, old, -1)[middle, middle].reshape((2 * new_side - 1) ** 2, -1)


def fitted(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a position-bias table for the window of another map.

    For a smaller map, every offset keeps its bias. For a larger one, the table is interpolated
    (bicubic), as in Swin's and timm's code. Arrays that are not such a table, or have another
    number of heads, are returned unchanged.

    Raises:
      ValueError: the old window is larger than that of the standard networks, so the windows of all
        blocks differ.
    Source: `load_pretrained` in utils.py of microsoft/Swin-Transformer; parity:
      tests/models/families/test_swin.py against torch's interpolate.
    """
    if (sides := sides_of(table, shape)) is None:
        return table
    old_side, new_side = sides
    if old_side == new_side:
        return table
    if old_side > _WINDOW:
        raise ValueError(
            f"the relative position biases belong to a window of {old_side}; create the network "
            f"with window={old_side}, for images whose maps are at least that large"
        )
    if new_side < old_side:
        return cut_to(table, old_side, new_side)
    old, new = 2 * old_side - 1, 2 * new_side - 1
    matrix = positions.interpolation(old, new)
    grid = table.reshape(old, old, -1).astype(np.float64)
    larger = np.einsum("ir,jc,rch->ijh", matrix, matrix, grid)
    return larger.reshape(new**2, -1).astype(table.dtype)


_BLOCK = r"layers\.\d\.blocks\.\d+"
_LINEARS = rf"{_BLOCK}\.(?:attn\.(?:qkv|proj)|mlp\.fc[12])"
_NORMS = rf"{_BLOCK}\.norm[12]|patch_embed\.norm|norm"
_SHARED = table(
    row(rf"({_BLOCK}\.attn\.relative_position_bias_table)", r"\1", resize=fitted),
    drop(r".+\.relative_position_index", "follows from the window"),
    drop(r".+\.attn_mask", "follows from the image size and the window"),
    convs={r"patch_embed\.proj": "patch_embed.proj"},
    norms={f"({_NORMS})": r"\1"},
    linears={f"({_LINEARS})": r"\1"},
)


def _rows(merges: dict[str, str], head: str) -> list[Renaming]:
    return table(
        *_SHARED,
        *(
            row(rf"{a}\.reduction\.weight", f"{b}.reduction.kernel", linear_oi)
            for a, b in merges.items()
        ),
        norms={rf"{a}\.norm": f"{b}.norm" for a, b in merges.items()},
        linears={head: "head.fc"},
    )


TORCH_NAMES = _rows({r"layers\.([123])\.downsample": r"layers.\1.downsample"}, r"head\.fc")
OTHER_NAMES = [
    Naming(
        "Microsoft's Swin and timm before 0.9, whose merges end a stage",
        r"layers\.0\.downsample\..*|head\.(weight|bias)",
        _rows(
            {rf"layers\.{i}\.downsample": f"layers.{i + 1}.downsample" for i in range(3)}, "head"
        ),
    )
]


def torch_keys(v: Variant) -> list[str]:
    """List the reference's names in order (timm 1.0.9)."""
    names = keys("patch_embed", "proj norm")
    for i, depth in enumerate(v.depths):
        names += keys(f"layers.{i}.downsample", "norm reduction:w" if i else "")
        attn = "attn.relative_position_bias_table: attn.qkv attn.proj"
        names += keys(f"layers.{i}.blocks", f"norm1 {attn} norm2 mlp.fc1 mlp.fc2", depth)
    return names + keys("", "norm head.fc")


def made(v: Variant, image_size: int) -> dict[str, np.ndarray]:
    """Make the buffers of Microsoft's network: bias indices and masks of shifted windows."""
    buffers: dict[str, np.ndarray] = {}
    for i, side in enumerate(_sides(v, image_size)):
        window, shift = (v.window, v.window // 2) if side > v.window else (side, 0)
        for j in range(v.depths[i]):
            name = f"layers.{i}.blocks.{j}"
            if shift and j % 2:
                mask = shift_mask(side, window, shift)
                buffers[f"{name}.attn_mask"] = mask.astype(np.float32)
            buffers[f"{name}.attn.relative_position_index"] = relative_index(window)
    return buffers


def _mimir(name: str, title: str) -> Member:
    fields, plain = VARIANTS[name]._asdict(), Variant(0, (), ())._asdict()
    options = {k: v for k, v in fields.items() if v != plain[k] and k != "padded"}
    return Member(TorchVariant("swin.py", options), title=title)


MEMBERS = {
    "swin_b": Member(TorchVariant("swin_base_patch4_window7_224")),
    "swin_l": Member(TorchVariant("swin_large_patch4_window7_224")),
    "swin_b_mimir": _mimir("swin_b_mimir", "Swin-B"),
    "swin_l_mimir": _mimir("swin_l_mimir", "Swin-L"),
}
_STEM, _HEAD = r"patch_embed\..*", r"head\.fc\..*"
NAMES = Names(TORCH_NAMES, torch_keys, _STEM, _HEAD, OTHER_NAMES, made=made)
FAMILY = Family("swin", "Swin", VARIANTS, maker, NAMES, MEMBERS, "matrices")
