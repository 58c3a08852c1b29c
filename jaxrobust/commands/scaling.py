"""RobustScaling: `python -m jaxrobust.scaling 5e9` for depths and widths of a residual network.

Prints the solution of the rule for so many multiply-adds of an image, the whole numbers near it
that cost as much, what they cost, and beside them the published networks A1 to A4. `--study` lists
the networks of a study instead, one a line, as name and options of `models.create` or of a config
(`model.name`, `model.options`), behind which the study of ratios says what each costs.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jaxrobust.models import scaling
from jaxrobust.models.families import robust_resnet
from jaxrobust.models.scaling import robust_scaling
from jaxrobust.runtime.commandline.arguments import Arguments, answer

_PREFIX = {"basic": "wrn_a", "robust": "robustresnet_a"}
_HEAD = (
    f"{'':16} {'depths':21} {'widths':18} {'r_D':>5} {'parameters, M':>13} {'multiply-adds, G':>16}"
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = Arguments(__doc__)
    parser.add_argument(
        "multiply_adds",
        nargs="?",
        type=float,
        default=5e9,
        help="Multiply-adds of convolutions and linear maps for one image; default: 5e9.",
    )
    parser.flag("block", default="basic", help="Block: basic, or robust for RobustResBlocks.")
    parser.flag("image_size", type=int, default=32, help="Side of the images in pixels.")
    parser.flag("study", help="Study that is listed: depth, width, ratio or blocks.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the networks, and return them."""
    if args.image_size < 1:
        raise ValueError(f"--image-size={args.image_size} must be at least 1")
    sizes: dict[str, Any] = {"block": scaling.known(args.block), "image_size": args.image_size}
    if args.study:
        networks = scaling.study(args.study, multiply_adds=args.multiply_adds, **sizes)
        for network in networks:
            costs = "" if network.share is None else f"  # {_costs(network.share)}"
            print(f"{network.name} {network.options}{costs}")
        return {"study": args.study, "networks": [network._asdict() for network in networks]}
    found = robust_scaling(args.multiply_adds, **sizes)
    rows: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "solution": (found.depths, found.widths),
        "rounded": (found.rounded_depths, found.rounded_widths),
    }
    for number in (1, 2, 3, 4):
        row = robust_resnet.VARIANTS[f"{_PREFIX[args.block]}{number}"]
        rows[f"{_PREFIX[args.block]}{number}"] = (row.depths, row.widths)
    print(_HEAD)
    lines = {name: _line(name, *row, **sizes) for name, row in rows.items()}
    print(f"the rounded ones cost {_costs(found.share)}")
    return {"networks": lines, "cost": found.cost._asdict(), "share": found.share}


def _costs(share: float) -> str:
    return f"{share:.3f} of the multiply-adds asked for"


def _line(
    name: str, depths: Sequence[float], widths: Sequence[float], **sizes: Any
) -> dict[str, Any]:
    """Print a network, and return it."""
    costs = scaling.cost(depths, widths, **sizes)
    share = sum(depths) / (sum(depths) + sum(widths))
    texts = (" ".join(f"{n:.4g}" for n in numbers) for numbers in (depths, widths))
    print(
        "{:16} {:21} {:18} {:5.3f} {:13.3f} {:16.3f}".format(
            name, *texts, share, costs.parameters / 1e6, costs.multiply_adds / 1e9
        )
    )
    return {"depths": depths, "widths": widths, "r_D": share, **costs._asdict()}


def main(argv: Sequence[str] | None = None) -> None:
    """Answer as the command line says."""
    answer(run, parse(argv), "the same command prints it again")


if __name__ == "__main__":
    main(sys.argv[1:])
