"""Verdicts image by image: a small file beside a record, which names it."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.runtime.files import jsonl

REPLAY = "replay"  # stands for an attack where a point that another evaluation found fools
SCHEMA = 2  # of records and of these files; 1 had neither a number nor verdicts


class Verdicts(NamedTuple):
    """What an evaluation found of each of N images, in the order of the split."""

    image_ids: np.ndarray  # u32[N], places in the split
    labels: np.ndarray  # i32[N]
    clean: np.ndarray  # bool[N], classified correctly as it is
    fooled_by: np.ndarray  # str[N], the attack; "clean": misclassified as it is; "": none
    norms: np.ndarray  # f64[N], of the perturbation that was found; 0: none was found or needed
    reached: np.ndarray  # i32[N], the class that the network gives under it; -1: none, or unknown

    @property
    def robust(self) -> np.ndarray:
        """Tell which images no attack fooled, bool[N]."""
        return self.fooled_by == ""


def aligned(several: Sequence[Verdicts]) -> list[Verdicts]:
    """Cut verdicts to the images that all of them have, in the order of their places."""
    common = functools.reduce(np.intersect1d, [one.image_ids for one in several])
    cut = []
    for one in several:
        at = np.intersect1d(common, one.image_ids, return_indices=True)[2]
        cut.append(Verdicts(*(column[at] for column in one)))
    return cut


_KINDS: dict[str, Any] = {"image_ids": np.uint32, "labels": np.int32, "clean": bool}
_KINDS |= {"fooled_by": str, "norms": np.float64, "reached": np.int32}


def file_of(evaluation: str) -> str:
    """Name the file of an evaluation, by its number."""
    return f"verdicts-{evaluation}.json"


def write(path: Path, evaluation: str, verdicts: Verdicts) -> None:
    """Write the file as a whole or not at all."""
    columns: dict[str, Any] = {name: getattr(verdicts, name).tolist() for name in _KINDS}
    lines = [f'"{name}": {json.dumps(values)}' for name, values in columns.items()]
    head = f'"schema": {SCHEMA}, "evaluation": {json.dumps(evaluation)}'
    jsonl.replace(path, "{" + ",\n".join([head, *lines]) + "}\n")


def read(path: Path) -> Verdicts:
    """Read the verdicts of a file; refuse one that is missing, damaged or of a newer version."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; copy it with its record, or evaluate again with --out DIR"
        )
    try:
        stored = json.loads(path.read_text())
        newer = stored["schema"] > SCHEMA
        stored.setdefault("reached", [-1] * len(stored["image_ids"]))  # of an older version
        columns = [] if newer else [np.asarray(stored[k], kind) for k, kind in _KINDS.items()]
    except (AttributeError, KeyError, TypeError, OverflowError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); get it again") from error
    if newer:
        raise ValueError(
            f"{path} has schema {stored['schema']}, and this version knows up to {SCHEMA}; "
            "install a newer jaxrobust"
        )
    verdicts = Verdicts(*columns)
    sizes = {len(column) for column in columns if column.ndim == 1}
    if len(sizes) != 1 or any(column.ndim != 1 for column in columns):
        raise ValueError(f"{path} is damaged: its columns have different lengths; get it again")
    if (verdicts.clean == (verdicts.fooled_by == "clean")).any():
        raise ValueError(f"{path} is damaged: clean and fooled_by disagree; get it again")
    return verdicts
