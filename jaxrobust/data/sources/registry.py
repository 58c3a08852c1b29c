"""Where images come from: records of encoded bytes and a label, with random access.

`open_source` lists the valid names. Directories are local or on `gs://` (except for `hf:`).
"""

import dataclasses
import functools
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.data.source import (
    KINDS,
    DataError,
    Record,
    Source,
    content_sha256,
    first_few,
    kind_of,
)
from jaxrobust.data.sources import generated, plausibility, tfds
from jaxrobust.data.splits import grammar, storage, subsets
from jaxrobust.runtime import rooms
from jaxrobust.runtime.text import spelling

__all__ = ["DataError", "Record", "Source", "foreign_classes", "open_source", "same_classes"]

_SHIPPED = {"digits": Path(__file__).parents[1] / "digits"}
_PREPARED_NAME = re.compile(r"(?:tfds:)?([\w-]+(?:/[\w-]+)?(?::[\w.]+)?)", re.ASCII)


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    classes: str | None = None,
    num_classes: int | None = None,
) -> Source:
    """Open the split `split` of the data set `name`.

    Args:
      name: `digits` (bundled), `fake[:HxWxC[:CLASSES]]` (synthetic; default 32x32x3 and 10
        classes), `folder:PATH` (an ImageFolder, local or `gs://`), `npz:PATH` (arrays, see
        `npz.open_npz`), `generated:DIR` (shards, see `generated.open_generated`), `cifar10-c:DIR`
        (corrupted, see `cifar_c.open_cifar_c`), `hf:NAME[:CONFIG][@REVISION][#LABEL]` or
        `hf:FOLDER` (Hugging Face, see `huggingface.open_hf`), or `[tfds:]NAME[/CONFIG][:VERSION]`,
        a TFDS data set prepared as ArrayRecord; default: its only CONFIG and newest VERSION.
      split: a split, or a part of one: `train`, `val`, `train[:90%]`, `train[90%:]`; or the images
        of a list in its order, `validation@IDS`, or a part of those, `validation@IDS[:1000]`. IDS
        is `robustbench` (5,000 images of ImageNet; for CIFAR, `test` in RobustBench's order),
        `selection` (4,000 others, see `data/imagenet`), or `FILE[#sha256=HEX]` with one
        `CLASS/NAME` or `NAME` per line. Records of a folder are sorted by class, so a part of it
        holds whole classes; without splits it has only `all`.
      data_dir: the directory that holds NAME/VERSION; default: the environment variable
        `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      classes: use only these, labeled 0 to K - 1 in the order of the list, before taking a part:
        `imagenet100`, or a file with one `NAME` or `INDEX<TAB>NAME` per line.
      num_classes: number of classes of the network, if known; other data is rejected.
    Raises:
      DataError: an invalid name; no such data set, directory or split; another file format; a
        damaged file; class folders that look like ImageNet's but are not; a list of ids or classes
        that is damaged or does not fit the data; another number of classes; a missing extra; pixels
        of 0 and 1, or of more than 8 bits.
      ConnectionError: Hugging Face's hub does not answer.
    """
    name, parsed = spelling.dataset(name), grammar.parse(split)
    ids = subsets.read_ids(parsed.ids, name) if parsed and parsed.ids else None
    chosen = subsets.read_classes(classes) if classes else None
    source = _open(name, split, data_dir, subsets.SubsetChoice(chosen, ids, num_classes))
    if num_classes is not None and source.num_classes != num_classes:
        raise DataError(
            f"the network has num_classes={num_classes}, but {source.where()} has "
            f"{source.num_classes} classes; set num_classes={source.num_classes} if this is "
            "the right data set and it is complete"
        )
    doubts = (*plausibility.of_labels(source), *plausibility.of_names(source))
    source = dataclasses.replace(source, notes=(*source.notes, *doubts))
    for note in source.notes:
        _tell(note, sys.stderr)
    return source


