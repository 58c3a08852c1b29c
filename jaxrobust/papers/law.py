"""The cost of an AutoAttack accuracy on CIFAR-10, by a scaling law of published runs.

Bartoldson et al. 2024 (arXiv 2404.09349) trained wide residual networks with TRADES, ten steps and
generated images, each seen about once, and fitted the loss of the CW attack on the test images as
L = A / N^alpha + B / D^beta + E, with N parameters, D images seen, and B and E that depend on the
images' FID (their second approach). The line from loss to accuracy is theirs too. AutoAttack's
accuracy is this line, shifted by the mean difference to the published runs below; their spread
gives the interval. None of these networks was trained here.
"""

import contextlib
import itertools
import math
import shutil
import statistics
import textwrap
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxrobust.doctor.estimate import devices as targets
from jaxrobust.runtime.commandline.arguments import number
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience, spelling
from jaxrobust.training.update.value_checks import must_be

DATASET, REAL = "cifar10", 50_000
DEVICES, UTILISATION = "h100:8", 0.2
FID = 1.65  # of the images that the law was fitted to: discriminator guidance, 20 steps
# Printed by the authors' notebook, Scaling_law_fitting_and_plots.ipynb of their repository
# (bbartoldson/Adversarial-Robustness-Limits), with FIDs' exponents of E and B.
A, B, E = 6.686980024164729, 7.551688897933183, 0.5603731625795364
ALPHA, BETA = 0.24434519315396275, 0.2281458937440602
E_FID, B_FID = 0.15552449537214338, -0.2767735799358655
# FLOPs by parameters and images (scaling_law_utils.py): 27 forward passes of an image.
SCALE = 7822
# Accuracy under CW, a share, of a loss: the line through the three limits that the notebook prints,
# (FID 6.79, 75.31%), (1.65, 82.86%) and (0, 88.63%) at 1e30 FLOPs, which lie on one to 1e-15.
SLOPE, INTERCEPT = -0.7495829295025612, 1.2574949163082845
LEAST = 55.0  # %: below it, runs without generated images are what one knows


class PublishedRun(NamedTuple):
    """A run of the papers: its parameters and the images seen, in millions, and AutoAttack in %."""

    depth: int
    width: int
    images: float
    fid: float
    robust: float


# Three from the notebook's table; two by the epochs in its configs/README.md; AutoAttack as in
# RobustBench's rows. The last two are from Wang et al. 2023 (arXiv 2302.04638): 100 million images,
# as the notebook counts them, and 2,400 epochs, the longest in that paper, on 20 million images,
# which were therefore seen about five times. Their FID is assumed to equal the law's.
PUBLISHED_RUNS = (
    PublishedRun(58, 12, 179.2, 1.4, 70.85),
    PublishedRun(82, 12, 149.8, 1.4, 71.41),
    PublishedRun(82, 16, 306.4, 1.4, 73.21),
    PublishedRun(82, 8, 341.0, 1.4, 71.59),
    PublishedRun(94, 16, 500.0, 1.4, 73.71),
    PublishedRun(70, 16, 100.0, FID, 70.69),
    PublishedRun(28, 10, 120.0, FID, 67.31),
)
_T_6 = 2.4469  # of Student's distribution with 6 degrees of freedom, 97.5%
# Depths, each with its largest width; beyond it, a deeper network of equal size is used.
_SHAPES = ((28, 12), (34, 14), (58, 14), (70, 16), (82, 16), (94, 999))
_NEAR = 0.16  # tolerance of the logarithm of parameters


