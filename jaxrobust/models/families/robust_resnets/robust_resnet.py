"""RobustResNets, their wide residual baselines, and the ablation blocks between them.

Source: Huang et al. 2022, "Revisiting Residual Networks for Adversarial Robustness" (arXiv
2212.11005), and its released code (zhichao-lu/robust-residual-network 8c6d2c2). A RobustResBlock is
`block="hierarchical", se="residual", first_conv="raw"`.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.families.robust_resnets import robust_blocks
from jaxrobust.models.families.robust_resnets.robust_blocks import BLOCKS, SE, Block, conv, norm_of
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages
from jaxrobust.models.interface.family import (
    BatchNormRow,
    Family,
    Member,
    Names,
    PaperFigures,
    TorchVariant,
)
from jaxrobust.models.interface.renaming import (
    BATCH_NORM_COUNT,
    Naming,
    Renaming,
    drop,
    keys,
    table,
)
from jaxrobust.models.modules.basic import ACTIVATIONS, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, torch_uniform
from jaxrobust.models.modules.norms import NORMS
from jaxrobust.types import Array, ModuleMaker

STEM = 16  # channels


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...]  # blocks of each stage
    widths: tuple[int, ...] = ()  # of each stage: the planes are 16, 32, 64 times these
    planes: tuple[int, ...] = ()  # channels of each stage's blocks; empty: from `widths`
    block: str = "basic"  # a name in `BLOCKS`
    se: str = "none"  # squeeze-and-excitation: a name in `SE`
    se_reduction: int = 64  # ratio of its channels to its hidden units
    kernel_size: int = 3  # of every convolution that is called 3x3, except the stem
    scales: int = 8  # parts of a hierarchical block
    groups: int = 4  # of the 3x3 convolutions in aggregated and hierarchical blocks: `cardinality`
    # For these blocks, as in the authors' constructor: each group of a 3x3 convolution (in a
    # hierarchical block, of each part's) has floor(planes * base_width / 160) channels. 0: the
    # paper's totals, 1.5 times the planes, or 2 times for hierarchical blocks.
    base_width: int = 0
    activation: str = "relu"
    norm: str = "batch"  # or group, layer, instance
    preact: bool = True  # norm and activation before each convolution, else after it
    residual: bool = True  # whether blocks have a shortcut
    # Input of a first 1x1 convolution: the block's input after norm and activation, or "raw", the
    # input itself, as in the authors' code. With an identity shortcut, nothing then uses that norm,
    # but it is kept.
    first_conv: str = "activated"
    bn_momentum: float = 0.1  # of the running statistics, torch's
    scan: bool = False  # compile one block for all of a stage except its first


_A = {1: ((14, 14, 7), (5, 7, 3)), 2: ((17, 17, 8), (7, 9, 4)), 3: ((22, 22, 11), (8, 11, 5))}
_A |= {4: ((27, 28, 13), (10, 14, 6))}
_ROBUST: dict[str, Any] = {"block": "hierarchical", "se": "residual", "first_conv": "raw"}
VARIANTS = {
    "wrn_28_10": Variant((4, 4, 4), (10, 10, 10)),
    "wrn_34_10": Variant((5, 5, 5), (10, 10, 10)),
    "wrn_34_12": Variant((5, 5, 5), (12, 12, 12)),
    "wrn_46_14": Variant((7, 7, 7), (14, 14, 14)),
    "wrn_70_16": Variant((11, 11, 11), (16, 16, 16)),
    "wrn_34_r": Variant((5, 5, 5), (20, 20, 8)),
    **{f"wrn_a{i}": Variant(*sizes) for i, sizes in _A.items()},
    "wrn_a4_silu": Variant(*_A[4], activation="silu"),
    **{f"robustresnet_a{i}": Variant(*sizes, **_ROBUST) for i, sizes in _A.items()},
}


def planes_of(v: Variant) -> tuple[int, ...]:
    """Return the planes of each stage."""
    return v.planes or tuple((STEM << i) * width for i, width in enumerate(v.widths))


class Stage(nnx.Module):
    """The blocks between two reductions of the map."""

    def __init__(self, blocks: list[Block]) -> None:
        self.layer = nnx.List(blocks)


class RobustResNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        ins, stages = STEM, []
        self.normalize = Normalize(v.in_channels)
        self.stem_conv = conv(v.in_channels, STEM, 3, rngs)
        for i, (depth, planes) in enumerate(zip(v.depths, planes_of(v), strict=True)):
            outs = planes * BLOCKS[v.block].outs
            rows = [(ins, 2 if i else 1)] + [(outs, 1)] * (depth - 1)
            stages.append(Stage([Block(a, planes, stride, v, rngs) for a, stride in rows]))
            ins = outs
        self.blocks = nnx.List(stages)
        self.norm1 = norm_of(ins if v.preact else STEM, v)
        self.fc = Linear(ins, num_classes, init=torch_uniform(ins), rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v, act = self.variant, ACTIVATIONS[self.variant.activation]
        x = self.stem_conv(self.normalize(images).astype(jnp.dtype(v.dtype)))
        x = x if v.preact else act(self.norm1(x, train))
        for stage, settings in zip(self.blocks, of_stages(v, train, key), strict=True):
            x = residual.run_stage(stage.layer, x, **settings)
        x = act(self.norm1(x, train)) if v.preact else x
        return self.fc(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    words = {"block": BLOCKS, "se": SE, "activation": ACTIVATIONS, "norm": NORMS}
    words["first_conv"] = ("activated", "raw")
    for name, values in words.items():
        if (value := getattr(v, name)) not in values:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(values)}")
    architecture_checks.check_tuples(v, "depths", "widths", "planes", empty=True)
    if not v.depths or len(v.depths) != len(planes_of(v)):
        name = "planes" if v.planes else "widths"
        raise ValueError(
            f"depths={v.depths!r} and {name}={getattr(v, name)!r} need one entry for each stage"
        )
    architecture_checks.check_least(
        v, in_channels=1, bn_group=0, se_reduction=1, kernel_size=1, groups=1, base_width=0
    )
    robust_blocks.check(v, planes_of(v))
    if not 0 < v.bn_momentum <= 1:
        raise ValueError(f"bn_momentum={v.bn_momentum} must be above 0 and at most 1")
    return lambda rngs: RobustResNet(v, num_classes, rngs)


_LAYER = r"(blocks\.\d+\.layer\.\d+\.)"
_CONV = rf"(stem_conv|{_LAYER}(?:conv\d(?:\.\d+)?|shortcut\.0))"
_NORM = rf"(norm1|{_LAYER}(?:bn\d(?:\.\d+)?|se_bn))"


def _rows(convs: dict[str, str], norms: dict[str, str]) -> list[Renaming]:
    squeezes = {rf"{_LAYER}se\.fc\.{2 * i}": rf"\1se.fc{i + 1}" for i in range(2)}
    return table(BATCH_NORM_COUNT, convs=convs, norms=norms, linears=squeezes | {"fc": "fc"})


TORCH_NAMES = _rows({_CONV: r"\1"}, {_NORM: r"\1"})


def _of_trades() -> list[Renaming]:
    """List the rows for files that count stages from 1 and hold an unused second first stage."""
    convs, norms = {"conv1": "stem_conv"}, {"bn1": "norm1"}
    for i in range(3):
        source, target = rf"block{i + 1}\.layer\.(\d+)\.", rf"blocks.{i}.layer.\1."
        convs |= {
            rf"{source}(conv\d)": rf"{target}\2",
            rf"{source}convShortcut": f"{target}shortcut.0",
        }
        norms[rf"{source}(bn\d)"] = rf"{target}\2"
    pattern = r"sub_block1\..+(?<!num_batches_tracked)"
    unused = drop(pattern, "the reference never runs its second first stage")
    return [*_rows(convs, norms), unused]


# RobustBench builds WRN-34-R from another project's blocks.
OTHER_NAMES = [
    Naming(
        "RobustBench's Huang2021Exploring",
        r"blocks\..*\.convShortcut\.weight",
        _rows(
            {rf"(stem_conv|{_LAYER}conv\d)": r"\1", rf"{_LAYER}convShortcut": r"\1shortcut.0"},
            {rf"{_LAYER}(bn\d)": r"\1\2", "bn1": "norm1"},
        ),
    ),
    Naming(
        "yaodongyu/TRADES and many after it",
        r"block1\.layer\.0\.convShortcut\.weight",
        _of_trades(),
    ),
]


def torch_keys(v: Variant) -> list[str]:
    """List the authors' names, in order."""
    names, ins = keys("", "stem_conv:w"), STEM
    for i, (depth, planes) in enumerate(zip(v.depths, planes_of(v), strict=True)):
        outs = planes * BLOCKS[v.block].outs
        for j in range(depth):
            projects = v.residual and (ins != outs or (i and not j))
            modules = _modules(v) + ["shortcut.0:w"] * bool(projects)
            names += keys(f"blocks.{i}.layer.{j}", " ".join(modules))
            ins = outs
    return names + keys("", f"{_norm('norm1', v)} fc")


