"""Verdicts image by image: a small file next to a record, which names it."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from jaxrobust.runtime.files import jsonl

CLEAN = "clean"  # stands for an attack where an image is misclassified as it is
REPLAY = "replay"  # stands for an attack where a point that another evaluation found fools
SCHEMA = 2  # of records and of these files; 1 had neither a number nor verdicts


class _Columns(NamedTuple):
    image_ids: np.ndarray  # u32[N], places in the split
    labels: np.ndarray  # i32[N]
    clean: np.ndarray  # bool[N], classified correctly as it is
    fooled_by: np.ndarray  # str[N], the attack; "clean": misclassified as it is; "": none
    norms: np.ndarray  # f64[N], of the perturbation that was found; 0: none was found or needed
    reached: np.ndarray  # i32[N], the class that the network gives under it; -1: none, or unknown
    hashes: np.ndarray  # str[N], of the clean images, see `network.images.hashes`; "": unknown


class Verdicts(_Columns):
    """What an evaluation found of each of N images, in the order of the split."""

    def __new__(cls, *columns: Any, **keywords: Any) -> Self:
        """Take the columns; hashes may be left out."""
        by_name = dict(zip(cls._fields, columns, strict=False)) | keywords
        by_name.setdefault("hashes", np.full(len(by_name["image_ids"]), "", str))
        return super().__new__(cls, **by_name)

    @property
    def images(self) -> "HashedImages":
        """Return the images by their ids."""
        return HashedImages(self.image_ids, self.hashes)

    @property
    def robust(self) -> np.ndarray:
        """Tell which images no attack fooled, bool[N]."""
        return np.asarray(self.fooled_by == "")


class HashedImages(NamedTuple):
    """Some images by their ids, with the hash of each, as `Verdicts` has them."""

    ids: np.ndarray  # u32[N]
    hashes: np.ndarray  # str[N]

    @classmethod
    def none(cls) -> Self:
        """Return no images, where nothing is known of them."""
        return cls(np.zeros(0, np.uint32), np.zeros(0, str))


class CommonImages(NamedTuple):
    """How many images two evaluations have in common, by their ids."""

    common: int
    compared: int  # of them, by their hashes: both are there, and of the same kind
    differing: int  # of these


def common_images(first: HashedImages, other: HashedImages) -> CommonImages:
    """Compare the images that have the same ids."""
    ids, *at = np.intersect1d(first.ids, other.ids, return_indices=True)
    a, b = first.hashes[at[0]], other.hashes[at[1]]
    compared = (a != "") & (a.astype("U1") == b.astype("U1"))  # the letter is the kind
    return CommonImages(len(ids), int(compared.sum()), int((compared & (a != b)).sum()))


def other_images(first: HashedImages, other: HashedImages) -> str:
    """Say that images with the same ids are different images; "" where nothing shows that."""
    _, compared, differing = common_images(first, other)
    if not differing:
        return ""
    return f"{differing:,} of {compared:,} images of the same names are other images"


def aligned(several: Sequence[Verdicts]) -> list[Verdicts]:
    """Cut verdicts to the images that all of them have, in the order of their places."""
    common = functools.reduce(np.intersect1d, [one.image_ids for one in several])
    cut = []
    for one in several:
        at = np.intersect1d(common, one.image_ids, return_indices=True)[2]
        cut.append(Verdicts(*(column[at] for column in one)))
    return cut


_KINDS: dict[str, Any] = {"image_ids": np.uint32, "labels": np.int32, "clean": bool}
_KINDS |= {"fooled_by": str, "norms": np.float64, "reached": np.int32, "hashes": str}


def file_of(evaluation: str) -> str:
    """Name the file of an evaluation, by its number."""
    return f"verdicts-{evaluation}.json"


def write(path: Path, evaluation: str, verdicts: Verdicts) -> None:
    """Write the file as a whole or not at all."""
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
    """Read the verdicts of a file; refuse one that is missing, damaged or of a newer version."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; copy it with its record, or evaluate again with --out DIR"
        )
    try:
        stored = json.loads(path.read_text())
        newer = stored["schema"] > SCHEMA
        n = len(stored["image_ids"])
        edited = "sha256" in stored and stored["sha256"] != _sha256(stored)
        older = {"reached": [-1] * n, "hashes": [""] * n}  # columns that versions before lacked
        stored = older | stored
        columns = [] if newer else [np.asarray(stored[k], kind) for k, kind in _KINDS.items()]
    except (AttributeError, KeyError, TypeError, OverflowError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); get it again") from error
    if newer:
        raise ValueError(
            f"{path} has schema {stored['schema']}, and this version knows up to {SCHEMA}; "
            "install a newer jaxrobust"
        )
    sizes = {len(column) for column in columns if column.ndim == 1}
    if len(sizes) != 1 or any(column.ndim != 1 for column in columns):
        raise ValueError(f"{path} is damaged: its columns have different lengths; get it again")
    verdicts = Verdicts(*columns)
    if (verdicts.clean == (verdicts.fooled_by == "clean")).any():
        raise ValueError(f"{path} is damaged: clean and fooled_by disagree; get it again")
    if edited:
        raise ValueError(f"{path} has been edited: its sha256 is another; get it again")
    return verdicts
