"""Selects records of a split with known labels: by classes, by ids, by a part."""

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
    *,
    where: str = "",
    has_all_classes: bool = True,
) -> Source:
    """Select the records of a split that match a choice and a part.

    `index` returns the labels of all records and the names of their files (None if there are none).
    It is called only after all checks that need no records. `where` names the split in messages;
    `has_all_classes` says whether its labels cover all classes of the data set.
    """
    classes, ids, _ = choice
    if classes is None and ids is None and parsed.part is None:
        return source
    where, lookup = where or source.where(), None
    changes: dict[str, Any] = {}
    if classes is not None:
        wanted = subsets.class_labels(classes, source.classes, source.num_classes, where)
        lookup = np.full(source.num_classes, -1, np.int32)
        lookup[wanted] = np.arange(len(wanted))
        changes = {"num_classes": len(wanted), "classes": tuple(name for _, name in classes)}
    labels, names = index()
    source = dataclasses.replace(source, labels=labels)
    rows: Any = np.arange(len(source))
    if ids is not None:
        if names is None:
            raise DataError(f"{where} has no file names, so ids cannot select its records")
        # A list names ImageNet's classes; if the data set has other names, compare labels only.
        others = source.num_classes == 1000 and not set(source.classes) & set(imagenet.synsets())
        folders = () if ids.imagenet and others else source.classes
        rows = subsets.find(ids, labels, names, folders, where, has_all_classes=has_all_classes)
        source = dataclasses.replace(source, files_sha256=None)  # the ids identify the records
        changes["ids_sha256"] = ids.sha256
    chosen = labels[rows]
    if lookup is not None:
        chosen, inside = lookup[chosen], lookup[chosen] >= 0
        if ids is not None and not inside.all():
            foreign = [ids.lines[row] for row in np.flatnonzero(~inside)]
            raise DataError(f"ids of {ids.name} are not in data.classes: {first_few(foreign)}")
        rows, chosen = rows[inside], chosen[inside]
        if not len(rows):
            raise DataError(
                f"{where} has no records of the classes in data.classes; choose other classes"
            )
    part = grammar.rows(parsed.part, len(rows), f"data set {source.name!r}, split {split!r}")
    if parsed.part is not None:
        count = changes.get("num_classes", source.num_classes)
        changes["split_counts"] = np.bincount(chosen, minlength=count)
    return subsets.view(source, rows[part.start : part.stop], lookup, split=split, **changes)
