"""Choose a run's weights on its selection split: `jaxrobust select RUN`.

Candidates are the weights that the run saved (`checkpoint.keep_every_epochs`), raw and averaged, at
each --image_size. RUN/selection.json records the result of each, and the choice with its reason;
RUN/selection.png shows the curves. For a run with several norms, an image is robust if it
withstands all of them. With --attack autoattack, adversarial images of earlier candidates are tried
first. Only candidates that may be the best after APGD-CE go through the other attacks; the rest get
an upper bound. The test split is not used: afterwards `jaxrobust evaluate --workdir RUN --selected`
tests the choice, once. Repeating the command computes only missing results.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason, which is printed,
such as a full disk; 130 interrupted.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import shared
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import answer, how_many, quiet_libraries
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience


@dataclass(frozen=True, kw_only=True)
class SelectFlags:
    """The candidates, the images and the attack of a choice."""

    run: Path = flag("Workdir of the run.", word=True, required=True, metavar="RUN")
    phase: str | None = shared("phase", default="the last one with saved weights")
    image_size: tuple[int, ...] = flag(
        "Image sizes in pixels, one or several; default: from the run.",
        (),
        least=1,
        metavar="PIXELS",
    )
    attack: str = flag(
        "Attack; AutoAttack takes longer.", "apgd-ce", choices=["apgd-ce", "autoattack"]
    )
    steps: int | None = flag("Number of steps of APGD-CE, such as 1 or 10; default: 10.", least=1)
    split: str | None = flag(
        "Split to choose on; default: the selection split of the run, never its test split."
    )
    n: int = flag(
        "Number of images, spread over the classes of the split; default: all.",
        "all",
        reads=how_many,
    )
    batch: int | None = flag("Batch size; default: evaluation.batch_size.", least=1)
    json: bool = shared("json", False)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and choose the weights."""
    flags = fields.read(SelectFlags, __doc__, argv)
    quiet_libraries()
    answer(_selected, flags, "run the same command to continue")


def _selected(flags: SelectFlags) -> dict[str, Any]:
    settings = asdict(flags)
    del settings["json"]
    if flags.attack == "autoattack" and flags.steps is not None:
        raise ValueError("--steps only applies to APGD-CE; leave it out with --attack autoattack")
    if flags.attack != "autoattack" and flags.steps is None:
        del settings["steps"]
    with patience.of(patience.LOADING):
        from jaxrobust.results.selection import choice

    return choice.select(choice.SelectionSettings(**settings))
