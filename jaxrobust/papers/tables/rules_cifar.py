"""What measures the rows of the two papers on small images: Tang et al. 2022, Huang et al. 2022."""

from collections.abc import Callable
from typing import Any

from jaxrobust.papers.tables.rules import Argument, Row, Rule


def _option(name: str) -> Callable[[Row], Any]:
    return lambda row: row["options"].get(name)


def _chosen(row: Row) -> str | None:
    """Choose the epoch on the images that are reported, as both papers do."""
    return "test" if row["image_size"] == 32 else None


TWENTY_ARCHITECTURES = (
    Rule(
        {"dataset": ("cifar10",)},
        "cifar_aligned",
        (
            Argument("", "model"),
            Argument("mode", "objective", "adversarial"),
            Argument("order", _option("order")),
            Argument("patch", _option("patch")),
            Argument("selection", _chosen),
        ),
    ),
    Rule(
        {"dataset": ("imagenette",)},
        "cifar_aligned",
        (Argument("", "model"), Argument("mode", "objective", "adversarial")),
        split="val",
    ),
)


ROBUST_RESNETS = (
    Rule(
        {"table": ("box_scaling",)},
        commands=(
            "jaxrobust scaling {macs_target_g}e9",
            "jaxrobust scaling {macs_target_g}e9 --block robust",
        ),
    ),
    Rule({"name": ("networks of the depth grid",)}, commands=("jaxrobust scaling --study depth",)),
    Rule({"name": ("networks of the width grid",)}, commands=("jaxrobust scaling --study width",)),
    Rule(
        {"name": ("best share of depth in depth + width",)},
        commands=("jaxrobust scaling --study ratio",),
    ),
    Rule(
        {"name": ("WRN-34-R over WRN-A1, parameters and multiply-adds, at similar robustness",)},
        commands=("jaxrobust models wrn_34_r wrn_a1",),
    ),
    Rule({"table": ("text_2",)}, why="It is a difference between rows of tables with their lines."),
    Rule({"model": (None,)}, why="How {name} was trained is published nowhere."),
    Rule(
        {"recipe": ("AAT",)},
        "cifar_aat",
        (Argument("", "model"), Argument("extra", "extra_images", 0, {500_000: "500k"})),
    ),
    Rule(
        {},
        "cifar_bat",
        (
            Argument("", "model"),
            Argument("block", _option("block")),
            Argument("se", _option("se")),
            Argument("se_reduction", _option("se_reduction")),
            Argument("data", "train_dataset", "cifar10"),
            Argument("selection", _chosen),
        ),
    ),
)
