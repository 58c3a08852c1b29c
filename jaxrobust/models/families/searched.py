"""Networks of cells that a search found, the baselines of RobustResNets.

Sources: RobNet, Guo et al. 2020 (arXiv 1911.10695); AdvRush, Mok et al. 2021 (arXiv 2108.01289);
RACL, Dong et al. 2020 (arXiv 2009.00902), at the sizes at which Huang et al. 2022 (arXiv
2212.11005) train them; the macro of all three: Liu et al. 2019 (DARTS, arXiv 1806.09055). Parity:
tests/models/families/test_searched.py against golden logits of that paper's code.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families.searched_cells import CELLS, Block, Cell, Maker, Place
from jaxrobust.models.interface.classifier import classifier, run_blocks
from jaxrobust.models.interface.family import Family, Member, Names, Paper, Reference
from jaxrobust.models.interface.renaming import (
    BATCH_NORM_COUNT,
    Row,
    affine,
    batch_norm,
    conv_oihw,
    linear_oi,
    row,
)
from jaxrobust.models.modules.basic import BatchNorm, Conv, Linear, Normalize
from jaxrobust.models.modules.initializers import Draws
from jaxrobust.types import Array, Classifier


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    cell: str  # a name in `CELLS`
    channels: int  # of the first cells' states; they double where the map is reduced
    cells: int
    bn_group: int = 0  # batch statistics in training: of the whole batch, or of so many images
    bn_momentum: float = 0.1  # of the running statistics, torch's
    drop_path: float = 0.0  # of every edge that is no identity
    in_channels: int = 3
    remat: bool = False  # recompute each cell in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


VARIANTS = {
    "robnet_large_v2": Variant("robnet", 64, 33),
    "advrush_7_96": Variant("advrush", 96, 23),
    "racl_7_104": Variant("racl", 104, 23),
}


def places(variant: Variant) -> list[Place]:
    """Return the places of all cells."""
    at = {variant.cells // 3, 2 * variant.cells // 3}
    found: list[Place] = []
    width = variant.channels
    for i in range(variant.cells):
        width *= 2 if i in at else 1
        found.append(Place(width, i in at, i - 1 in at))
    return found


class Searched(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, variant: Variant, num_classes: int, rngs: Draws) -> None:
        v, make = variant, Maker(variant, rngs)
        self.normalize = Normalize(v.in_channels)
        first = 3 * v.channels
        stem = Conv(v.in_channels, first, 3, padding=1, bias=False, torch_init=True, rngs=rngs)
        norm = BatchNorm(first, group=v.bn_group, momentum=v.bn_momentum)
        self.stem = nnx.List([stem, norm])
        ins, blocks = (first, first), []
        for place in places(v):
            blocks.append(Block(ins, place, make))
            ins = (ins[1], place.width * len(CELLS[v.cell].normal))
        self.cells = nnx.List(blocks)
        self.classifier = Linear(ins[1], num_classes, torch_init=True, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        conv, norm = self.stem
        x = norm(conv(self.normalize(images).astype(jnp.dtype(v.dtype))), train)
        rates = [v.drop_path] * v.cells
        _, x = run_blocks(self.cells, (x, x), train=train, key=key, rates=rates, remat=v.remat)
        return self.classifier(x.mean(axis=(1, 2)))


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """Return the network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    if v.cell not in CELLS:
        raise ValueError(f"cell={v.cell!r} is unknown; one of {', '.join(CELLS)}")
    for name, low in {"channels": 1, "cells": 3, "in_channels": 1, "bn_group": 0}.items():
        if (value := getattr(v, name)) < low:
            raise ValueError(f"{name}={value} must be at least {low}")
    if not 0 < v.bn_momentum <= 1:
        raise ValueError(f"bn_momentum={v.bn_momentum} must be above 0 and at most 1")
    if image_size < 4 or image_size % 4:
        raise ValueError(
            f"image_size={image_size}: two cells halve the map, so take a multiple of 4"
        )
    return classifier(lambda rngs: Searched(v, num_classes, rngs), dtype=jnp.dtype(v.dtype))


_CELL = r"(cells\.\d+\.)"
_EDGE = rf"{_CELL}_ops\.(\d+)"
# Places in PyTorch's sequences: norms stand behind ReLUs, of which a separable convolution has two.
_PARTS = {1: "dw1", 2: "pw1", 3: "bn1", 5: "dw2", 6: "pw2", 7: "bn2"}


def _module_rows(theirs: str, ours: str, *, norm: bool) -> list[Row]:
    if not norm:
        return [row(theirs + r"\.weight", ours + ".kernel", conv_oihw)]
    return [
        row(theirs + r"\.weight", ours + ".scale"),
        row(theirs + r"\.bias", ours + ".bias"),
        *(row(theirs + rf"\.running_{part}", f"{ours}.{part}") for part in ("mean", "var")),
    ]


