"""Draw the loss around a network's weights: one PNG and one CSV.

`jaxrobust landscape --workdir RUN` (or --weights, as `jaxrobust evaluate` takes them). Computes the
mean cross-entropy of clean training images at 51 x 51 points of a plane, spanned by two random
directions with the norm of each filter. The same command resumes after an interruption.
Source: Li et al. 2018 (arXiv 1712.09913), as Tang et al. 2022 (arXiv 2209.14105) use it.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxrobust.commands.flags.shared import ImageFlags, NetworkFlags, shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import ending, quiet_libraries
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience

_PLANE = ("side", "reach", "points", "batch", "seed")


@dataclass(frozen=True, kw_only=True)
class LandscapeFlags(NetworkFlags, ImageFlags):
    """A network, its training images, and the points of the plane."""

    split: str | None = shared("split", default="from the run's training, or train")
    n: int = flag(
        "Number of images, spread over the classes of the split; default: 1000.", 1000, least=1
    )
    side: int = flag("Number of points per side, an odd number; default: 51.", 51, least=3)
    points: int = flag("Number of points per call; default: 51.", 51, least=1)
    batch: int = flag("Batch size; default: 250.", 250, least=1)
    seed: int = shared("seed", 0, least=0)
    reach: float = flag("Half the side length of the plane; default: 1.", 1.0)
    out: Path | None = shared("out")


def main(argv: list[str] | None = None) -> None:
    """Read the command line, compute what is missing, write both files."""
    quiet_libraries()
    again = "run the same command to continue"
    with ending(again, f". Once this is fixed, {again}"):
        flags = fields.read(
            LandscapeFlags, __doc__, argv, usual="workdir weights dataset n side out"
        )
        if flags.side % 2 == 0:
            raise ValueError(
                f"--side={flags.side} has no point in the middle, where the weights are; give an "
                "odd one"
            )
        if not 0 < flags.reach < math.inf:
            raise ValueError(f"--reach={flags.reach:g} must be above 0")
        with patience.of(patience.LOADING):
            from jaxrobust.papers.networks import landscape

        network_flags = asdict(flags)
        out = network_flags.pop("out")
        plane = landscape.Plane(**{name: network_flags.pop(name) for name in _PLANE})
        print("\n".join(map(str, landscape.written(network_flags, plane, out))))
