"""Networks that the package ships with, by their names: no training, no download."""

from pathlib import Path
from typing import NamedTuple

KINDS = (  # of sources, as help and messages say them
    "a file, an imported folder, the workdir of a run, https://..., "
    "hf://ORG/REPO[@REVISION][/FILE], a RobustBench id such as Salman2020Do_R18, a timm id such as "
    "convnext_tiny.fb_in1k, or quickstart, which ships with the package"
)
_HERE = Path(__file__).resolve().parents[1] / "shipped"


class ShippedRun(NamedTuple):
    """A run that is kept in the package: its records, its curve, and the weights of each phase."""

    folder: Path
    dataset: str  # that it was trained on, which ships too
    phases: tuple[str, ...]  # the last one is meant where none is named


RUNS = {"quickstart": ShippedRun(_HERE / "quickstart", "digits", ("pretrain", "train"))}


def kept(name: str) -> Path | None:
    """Find the folder of a run that ships, by its name; None: no such name."""
    return RUNS[name].folder if name in RUNS else None


def weights(text: str) -> Path | None:
    """Find the folder of weights of `NAME` or `NAME:PHASE`; None: no run of that name ships.

    Raises:
      ValueError: the run has no such phase.
    """
    name, _, phase = text.partition(":")
    if name not in RUNS:
        return None
    run = RUNS[name]
    if phase not in ("", *run.phases):
        raise ValueError(f"{text}: {name} has no phase {phase!r}; one of {', '.join(run.phases)}")
    return run.folder / (phase or run.phases[-1])
