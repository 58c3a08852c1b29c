"""RobustScaling: `jaxrobust scaling 5e9` for depths and widths of a residual network.

Prints the rule's solution for this many multiply-adds per image, the nearest integers of equal
cost, their cost, and for comparison the published networks A1 to A4. `--study` lists the networks
of a study instead, one per line: name and options for `models.create` or a config (`model.name`,
`model.options`), in the study of ratios also the cost, and finally the config that trains it
(`jaxrobust train CONFIG`). The block studies have four capacities.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import answer
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience

_PREFIX = {"basic": "wrn_a", "robust": "robustresnet_a"}
_HEAD = (
    f"{'':16} {'depths':21} {'widths':18} {'r_D':>5} {'parameters, M':>13} {'multiply-adds, G':>16}"
)


@dataclass(frozen=True, kw_only=True)
class ScalingFlags:
    """The size of the network."""

    multiply_adds: float = flag(
        "Multiply-adds of convolutions and linear maps for one image; default: 5e9.",
        5e9,
        word=True,
        nargs="?",
    )
    block: str = flag("Block: basic, or robust for RobustResBlocks.", "basic")
    image_size: int = flag("Image size in pixels.", 32, least=1)
    study: str | None = flag(
        "Study to list: depth, width or ratio; or, for the block, blocks, cardinality, scales, "
        "kernel or activation (with weight decay and data sets)."
    )
    capacity: str | None = flag(
        "Only one capacity of a block study: wrn_28_10, wrn_34_12, wrn_46_14 or wrn_70_16."
    )
    json: bool = shared("json", False)


def run(flags: ScalingFlags) -> dict[str, Any]:
    """Print the networks, and return them."""
    if flags.capacity and not flags.study:
        raise ValueError(f"--capacity={flags.capacity} is for a study; name one with --study")
    with patience.of(patience.LOADING):
        from jaxrobust.models.families.robust_resnets import robust_resnet
        from jaxrobust.papers import scaling, studies

    sizes: dict[str, Any] = {"block": scaling.known(flags.block), "image_size": flags.image_size}
    if flags.study:
        cost = {"multiply_adds": flags.multiply_adds} | sizes
        networks = studies.study(flags.study, capacity=flags.capacity, **cost)
        for network in networks:
            costs = "" if network.share is None else f"{_costs(network.share)}; "
            line = _config(network.name, {**network.options, **network.settings})
            print(f"{network.name} {network.options}  # {costs}{line}")
        return {"study": flags.study, "networks": [network._asdict() for network in networks]}
    solution = scaling.robust_scaling(flags.multiply_adds, **sizes)
    rows: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "solution": (solution.depths, solution.widths),
        "rounded": (solution.rounded_depths, solution.rounded_widths),
    }
    for name in (f"{_PREFIX[flags.block]}{number}" for number in (1, 2, 3, 4)):
        rows[name] = robust_resnet.VARIANTS[name].depths, robust_resnet.VARIANTS[name].widths
    print(_HEAD)
    lines = {name: _line(name, *row, **sizes) for name, row in rows.items()}
    print(f"the rounded ones cost {_costs(solution.share)}")
    return {"networks": lines, "cost": solution.cost._asdict(), "share": solution.share}


def _config(name: str, options: dict[str, Any]) -> str:
    words = [name]
    for key, value in options.items():
        if key == "first_conv":  # which follows from its block
            continue
        value = ("yes" if value else "no") if isinstance(value, bool) else value
        words.append(f"{key}={'-'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return f"configs/cifar_bat.py:{','.join(words)}"


def _costs(share: float) -> str:
    return f"{share:.3f} of the requested multiply-adds"


def _line(
    name: str, depths: Sequence[float], widths: Sequence[float], **sizes: Any
) -> dict[str, Any]:
    from jaxrobust.papers import scaling

    costs = scaling.cost(depths, widths, **sizes)
    share = sum(depths) / (sum(depths) + sum(widths))
    texts = (" ".join(f"{n:.4g}" for n in numbers) for numbers in (depths, widths))
    numbers = share, costs.parameters / 1e6, costs.multiply_adds / 1e9
    print("{:16} {:21} {:18} {:5.3f} {:13.3f} {:16.3f}".format(name, *texts, *numbers))
    return {"depths": depths, "widths": widths, "r_D": share, **costs._asdict()}


def main(argv: Sequence[str] | None = None) -> None:
    """Answer as the command line says."""
    answer(run, fields.read(ScalingFlags, __doc__, argv), "run the same command to print it again")


if __name__ == "__main__":  # as `jaxrobust.scaling` was started
    main()
