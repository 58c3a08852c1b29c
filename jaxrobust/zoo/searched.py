"""Networks of cells from architecture search, the baselines of RobustResNets.

The cells are from `searched_cells`, with the sizes of Huang et al. 2022 (arXiv 2212.11005) and the
macro-architecture of Liu et al. 2019 (DARTS, arXiv 1806.09055).
"""

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import run_blocks
from jaxrobust.models.interface.family import (
    BatchNormRow,
    Family,
    Member,
    Names,
    PaperFigures,
    TorchVariant,
)
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, keys, table
from jaxrobust.models.modules.basic import BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.searched_cells import CELLS, Block, Maker, Place


class Variant(BatchNormRow):
    """A row of the table; `drop_path` drops edges other than identities, `remat` is of cells."""

    cell: str  # a name in `CELLS`
    channels: int  # of the first cells' states; doubled at each reduction
    cells: int
    bn_momentum: float = 0.1  # of the running statistics, torch's


VARIANTS = {
    "robnet_large_v2": Variant("robnet", 64, 33),
    "advrush_7_96": Variant("advrush", 96, 23),
    "racl_7_104": Variant("racl", 104, 23),
}


def places(v: Variant) -> list[Place]:
    """List the positions of all cells."""
    at = {v.cells // 3, 2 * v.cells // 3}
    cells: list[Place] = []
    width = v.channels
    for i in range(v.cells):
        width *= 2 if i in at else 1
        cells.append(Place(width, i in at, i - 1 in at))
    return cells


class Searched(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        make = Maker(v, rngs)
        self.normalize = Normalize(v.in_channels)
        first = 3 * v.channels
        stem = residual.conv(v.in_channels, first, 3, rngs)
        norm = BatchNorm(first, group=v.bn_group, momentum=v.bn_momentum)
        self.stem = nnx.List([stem, norm])
        ins, blocks = (first, first), []
        for place in places(v):
            blocks.append(Block(ins, place, make))
            ins = (ins[1], place.width * len(CELLS[v.cell].normal))
        self.cells = nnx.List(blocks)
        self.classifier = Linear(ins[1], num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        conv, norm = self.stem
        x = norm(conv(self.normalize(images).astype(jnp.dtype(v.dtype))), train)
        rates = [v.drop_path] * v.cells
        _, x = run_blocks(self.cells, (x, x), train=train, key=key, rates=rates, remat=v.remat)
        return self.classifier(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    if v.cell not in CELLS:
        raise ValueError(f"cell={v.cell!r} is unknown; choose one of {', '.join(CELLS)}")
    architecture_checks.check_least(v, channels=1, cells=3, in_channels=1, bn_group=0)
    if not 0 < v.bn_momentum <= 1:
        raise ValueError(f"bn_momentum={v.bn_momentum} must be above 0 and at most 1")
    if image_size < 4 or image_size % 4:
        raise ValueError(
            f"image_size={image_size}: two cells halve the map, so use a multiple of 4"
        )
    return lambda rngs: Searched(v, num_classes, rngs)


_CELL = r"(cells\.\d+\.)"
_EDGE = rf"{_CELL}_ops\.(\d+)"
# Indices in PyTorch's sequences; norms follow ReLUs, and a separable convolution has two.
_PARTS = {1: "dw1", 2: "pw1", 3: "bn1", 5: "dw2", 6: "pw2", 7: "bn2"}


_DEEP = {  # pattern -> our name, of separable convolutions' parts
    rf"{_EDGE}{inside}\.{place}": rf"\1ops.\2.{where}{part}"
    for place, part in _PARTS.items()
    for inside, where in ((r"(?:\.op){1,2}", ""), (r"\.op\.conv\.op", "conv."))
}
TORCH_NAMES = table(
    BATCH_NORM_COUNT,
    convs={
        r"stem\.0": "stem.0",
        rf"{_CELL}preprocess([01])\.op\.1": r"\1preprocess\2.conv",
        rf"{_CELL}preprocess0\.(conv_[12])": r"\1preprocess0.\2",
        rf"{_EDGE}\.(conv_[12])": r"\1ops.\2.\3",
        rf"{_EDGE}\.op\.res\.(conv_[12])": r"\1ops.\2.res.\3",
        **{source: target for source, target in _DEEP.items() if "bn" not in target},
    },
    norms={
        r"stem\.1": "stem.1",
        rf"{_CELL}preprocess([01])\.op\.2": r"\1preprocess\2.bn",
        rf"{_CELL}preprocess0\.bn": r"\1preprocess0.bn",
        rf"{_EDGE}\.bn": r"\1ops.\2.bn",
        rf"{_EDGE}\.op\.res\.bn": r"\1ops.\2.res.bn",
        **{source: target for source, target in _DEEP.items() if "bn" in target},
    },
    linears={"classifier": "classifier"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names in the original code, in its order."""
    cell = CELLS[v.cell]
    norm = "bn" if cell.affine else "bn0"
    projected, reduced = f"1:w 2:{norm}", f"conv_1:w conv_2:w bn:{norm}"
    names = keys("", "stem.0:w stem.1:bn")
    for i, place in enumerate(places(v)):
        old = ("", reduced) if place.after_reduction else (".op", projected)
        names += keys(f"cells.{i}.preprocess0{old[0]}", old[1])
        names += keys(f"cells.{i}.preprocess1.op", projected)
        steps = cell.reduction if place.reduces else cell.normal
        for number, (op, state) in enumerate(edge for step in steps for edge in step):
            name = f"cells.{i}._ops.{number}" + ".op" * cell.wrapped
            skipped = reduced if place.reduces and state < 2 else ""
            parts = {"skip": [], "avg3": [], "dil3": [1, 2, 3]}.get(op, [*_PARTS])
            kinds = [f"{at}:{norm if 'bn' in _PARTS[at] else 'w'}" for at in parts]
            names += keys(f"{name}.conv.op" if op == "both" else f"{name}.op", " ".join(kinds))
            if op in ("skip", "both"):
                names += keys(f"{name}.res" if op == "both" else name, skipped)
    return names + keys("", "classifier")


_KNOWN = {
    "robnet_large_v2": ("RobNet-large-v2", PaperFigures("33.3", "5.10")),
    "advrush_7_96": ("AdvRush (7@96)", PaperFigures("32.6", "4.97")),
    "racl_7_104": ("RACL (7@104)", PaperFigures("32.5", "4.93")),
}


def _reference(name: str) -> TorchVariant:
    row = VARIANTS[name]._asdict()
    return TorchVariant("searched.py", {key: row[key] for key in ("cell", "channels", "cells")})


MEMBERS = {
    name: Member(_reference(name), paper, counted_at=32, num_classes=10, title=title)
    for name, (title, paper) in _KNOWN.items()
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stem\..*", head=r"classifier\..*")
FAMILY = Family("searched", "Searched cells", VARIANTS, maker, NAMES, MEMBERS, "all", any_size=True)
