"""Make a page that ranks networks, from verified bundles only.

`jaxrobust board BUNDLES --out SITE`: every bundle, written by `jaxrobust evaluate --bundle`, is
checked as by `jaxrobust verify`, which also attacks images that survive according to its record.
The resulting bounds determine the ranks. SITE/index.html has a board for each data set and threat,
one for the union of three norms if a network has a bundle for each, and one for common corruptions.
A file networks.toml next to the bundles names the network of each bundle, with the arguments for
verify:

    [resnet18_linf]
    weights = "Salman2020Do_R18"
    name = "Salman et al. 2020, ResNet-18"

Its keys are weights or function, dataset, split, classes, data_dir and frost, and the names to show
on the board: name (of the network) and data (of the data set). Paths are relative to the current
folder. Bundles that fail verification or have no network are listed with the reason, on stderr and
on the page, and not ranked.

Exit codes: 0 every bundle is on the page; 1 one is left out; 2 a mistake, with one sentence on
stderr; 3 another reason, which is printed, such as a full disk; 130 interrupted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import answer
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience


@dataclass(frozen=True, kw_only=True)
class BoardFlags:
    """The bundles of the page, their networks, and the folder of the page."""

    bundles: tuple[Path, ...] = flag(
        "Bundles, or folders that contain several.", word=True, required=True, metavar="BUNDLES"
    )
    out: Path = flag("Folder for the page, index.html.", required=True)
    networks: Path | None = flag(
        "File that names the networks; default: networks.toml next to each bundle."
    )
    batch: int | None = flag("Batch size.", least=1)
    sample: int = flag("Number of surviving images to attack, per bundle.", 60, least=1)
    seed: int | None = flag(
        "Seed of the samples and attacks; default: random for each bundle.", least=0
    )
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> int:
    """Verify the bundles and write the page; return the exit code."""
    flags = fields.read(BoardFlags, __doc__, argv)
    return 0 if answer(_made, flags, "run the same command to start again")["whole"] else 1


def _made(flags: BoardFlags) -> dict[str, Any]:
    with patience.of(patience.LOADING):
        from jaxrobust.results.board import board_page

    settings = {"batch": flags.batch, "sample": flags.sample, "seed": flags.seed}
    return board_page.make(flags.bundles, flags.out, networks=flags.networks, **settings)