def _modules(v: Variant) -> list[str]:
    middle = BLOCKS[v.block].middle
    modules, convs = [_norm("bn1", v)] if v.preact else [], 3 if middle else 2
    for i in range(1, convs + 1):
        parts = [f".{part}" for part in range(v.scales - 1)]
        parts = parts if middle == "parts" and i == 2 else [""]
        modules += [f"conv{i}{part}:w" for part in parts]
        if i < convs or not v.preact:
            modules += [_norm(f"bn{i + v.preact}{part}", v) for part in parts]
    modules += [_norm("se_bn", v)] if v.se == "residual" else []
    return modules + (["se.fc.0:w", "se.fc.2:w"] if v.se != "none" else [])


def _norm(name: str, v: Variant) -> str:
    return {"batch": f"{name}:bn", "instance": ""}.get(v.norm, name)


_OF_BLOCK = re.compile(r"blocks\.(\d+)\.layer\.(\d+)\..+")
_MOST = 1025  # base widths and reductions to try, plus one


def options_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the options that follow from array shapes; empty for other networks.

    `shapes`: our name -> shape.
    """
    last: dict[int, int] = {}  # stage -> number of its last block
    for match in filter(None, map(_OF_BLOCK.fullmatch, shapes)):
        stage, block = int(match[1]), int(match[2])
        last[stage] = max(block, last.get(stage, 0))
    stages = [_stage_options(shapes, f"blocks.{i}.layer.0.") for i in range(len(last))]
    rows = [row for row in stages if row]
    if not rows or rows != stages:
        return {}
    sizes = {key: tuple(row.pop(key) for row in rows) for key in ("planes", "inner", "squeeze")}
    if any(row != rows[0] for row in rows):
        return {}  # not a single kind of block
    fields: dict[str, Any] = {"depths": tuple(last[i] + 1 for i in range(len(last)))}
    fields |= {"planes": sizes["planes"]} | rows[0]
    if fields.get("se") != "none":
        candidates = (64, 16, *range(1, _MOST))  # the usual ones first
        fits = (n for n in candidates if all(c // n == hidden for c, hidden in sizes["squeeze"]))
        fields["se_reduction"] = next(fits, None)
    if "groups" in fields:
        row = Variant(())._replace(**{key: fields[key] for key in fields if key in Variant._fields})
        variants = (row._replace(base_width=n) for n in range(_MOST))
        fits = (
            v.base_width
            for v in variants
            if sizes["inner"] == tuple(robust_blocks.inner_of(planes, v) for planes in v.planes)
        )
        fields["base_width"] = next(fits, None)
    for key, of in (("num_classes", "fc.kernel"), ("in_channels", "normalize.mean")):
        if of in shapes:
            fields[key] = shapes[of][-1]
    return {key: value for key, value in fields.items() if value is not None}


def _stage_options(shapes: Mapping[str, tuple[int, ...]], at: str) -> dict[str, Any] | None:
    """Recognize the kind of a stage's first block from its weights; None if it is not ours."""
    block = {key.removeprefix(at): shape for key, shape in shapes.items() if key.startswith(at)}
    parts = [key for key in block if re.fullmatch(r"conv2\.\d+\.kernel", key)]
    names = ("conv1.kernel", "conv2.0.kernel" if parts else "conv2.kernel", "conv3.kernel")
    kernels = [block[name] for name in names if name in block]
    if len(kernels) < 2 or any(len(kernel) != 4 or 0 in kernel for kernel in kernels):
        return None
    inner, outs = kernels[0][3], kernels[-1][3]
    row: dict[str, Any] = {"block": "basic", "inner": inner, "kernel_size": kernels[1][0]}
    if len(kernels) == 3:
        groups = kernels[1][3] // kernels[1][2]
        kind = "bottleneck" if groups == 1 else "inverted" if groups == inner else "aggregated"
        row["block"] = "hierarchical" if parts else kind
        if row["block"] in ("aggregated", "hierarchical"):
            row["groups"] = groups
    if parts:
        row["scales"] = len(parts) + 1
    return (
        row | _squeeze_options(block, inner, outs) | {"planes": outs // BLOCKS[row["block"]].outs}
    )


def _squeeze_options(
    shapes: Mapping[str, tuple[int, ...]], inner: int, outs: int
) -> dict[str, Any]:
    """Recognize a block's squeeze-and-excitation: its kind, and (channels, hidden)."""
    if len(shapes.get("se.fc1.kernel", ())) != 2:
        return {"se": "none", "squeeze": None}
    channels, hidden = shapes["se.fc1.kernel"]
    # On the inner channels, the hidden units are relative to the output channels.
    pair = (outs if channels == inner else channels, hidden)
    residual = any(key.startswith("se_bn.") for key in shapes)
    return ({"se": "residual"} if residual else {}) | {"squeeze": pair}


# Leaderboard title, and Table 2's millions of parameters and 1e9 multiply-adds.
_KNOWN: dict[str, tuple[str, PaperFigures | None]] = {
    "wrn_28_10": ("WideResNet-28-10", PaperFigures("36.5", "5.20")),
    "wrn_34_10": ("WideResNet-34-10", None),
    "wrn_34_12": ("WideResNet-34-12", PaperFigures("66.5", "9.60")),
    "wrn_46_14": ("WideResNet-46-14", PaperFigures("128", "18.6")),
    "wrn_70_16": ("WideResNet-70-16", PaperFigures("267", "38.8")),
    "wrn_34_r": ("WideResNet-34-R", PaperFigures("68.1", "19.1")),
    **{f"wrn_a{i}": (f"WRN-A{i}", None) for i in _A},
    "wrn_a4_silu": ("WRN-A4 with SiLU", None),
    "robustresnet_a1": ("RobustResNet-A1", PaperFigures("19.2", "5.11")),
    "robustresnet_a2": ("RobustResNet-A2", PaperFigures("39.0", "10.8")),
    "robustresnet_a3": ("RobustResNet-A3", PaperFigures("75.9", "19.9")),
    "robustresnet_a4": ("RobustResNet-A4", PaperFigures("147", "39.4")),
}


def _reference(name: str) -> TorchVariant:
    plain = Variant(())._asdict()
    fields = VARIANTS[name]._asdict().items()
    return TorchVariant("robust_resnet.py", {k: v for k, v in fields if v != plain[k]})


MEMBERS = {
    name: Member(_reference(name), paper, counted_at=32, num_classes=10, title=title)
    for name, (title, paper) in _KNOWN.items()
}
_STEM, _HEAD = r"stem_conv\..*", r"fc\..*"
NAMES = Names(TORCH_NAMES, torch_keys, _STEM, _HEAD, OTHER_NAMES, options_of)
FAMILY = Family(
    "robust_resnet", "RobustResNet", VARIANTS, maker, NAMES, MEMBERS, "all", any_size=True
)
