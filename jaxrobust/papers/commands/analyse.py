"""Visualize what a network has learned, and how attacks behave on it: one PNG and one CSV.

`jaxrobust analyse ANALYSIS --workdir RUN` (or --weights, as `jaxrobust evaluate` takes them). The
analyses are those of Debenedetti's thesis: perturbations, semantic-score, synthesis, effectiveness,
convergence; and augmentations, a contact sheet of your own images.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxrobust.commands.flags.shared import ImageFlags, NetworkFlags, ThreatFlags, shared
from jaxrobust.papers.networks import analyses
from jaxrobust.runtime.commandline import fields
from jaxrobust.runtime.commandline.arguments import ending, quiet_libraries
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience

USUAL = "workdir weights dataset n norm epsilon steps out"  # of --help


def _own(name: str, text: str, **options: Any) -> Any:
    """Return the field of a flag that only some analyses take; its help names them."""
    takers = [key for key, row in analyses.ANALYSES.items() if name in row.takes]
    return flag(f"{text} ({', '.join(takers)})", **options)


@dataclass(frozen=True, kw_only=True)
class AnalyseFlags(NetworkFlags, ImageFlags, ThreatFlags):
    """An analysis, a network and its images."""

    analysis: str = flag("Which analysis.", word=True, required=True, choices=[*analyses.ANALYSES])
    n: int | None = flag(
        "Number of images, spread over the classes of the split, or of samples.", least=1
    )
    steps: tuple[int, ...] = flag("Number of attack steps; some analyses accept several.", ())
    seed: int = shared("seed", 0, least=0)
    batch: int = flag("Batch size; results do not depend on it.", 64, least=1)
    out: Path | None = shared("out")
    sign: str | None = _own(
        "sign",
        "Perturbation to show: x_adv - x (attack), or the authors' x - x_adv (code); default: "
        "attack, but code for semantic-score.",
        choices=["attack", "code"],
    )
    judges: tuple[str, ...] = _own(
        "judges",
        "Other networks: runs, folders, ids, NAME=FILE, or PyTorch's torch:my_models.py:build.",
        default=(),
    )
    top: int | None = _own(
        "top", "Number of guesses per judge; default: 5, or 1 for 20 classes or fewer.", least=1
    )
    step_size: float | None = _own("step_size", "Step size of the synthesis; default: 0.225.")
    targets: tuple[int, ...] = _own("targets", "Target classes; default: random ones.", default=())
    seeds: int | None = _own(
        "seeds", "Number of random starts; default: 3, or 20 for convergence.", least=1
    )
    checkpoints: tuple[str, ...] = _own(
        "checkpoints",
        "Networks in the order of training, instead of the ones in --workdir.",
        default=(),
    )
    images: tuple[Path, ...] = _own("images", "Pictures, or folders of them.", default=())
    chain: str | None = _own(
        "chain", "Preset or chain, such as heavy or 'resized-crop|flip'; default: heavy."
    )
    views: int | None = _own("views", "Number of views per picture; default: 6.", least=1)


_NAMED = (*NetworkFlags.__annotations__, *ImageFlags.__annotations__, *ThreatFlags.__annotations__)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, compute, write both files."""
    quiet_libraries()
    again = "run the same command to start again"
    with ending(again, ". Once this is fixed, run the same command again"):
        values = asdict(fields.read(AnalyseFlags, __doc__, argv, usual=USUAL))
        network_flags = {name: values.pop(name) for name in _NAMED}
        settings = analyses.checked(values, network_flags)
        with patience.of(patience.LOADING):
            from jaxrobust.papers.networks import network_sample  # noqa: F401  # what takes long

        print("\n".join(map(str, analyses.written(settings))))
