"""The table of all architectures: cost, stem, norms, and the checkpoints that load."""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from math import isqrt, prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu import parameter_overview as overview

from jaxrobust import models
from jaxrobust.models.interface.family import PaperFigures
from jaxrobust.models.published import PUBLISHED, Published, own_id
from jaxrobust.types import Classifier, Params

# Name -> parameters, multiply-adds per image, stem, norms, as `refresh_counts.py` writes them.
COUNTED: dict[str, Any] = json.loads(Path(__file__).with_name("counted.json").read_text())


class ArchitectureRow(NamedTuple):
    """A row of the table."""

    name: str
    parameters: int
    multiply_adds: int  # of convolutions, linear maps and attention products, per image
    image_size: int  # the size for which they are counted
    stem: str
    norms: str
    paper: PaperFigures | None
    published: dict[str, Published]


def architecture(name: str) -> ArchitectureRow:
    """Return a network's row from the bundled figures; count it if it is not listed."""
    return _line(name, *COUNTED[name]) if name in COUNTED else counted(name)


def counted(name: str) -> ArchitectureRow:
    """Return a network's row by tracing it; nothing is computed or compiled."""
    # If possible, one block is traced for a whole stage, and counted as often as it runs.
    fast = {"scan": True} if "scan" in models.variant(name)._fields else {}
    net, (params, stats) = _traced(name, **fast)
    adds = multiply_adds(net, params, stats, image_size=models.member(name).counted_at)
    size = sum(array.size for array in params.values())
    batch = {key.removesuffix(".var") for key in stats if key.endswith(".var")}
    layer = {key.removesuffix(".scale") for key in params if key.endswith(".scale")} - batch
    norms = "+".join(norm for norm, layers in (("LN", layer), ("BN", batch)) if layers)
    return _line(name, size, adds, _stem(name, params), norms)


def _line(name: str, parameters: int, adds: int, stem: str, norms: str) -> ArchitectureRow:
    member = models.member(name)
    published = {key: net for key, net in PUBLISHED.items() if net.model == name}
    return ArchitectureRow(
        *(name, parameters, adds, member.counted_at, stem, norms, member.paper, published)
    )


def _traced(name: str, **options: Any) -> tuple[Classifier, Any]:
    """Return a network at its counting size, and the shapes of its weights."""
    of = models.member(name)
    sizes = {"num_classes": of.num_classes, "image_size": of.counted_at}
    net = models.create(name, **sizes, **options)
    return net, jax.eval_shape(net.init, jax.random.key(0))


def parameters(name: str) -> str:
    """Return the table of a network's parameters: names, shapes, types, sizes, and the total."""
    _, (params, _) = _traced(name)
    return overview.get_parameter_overview(params, include_stats=False)