class LawPoint(NamedTuple):
    """A network and the length of its training."""

    depth: int
    width: int
    parameters: int
    images: float  # seen, each about once
    flops: float


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The target accuracy, and the devices for its cost."""

    target: float = flag("AutoAttack accuracy, in percent.", required=True, reads=number)
    dataset: str = flag(
        f"Data set; the law only covers {DATASET}.",
        DATASET,
        reads=lambda _, text: spelling.dataset(text),
    )
    on: str = flag(f"Chips by name; default: {DEVICES}.", DEVICES, metavar="DEVICES")
    utilisation: float = flag(
        f"Assumed share of the chips' bfloat16 peak; default: {UTILISATION}.",
        str(UTILISATION),
        reads=number,
    )
    price: float | None = flag("Price of one chip for one hour, in any currency.", reads=number)
    json: bool = flag("Print one JSON object on the last line.", False)


def parameters(depth: int, width: int) -> int:
    """Count the parameters of DeepMind's WideResNet of 10 classes."""
    blocks, channels = (depth - 4) // 6, [16, *((16 << i) * width for i in range(3))]
    total = 27 * 16
    for ins, outs in itertools.pairwise(channels):
        for i in range(blocks):
            first = ins if i == 0 else outs
            total += 2 * (first + outs) + 9 * outs * (first + outs)
            total += first * outs if first != outs else 0
    return total + 2 * channels[-1] + 10 * channels[-1] + 10


def _terms(fid: float) -> tuple[float, float]:
    moved = math.log1p(fid) - math.log1p(FID)
    return B * math.exp(B_FID * moved), E * math.exp(E_FID * moved)


def loss(params: float, images: float, *, fid: float = FID) -> float:
    """Predict the CW loss from the numbers of parameters and of images seen."""
    b, e = _terms(fid)
    return A / params**ALPHA + b / images**BETA + e


def accuracy(value: float) -> float:
    """Convert a CW loss to an accuracy in %."""
    return 100 * (INTERCEPT + SLOPE * value)


def calibration() -> tuple[float, float]:
    """Compare AutoAttack accuracies of the published runs with the law's CW accuracies.

    Returns:
      the mean difference, in points, and the half width of the 95% interval for a new run.
    """
    differences = [
        run.robust - accuracy(loss(parameters(run.depth, run.width), 1e6 * run.images, fid=run.fid))
        for run in PUBLISHED_RUNS
    ]
    spread = statistics.stdev(differences) * math.sqrt(1 + 1 / len(differences))
    return statistics.mean(differences), _T_6 * spread


def limit() -> float:
    """Compute the AutoAttack accuracy, in %, that no size and length exceeds."""
    return accuracy(_terms(FID)[1]) + calibration()[0]


def cheapest(target: float) -> LawPoint:
    """Find the network and training length that reach an AutoAttack accuracy with the fewest FLOPs.

    The law's optimum is computed as in Hoffmann et al. 2022. The network has about as many
    parameters, and the number of images follows from it.
    Raises:
      ValueError: the accuracy is beyond the law's limit, or too low.
    """
    if not LEAST <= target < limit():
        raise ValueError(
            f"--target {target:g}: the law of the published runs covers {LEAST:g} to "
            f"{limit():.1f}%, with images of FID {FID:g}; choose a target in this range"
        )
    value = ((target - calibration()[0]) / 100 - INTERCEPT) / SLOPE
    b, e = _terms(FID)
    optimum = (A * (1 + ALPHA / BETA) / (value - e)) ** (1 / ALPHA)
    near = nearest(optimum)
    params = parameters(*near)
    data_loss = value - e - A / params**ALPHA
    if data_loss <= 0:
        raise ValueError(
            f"--target {target:g} needs more than the {params:,} parameters of "
            f"WRN-{near[0]}-{near[1]} by the law of the published runs; choose a lower target"
        )
    images = (b / data_loss) ** (1 / BETA)
    return LawPoint(*near, params, images, SCALE * params * images)


def nearest(wanted: float) -> tuple[int, int]:
    """Find the shallowest usual depth, and its width, with about this many parameters."""
    near = (0, 0)
    for depth, most in _SHAPES:
        off = {w: abs(math.log(parameters(depth, w) / wanted)) for w in range(1, most + 1)}
        near = depth, min(off, key=lambda width: off[width])
        if off[near[1]] < _NEAR:
            break
    return near


