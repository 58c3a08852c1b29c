"""Make a page that ranks networks, from bundles that verified and from nothing else.

`jaxrobust board BUNDLES --out SITE`: every bundle, which `jaxrobust evaluate --bundle` wrote, is
checked as `jaxrobust verify` does, which attacks images that it says survive: what that bounds is
what ranks. SITE/index.html then has a board for each data set and threat,
one for the union of three norms where a network has a bundle for each, and one for common
corruptions. A file networks.toml
next to the bundles says which network each is of; what it says is what verify is given:

    [resnet18_linf]
    weights = "Salman2020Do_R18"
    name = "Salman et al. 2020, ResNet-18"

Its keys are weights or function, dataset, split, classes, data_dir and frost, and, as the board is
to write them, name (of the network) and data (of the data set). Paths start where the command does.
A bundle that does not verify, or that names no network, is named with its reason, on stderr and on
the page, and not ranked.

Exit codes: 0 every bundle is on the page; 1 one is left out; 2 a mistake, with one sentence on
stderr; 3 another reason that it names, such as a full disk; 130 interrupted.
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
    """Which bundles the page is of, which networks they are of, and where the page goes."""

    bundles: tuple[Path, ...] = flag(
        "Bundles, or folders of several.", word=True, required=True, metavar="BUNDLES"
    )
    out: Path = flag("Folder of the page, index.html.", required=True)
    networks: Path | None = flag(
        "File of the networks; default: networks.toml next to each bundle."
    )
    batch: int | None = flag("Images at a time.", least=1)
    sample: int = flag("Number of standing images of each bundle to attack.", 60, least=1)
    seed: int | None = flag(
        "Seed of these samples and attacks; default: a random one of each bundle.", least=0
    )
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> int:
    """Verify the bundles and write the page; return the exit code."""
    flags = fields.read(BoardFlags, __doc__, argv)
    return 0 if answer(_made, flags, "the same command starts again")["whole"] else 1


def _made(flags: BoardFlags) -> dict[str, Any]:
    with patience.of(patience.LOADING):
        from jaxrobust.results.board import board_page

    settings = {"batch": flags.batch, "sample": flags.sample, "seed": flags.seed}
    return board_page.make(flags.bundles, flags.out, networks=flags.networks, **settings)