def multiply_adds(
    net: Classifier, params: Params, stats: Params, *, image_size: int, in_channels: int = 3
) -> int:
    """Count the multiply-adds of all convolutions and matrix products for one image."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, in_channels), jnp.float32)
    program = jax.make_jaxpr(lambda *args: net.apply(*args)[0])(params, stats, images)
    # CaiT mixes heads by sums, which are not matrix products.
    mixes = [array.size for key, array in params.items() if re.search(r"proj_[lw]\.kernel", key)]
    is_cait = mixes and "pos_embed" in params  # otherwise a user's network
    mixed = sum(mixes) * params["pos_embed"].shape[1] ** 2 if is_cait else 0
    return _count(program.jaxpr) + mixed


def _count(jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> int:
    kind, parameters = equation.primitive.name, equation.params
    if kind == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * prod(shape[axis] for axis in contracted)
    if kind == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval, parameters["dimension_numbers"]
        features = kernel.shape[numbers.rhs_spec[0]]
        return equation.outvars[0].aval.size * kernel.size // features
    if kind == "cond" and (platforms := parameters.get("branches_platforms")):
        return _count(parameters["branches"][platforms.index(None)].jaxpr)  # None: any other
    times = parameters["length"] if kind == "scan" else 1
    return times * sum(map(_count, _inner(parameters.values())))


def _inner(values: Iterable[Any]) -> Iterable[Any]:
    """Yield the programs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner(value)
        elif hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def _stem(name: str, params) -> str:
    """Describe a stem: its number of 3x3 convolutions, or the window of its only one."""
    pattern = models.family(name).names.stem
    kernels = (a for key, a in params.items() if re.fullmatch(pattern, key) and "kernel" in key)
    # A linear map reads the pixels of a patch.
    sides = (a.shape[0] if a.ndim == 4 else isqrt(a.shape[0] // 3) for a in kernels)
    windows = [side for side in sides if side > 1]
    if len(windows) > 1:
        return f"conv x{len(windows)}"
    (side,) = windows or [1]
    return f"conv {side}" if side % 2 else f"patch {side}"


HEAD = (
    f"{'':26} parameters, M     multiply-adds, G\n"
    f"{'architecture':24} {'here':>7} {'paper':>6} {'px':>3} {'here':>6} {'paper':>6} "
    f"{'stem':8} {'norms':5} weights"
)
NOTES = """
px: side of the images for which multiply-adds are counted, in convolutions,
linear layers and attention; the papers' figures for ConvNeXt and ViT include
layer norms, and those at 32 px batch norms. paper: Singh, Croce, Hein 2023,
Tables 14 and 2; at 32 px, Huang et al. 2022, Table 2 (10 classes, as here);
otherwise Debenedetti's thesis; "!" marks a known misprint there. cifar_*: Tang
et al. 2022, Table 1, truncated to two decimals, and here at 224 px, with 10
classes; "?" marks the figure of a different network: ViTAE's has 1000 classes
(23.19 here), LeViT's is not defined. stem: side of the patch, or number of 3x3
convolutions, or kernel size of a single one. weights: RobustBench checkpoints;
`jaxrobust models NAME` lists them."""
CHECKPOINT_NOTES = """\
clean, AA: published accuracy in % on RobustBench's images, clean and under
AutoAttack: 5,000 of ImageNet (Linf 4/255) or, if no preprocessing is named,
10,000 of CIFAR-10 (Linf 8/255; cifar10/L2: 0.5) or CIFAR-100 (cifar100/Linf:
8/255); "-": for common corruptions. input: norm. has mean and std inside.
license: of the weights, as stated in RobustBench's LICENSE.
`--weights CHECKPOINT` fetches one; --json prints its address, the options of
its network and, if one is published, its sha256."""


def line(row: ArchitectureRow, width: int = 100) -> str:
    """Format a row for people in `width` columns; checkpoints that do not fit follow below."""
    paper = row.paper or PaperFigures(None, "")
    mark = "!" if paper.misprint else "?" if paper.other else ""
    paper_figures = [
        figure and figure + mark for figure in (paper.parameters or "", paper.multiply_adds)
    ]
    cells = (
        f"{row.name:24} {row.parameters / 1e6:7.2f} {paper_figures[0]:>6} "
        f"{row.image_size:3d} {row.multiply_adds / 1e9:6.3f} {paper_figures[1]:>6} "
        f"{row.stem:8} {row.norms:5} "
    )
    # Author and year, as in Salman2020; names without a year are kept.
    short = [re.match(r"[A-Za-z]+\d{4}|.+", own_id(key))[0] for key in row.published]  # type: ignore[index]
    text = " ".join(dict.fromkeys(short))
    if len(cells) + len(text) <= width:
        return (cells + text).rstrip()
    below = textwrap.wrap(text, width, initial_indent=" " * 20, subsequent_indent=" " * 20)
    return "\n".join([cells.rstrip(), *below])


def checkpoints(rows: Sequence[ArchitectureRow]) -> str:
    """Return the published checkpoints of some rows in full; empty if there are none."""
    networks = [(key, net) for row in rows for key, net in row.published.items()]
    width = max(map(len, ["checkpoint", *(key for key, _ in networks)]))
    lines = [
        f"\n{'checkpoint':{width}} {'clean':>5} {'AA':>5} {'input':5} {'license':10} preprocessing"
    ]
    for key, net in networks:
        robust = "    -" if net.autoattack is None else f"{net.autoattack:5.2f}"
        figures = f"{net.clean:5.2f} {robust} {'norm.' if net.normalised else '[0,1]'}"
        lines.append(
            f"{key:{width}} {figures} {net.license or 'not stated':10} {net.preprocessing}"
        )
    return "\n".join([*lines, CHECKPOINT_NOTES]) if networks else ""


def record(row: ArchitectureRow) -> dict[str, Any]:
    """Return a row as plain values."""
    plain = row._asdict() | {"paper": row.paper and row.paper._asdict()}
    return plain | {"published": {key: net._asdict() for key, net in row.published.items()}}
