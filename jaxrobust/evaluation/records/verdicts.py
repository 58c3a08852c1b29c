"""Verdicts per image: a small file next to the record that names it."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from jaxrobust.runtime.files import jsonl

CLEAN = "clean"  # in place of an attack: the clean image is misclassified
REPLAY = "replay"  # in place of an attack: a point of another evaluation fools the network
SCHEMA = 2  # of records and of these files; 1 had neither a number nor verdicts


class _Columns(NamedTuple):
    image_ids: np.ndarray  # u32[N], places in the split
    labels: np.ndarray  # i32[N]
    clean: np.ndarray  # bool[N], classified correctly without an attack
    fooled_by: np.ndarray  # str[N], the attack; "clean": misclassified without one; "": robust
    norms: np.ndarray  # f64[N], of the perturbation found; 0: none was found or needed
    reached: np.ndarray  # i32[N], the class predicted under it; -1: none, or unknown
    hashes: np.ndarray  # str[N], of the clean images, see `network.images.hashes`; "": unknown


class Verdicts(_Columns):
    """An evaluation's verdicts on N images, in the order of the split."""

    def __new__(cls, *columns: Any, **keywords: Any) -> Self:
        """Take the columns; hashes may be left out."""
        by_name = dict(zip(cls._fields, columns, strict=False)) | keywords
        by_name.setdefault("hashes", np.full(len(by_name["image_ids"]), "", str))
        return super().__new__(cls, **by_name)

    @property
    def images(self) -> "HashedImages":
        """The ids and hashes of the images."""
        return HashedImages(self.image_ids, self.hashes)

    @property
    def robust(self) -> np.ndarray:
        """Which images no attack fooled, bool[N]."""
        return np.asarray(self.fooled_by == "")


class HashedImages(NamedTuple):
    """Images by their ids, each with its hash, as in `Verdicts`."""

    ids: np.ndarray  # u32[N]
    hashes: np.ndarray  # str[N]

    @classmethod
    def none(cls) -> Self:
        """Return an empty set, for unknown images."""
        return cls(np.zeros(0, np.uint32), np.zeros(0, str))


class CommonImages(NamedTuple):
    """Counts of images with the same ids in two evaluations."""

    common: int
    compared: int  # of these, images with two hashes of the same kind
    differing: int  # of these, images with different hashes


def common_images(first: HashedImages, other: HashedImages) -> CommonImages:
    """Compare the images that have the same ids."""
    ids, *at = np.intersect1d(first.ids, other.ids, return_indices=True)
    a, b = first.hashes[at[0]], other.hashes[at[1]]
    compared = (a != "") & (a.astype("U1") == b.astype("U1"))  # the first letter is the kind
    return CommonImages(len(ids), int(compared.sum()), int((compared & (a != b)).sum()))


def other_images(first: HashedImages, other: HashedImages) -> str:
    """Report if images with the same ids differ; "" if nothing shows that."""
    _, compared, differing = common_images(first, other)
    if not differing:
        return ""
    return f"{differing:,} of {compared:,} images with the same names differ"


def aligned(several: Sequence[Verdicts]) -> list[Verdicts]:
    """Restrict verdicts to the images that all of them have, in the order of their places."""
    common = functools.reduce(np.intersect1d, [one.image_ids for one in several])
    cut = []
    for one in several:
        at = np.intersect1d(common, one.image_ids, return_indices=True)[2]
        cut.append(Verdicts(*(column[at] for column in one)))
    return cut


_KINDS: dict[str, Any] = {"image_ids": np.uint32, "labels": np.int32, "clean": bool}
_KINDS |= {"fooled_by": str, "norms": np.float64, "reached": np.int32, "hashes": str}


def file_of(evaluation: str) -> str:
    """Return the file name of an evaluation's verdicts."""
    return f"verdicts-{evaluation}.json"


def write(path: Path, evaluation: str, verdicts: Verdicts) -> None:
    """Write the file atomically."""
    columns: dict[str, Any] = {name: getattr(verdicts, name).tolist() for name in _KINDS}
    if not any(columns["hashes"]):
        del columns["hashes"]
    lines = [f'"{name}": {json.dumps(values)}' for name, values in columns.items()]
    head = f'"schema": {SCHEMA}, "evaluation": {json.dumps(evaluation)}'
    head += f', "sha256": "{_sha256(columns)}"'
    jsonl.replace(path, "{" + ",\n".join([head, *lines]) + "}\n")


def _sha256(columns: dict[str, Any]) -> str:
    hashed = [columns[name] for name in ("image_ids", "labels", "clean", "fooled_by")]
    return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()


def read(path: Path) -> Verdicts:
    """Read verdicts; raise if the file is missing, damaged or of a newer version."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; copy it with its record, or evaluate again with --out DIR"
        )
    try:
        stored = json.loads(path.read_text())
        newer = stored["schema"] > SCHEMA
        n = len(stored["image_ids"])
        edited = "sha256" in stored and stored["sha256"] != _sha256(stored)
        older = {"reached": [-1] * n, "hashes": [""] * n}  # columns that older versions lack
        stored = older | stored
        columns = [] if newer else [np.asarray(stored[k], kind) for k, kind in _KINDS.items()]
    except (AttributeError, KeyError, TypeError, OverflowError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); restore the original") from error
    if newer:
        raise ValueError(
            f"{path} has schema {stored['schema']}, but this version only reads up to {SCHEMA}; "
            "install a newer jaxrobust"
        )
    sizes = {len(column) for column in columns if column.ndim == 1}
    if len(sizes) != 1 or any(column.ndim != 1 for column in columns):
        raise ValueError(
            f"{path} is damaged: its columns have different lengths; restore the original"
        )
    verdicts = Verdicts(*columns)
    if (verdicts.clean == (verdicts.fooled_by == "clean")).any():
        raise ValueError(f"{path} is damaged: clean and fooled_by disagree; restore the original")
    if edited:
        raise ValueError(f"{path} has been edited: its sha256 differs; restore the original")
    return verdicts
