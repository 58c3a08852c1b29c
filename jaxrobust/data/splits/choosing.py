"""Which records of a split are read, where its labels are known: by classes, by ids, a part."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxrobust.data import imagenet
from jaxrobust.data.source import DataError, Source, first_few
from jaxrobust.data.splits import grammar, subsets


def choose(
    source: Source,
    parsed: grammar.SplitExpression,
    split: str,
    choice: subsets.SubsetChoice,
    index: Callable[[], tuple[np.ndarray, Iterable[str] | None]],
) -> Source:
    """Keep the records of a split that a choice and a part leave.

    `index` gives the labels of all records and the names of their files, None where there are none;
    it is called when what can be refused without reading records has been refused.
    """
    classes, ids, _ = choice
    if classes is None and ids is None and parsed.part is None:
        return source
    where, wanted, lookup = source.where(), None, None
    if classes is not None:
        wanted = subsets.class_labels(classes, source.classes, source.num_classes, where)
        lookup = np.full(source.num_classes, -1, np.int32)
        lookup[wanted] = np.arange(len(wanted))
    labels, names = index()
    rows: Any = np.arange(len(source))
    if ids is not None:
        if names is None:
            raise no_names(source)
        # A list names ImageNet's classes; where others name them, only the labels compare.
        others = source.num_classes == 1000 and not set(source.classes) & set(imagenet.synsets())
        folders = () if ids.imagenet and others else source.classes
        rows = subsets.find(ids, labels, names, folders, where, whole=True)
    if lookup is not None:
        inside = lookup[labels[rows]] >= 0
        if ids is not None and not inside.all():
            foreign = [ids.lines[row] for row in np.flatnonzero(~inside)]
            raise DataError(f"ids of {ids.name} are not of data.classes: {first_few(foreign)}")
        rows = rows[inside]
    part = grammar.rows(parsed.part, len(rows), f"data set {source.name!r}, split {split!r}")
    source, changes = dataclasses.replace(source, labels=labels), dict[str, Any]()
    if parsed.part is not None:
        of_split = labels[rows] if lookup is None else lookup[labels[rows]]
        classes_left = source.num_classes if wanted is None else len(wanted)
        changes["split_counts"] = np.bincount(of_split, minlength=classes_left)
    if ids is not None:  # which say themselves which records these are
        source = dataclasses.replace(source, files_sha256=None)
        changes["ids_sha256"] = ids.sha256
    if wanted is not None:
        names_left = tuple(name for _, name in classes or ())
        changes |= {"num_classes": len(wanted), "classes": names_left}
    return subsets.view(source, rows[part.start : part.stop], lookup, split=split, **changes)


def no_names(source: Source) -> DataError:
    """Return the refusal of a list of ids for a data set whose records have no names."""
    return DataError(f"{source.where()} has no file names, by which ids could choose records")