@functools.lru_cache(maxsize=256)  # once per stream
def _tell(note: str, stream: Any) -> None:
    from jaxrobust.runtime.text.progress import say  # imports JAX, which reading does not need

    say(f"WARNING: {note}", every_process=True)  # would otherwise ask for devices


def _open(
    name: str, split: str, data_dir: str | os.PathLike | None, choice: subsets.SubsetChoice
) -> Source:
    if kind_of(name) is None and generated.is_folder(name):
        name = f"{generated.PREFIX}{name}"
    if kind := kind_of(name):
        opened = rooms.resolve(kind.open) if isinstance(kind.open, str) else kind.open
        source = opened(name, split, choice)
        if kind.contents and not (source.files_sha256 or source.ids_sha256):
            every = range(len(source))  # nothing else identifies the records
            return dataclasses.replace(source, files_sha256=content_sha256(source, every))
        return source
    others = written()
    if name in _SHIPPED:
        plain, remedy, root = name, "reinstall jaxrobust", storage.place(_SHIPPED[name])
    else:
        match = _PREPARED_NAME.fullmatch(name)
        if match is None:
            if name.endswith(".npz") or os.path.isdir(name):
                prefix = "npz:" if name.endswith(".npz") else "folder:"
                raise DataError(f"{name!r} lacks the kind of data set; write {prefix}{name}")
            raise DataError(
                f"{name!r} is not the name of a data set; write {others} or "
                "[tfds:]NAME[/CONFIG][:VERSION], of letters, digits, _ and -; set data_dir to the "
                "directory of TFDS data sets"
            )
        plain = match[1]
        root = storage.place(tfds.data_directory(data_dir))
        remedy = f"copy the data set again or prepare it again: {tfds.build_command(plain, root)}"
    directory = tfds.version_directory(plain, root, others)
    return tfds.open_prepared(plain, split, directory, remedy, choice)


def written() -> str:
    """List the names of data sets other than prepared ones, for messages and help."""
    kinds = sorted(KINDS.values(), key=lambda kind: kind.is_path)  # those that need no file first
    return ", ".join([*_SHIPPED, *(kind.written for kind in kinds)])


def same_classes(sources: Sequence[Source]) -> None:
    """Check that the splits of a data set have the same classes in the same order."""
    for one, other in itertools.pairwise(source for source in sources if source.classes):
        for has, lacks in ((one, other), (other, one)):
            if missing := [name for name in has.classes if name not in set(lacks.classes)]:
                raise DataError(
                    f"{lacks.where()} lacks classes of split {has.split!r}, so their labels "
                    f"differ: {first_few(missing)}; make the class folders the same"
                )
        if one.classes != other.classes:
            others = f"the classes of split {other.split!r} in another order"
            raise DataError(f"{one.where()} has {others}")


def foreign_classes(train: Source, other: Source) -> str:
    """Return a sentence if `other` has other classes than `train`, else "".

    This is the case if some of its records are of classes without a record in `train`, or if it has
    less than half of the classes of `train` in more than twice as many records, which no random
    choice would give. Checked only if the labels of both are known without reading records.
    Raises:
      DataError: most of the records are of classes without a record in `train`.
    """
    if train.labels is None or other.labels is None:
        return ""
    trained, tested = np.unique(train.labels), np.unique(other.labels)
    foreign = ~np.isin(other.labels, trained)
    why = (
        "Records of a folder are sorted by class, so a part of it has only some of the classes; "
        "give another split, or SPLIT@FILE with a list of files from all classes"
    )
    if foreign.any():
        count = len(np.unique(other.labels[foreign]))
        classes = "1 class" if count == 1 else f"{count} classes"
        records = f"{foreign.mean():.0%} of the records of {other.where()}"
        share = f"{records} belong to {classes} without records in split {train.split!r}. {why}"
        if foreign.mean() > 0.5:
            raise DataError(share)
        return share
    if 2 * len(tested) < len(trained) and len(other) > 2 * len(trained):
        few = f"{len(tested)} of the {len(trained)} classes of split {train.split!r}"
        return f"{other.where()} holds only {few}. {why}"
    return ""