def answer(settings: TargetSettings) -> dict[str, Any]:
    """Print the cost of an accuracy, with its interval, and return it."""
    check(settings)
    with patience.of("loading JAX and looking for its devices"):
        targets.prepare(settings.on)
        target = targets.target(settings.on)
    if target.here or target.chip is None:
        raise ValueError(
            f"--on {settings.on}: the law counts operations, so it needs the name of a chip; "
            "write, for example, h100:8"
        )
    speed = target.chip.flops * settings.utilisation * 3600
    _, half = calibration()
    points: dict[str, LawPoint | None] = {"expected": cheapest(settings.target)}
    for name, moved in (("least", -half), ("most", half)):
        points[name] = None
        with contextlib.suppress(ValueError):  # above the limit: no length is enough
            points[name] = cheapest(max(settings.target + moved, LEAST))
    rows = {name: _row(point, speed, settings.price) for name, point in points.items()}
    estimate = {
        "target": settings.target,
        "dataset": settings.dataset,
        "on": target.kind,
        "chips": target.chips,
        "utilisation": settings.utilisation,
        "interval_points": round(half, 2),
        "limit": round(limit(), 1),
        **rows,
    }
    print(page(estimate))
    return estimate


def check(settings: TargetSettings) -> None:
    """Refuse settings that the law does not cover."""
    if settings.dataset != DATASET:
        raise ValueError(
            f"--dataset {settings.dataset}: the law of published runs only covers {DATASET} under "
            f"Linf 8/255; write --dataset {DATASET}, or estimate a config"
        )
    used, price = settings.utilisation, settings.price
    must_be("--utilisation", used, 0 < used <= 1, "above 0 and at most 1, such as 0.4")
    must_be("--price", price, price is None or 0 < price < float("inf"), "above 0")


def _row(point: LawPoint | None, speed: float, price: float | None) -> dict[str, Any] | None:
    if point is None:
        return None
    hours = point.flops / speed
    row = {
        "network": f"WRN-{point.depth}-{point.width}",
        "parameters": point.parameters,
        "images": round(point.images),
        "epochs": round(point.images / REAL),
        "flops": point.flops,
        "chip_hours": hours,
    }
    return row if price is None else row | {"cost": hours * price}


def page(estimate: dict[str, Any]) -> str:
    """Write an estimate as text."""
    columns = {key: estimate[key] for key in ("expected", "least", "most")}
    lines = [
        f"{estimate['target']:g}% under AutoAttack, {estimate['dataset']}, Linf 8/255, on "
        f"{estimate['on']}",
        "",
        f"{'':22}{'expected':>14}{'at least':>14}{'at most':>14}",
    ]
    shown = {
        "network": ("network (SiLU)", "{}"),
        "parameters": ("parameters", "{:,}"),
        "images": ("images seen", "{:.3g}"),
        "epochs": ("epochs of 50,000", "{:,}"),
        "flops": ("FLOPs", "{:.2g}"),
        "chip_hours": ("chip-hours", "{:,.3g}"),
        "cost": ("cost", "{:,.3g}"),
    }
    for key, (word, template) in shown.items():
        if key in columns["expected"]:
            cells = [template.format(row[key]) if row else "unlimited" for row in columns.values()]
            lines.append(f"{word:22}" + "".join(f"{cell:>14}" for cell in cells))
    robust = [run.robust for run in PUBLISHED_RUNS]
    remarks = [
        "This law is fitted to others' runs (Bartoldson et al. 2024, arXiv 2404.09349), not to "
        "ours: nothing was trained or measured here. Its runs use TRADES with ten steps on "
        f"generated images of FID {FID:g}, each seen once; in the published runs below, an eighth "
        "to a fifth of the images are real, and generated ones were seen up to about five times.",
        f"At least and at most lie {estimate['interval_points']:g} points to either side, the 95% "
        f"interval for a new run, given {len(robust)} published ones between {min(robust):g} and "
        f"{max(robust):g}%; no run exceeds {estimate['limit']:g}%.",
        f"Chips are assumed to reach {estimate['utilisation']:.0%} of their bfloat16 peak.",
    ]
    if not min(robust) <= estimate["target"] <= max(robust):
        remarks.append(
            f"{estimate['target']:g}% is outside the range of those runs, so the law is "
            "extrapolated."
        )
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 100)
    wrapped = [textwrap.fill(text, width, subsequent_indent="  ") for text in remarks]
    return "\n".join([*lines, "", *wrapped])
