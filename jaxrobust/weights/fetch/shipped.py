"""Networks bundled with the package, by name: no training, no download."""

from pathlib import Path
from typing import NamedTuple

KINDS = (  # of sources, for help and messages
    "a file, an imported folder, the workdir of a run, https://..., "
    "hf://ORG/REPO[@REVISION][/FILE], a RobustBench id such as Salman2020Do_R18, a timm id such as "
    "convnext_tiny.fb_in1k, or quickstart, which ships with the package"
)
_HERE = Path(__file__).resolve().parents[1] / "shipped"


class ShippedRun(NamedTuple):
    """A run bundled with the package: its records, its curve, and each phase's weights."""

    folder: Path
    dataset: str  # the data set it was trained on, also bundled
    phases: tuple[str, ...]  # the last one is the default


RUNS = {"quickstart": ShippedRun(_HERE / "quickstart", "digits", ("pretrain", "train"))}


def kept(name: str) -> Path | None:
    """Return the folder of a bundled run; None: no such name."""
    return RUNS[name].folder if name in RUNS else None


def weights(text: str) -> Path | None:
    """Return the weights folder of `NAME` or `NAME:PHASE`; None: no bundled run of that name.

    Raises:
      ValueError: the run has no such phase.
    """
    name, _, phase = text.partition(":")
    if name not in RUNS:
        return None
    run = RUNS[name]
    if phase not in ("", *run.phases):
        raise ValueError(f"{text}: {name} has no phase {phase!r}; use {' or '.join(run.phases)}")
    return run.folder / (phase or run.phases[-1])