def _all_rows() -> list[Row]:
    """Return the rows of all convolutions and norms: their pattern, our name, whether a norm."""
    pairs: list[tuple[str, str, bool]] = [
        (r"stem\.0", "stem.0", False),
        (r"stem\.1", "stem.1", True),
        (rf"{_CELL}preprocess([01])\.op\.1", r"\1preprocess\2.conv", False),
        (rf"{_CELL}preprocess([01])\.op\.2", r"\1preprocess\2.bn", True),
        (rf"{_CELL}preprocess0\.(conv_[12])", r"\1preprocess0.\2", False),
        (rf"{_CELL}preprocess0\.bn", r"\1preprocess0.bn", True),
        (rf"{_EDGE}\.(conv_[12])", r"\1ops.\2.\3", False),
        (rf"{_EDGE}\.bn", r"\1ops.\2.bn", True),
        (rf"{_EDGE}\.op\.res\.(conv_[12])", r"\1ops.\2.res.\3", False),
        (rf"{_EDGE}\.op\.res\.bn", r"\1ops.\2.res.bn", True),
    ]
    for place, part in _PARTS.items():
        norm = part.startswith("bn")
        pairs.append((rf"{_EDGE}(?:\.op){{1,2}}\.{place}", rf"\1ops.\2.{part}", norm))
        pairs.append((rf"{_EDGE}\.op\.conv\.op\.{place}", rf"\1ops.\2.conv.{part}", norm))
    return [r for theirs, ours, norm in pairs for r in _module_rows(theirs, ours, norm=norm)]


TORCH_NAMES: list[Row] = [
    *_all_rows(),
    row(r"classifier\.weight", "classifier.kernel", linear_oi),
    row(r"classifier\.bias", "classifier.bias"),
    BATCH_NORM_COUNT,
]


def torch_keys(variant: Variant) -> list[str]:
    """Return the names of the code that trained them, in its order."""
    cell = CELLS[variant.cell]
    keys = ["stem.0.weight", *batch_norm("stem.1")]
    for i, place in enumerate(places(variant)):
        block = f"cells.{i}"
        old = f"{block}.preprocess0"
        keys += _reduced(old, cell) if place.after_reduction else _projected(f"{old}.op", cell)
        keys += _projected(f"{block}.preprocess1.op", cell)
        steps = cell.reduction if place.reduces else cell.normal
        for number, (op, state) in enumerate(edge for step in steps for edge in step):
            reduces = place.reduces and state < 2
            keys += _edge(f"{block}._ops.{number}", op, reduces, cell)
    return keys + affine("classifier")


def _norm(name: str, cell: Cell) -> list[str]:
    return batch_norm(name)[0 if cell.affine else 2 :]


def _projected(name: str, cell: Cell) -> list[str]:
    return [f"{name}.1.weight", *_norm(f"{name}.2", cell)]


def _reduced(name: str, cell: Cell) -> list[str]:
    return [f"{name}.conv_1.weight", f"{name}.conv_2.weight", *_norm(f"{name}.bn", cell)]


def _edge(name: str, op: str, reduces: bool, cell: Cell) -> list[str]:
    """Return the names of an edge's operation."""
    name += ".op" if cell.wrapped else ""
    if op == "skip":
        return _reduced(name, cell) if reduces else []
    if op == "avg3":
        return []
    if op == "both":
        return _sequence(f"{name}.conv.op", _PARTS, cell) + (
            _reduced(f"{name}.res", cell) if reduces else []
        )
    return _sequence(f"{name}.op", [1, 2, 3] if op == "dil3" else _PARTS, cell)


def _sequence(name: str, places, cell: Cell) -> list[str]:
    keys = []
    for place in places:
        norm = _PARTS[place].startswith("bn")
        keys += _norm(f"{name}.{place}", cell) if norm else [f"{name}.{place}.weight"]
    return keys


_KNOWN = {
    "robnet_large_v2": ("RobNet-large-v2", Paper("33.3", "5.10")),
    "advrush_7_96": ("AdvRush (7@96)", Paper("32.6", "4.97")),
    "racl_7_104": ("RACL (7@104)", Paper("32.5", "4.93")),
}


def _reference(name: str) -> Reference:
    """Return our file in PyTorch with the fields that a row must give."""
    return Reference("searched.py", dict(zip(Variant._fields, VARIANTS[name][:3], strict=False)))


MEMBERS = {
    name: Member(_reference(name), paper, counted_at=32, num_classes=10, title=title)
    for name, (title, paper) in _KNOWN.items()
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stem\..*", head=r"classifier\..*")
FAMILY = Family(
    "searched", "Searched cells", VARIANTS, create, NAMES, MEMBERS, "all", any_size=True
)
