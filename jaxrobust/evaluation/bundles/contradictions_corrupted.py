"""In what a bundle of common corruptions contradicts itself, without images and network.

Its rows say of each image under which corruptions it is classified correctly, so every accuracy of
its record follows from them. The text of this module is a part of the program in every bundle.
"""

import re
from typing import Any

import numpy as np

from jaxrobust.evaluation.bundles.contradictions import (
    OFF,
    BundleFacts,
    RecordJson,
    Rows,
    ids,
    is_a,
    wrong_interval,
    wrong_label_or_hash,
    wrong_shape,
    wrong_types,
)

CLEAN = "clean"  # the images as they are, in the place of a corruption
_ROW = {"image": int, "label": int, "sha256": str, "right": str}


def corrupted_fault(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    """Say in what a bundle of corruptions contradicts itself; None: in nothing."""
    checks = (_row_types, ids, _names, _rows, _accuracies)
    return next((problem for check in checks if (problem := check(about, rows, sizes))), None)


def rights(rows: Rows) -> np.ndarray:
    """Read which images of a bundle are right under which of its corruptions, bool[N,C]."""
    return np.array([[mark == "1" for mark in row["right"]] for row in rows])


def _row_types(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    return wrong_types(rows, lambda row: _ROW)


def _names(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    wanted = [name for name, _ in _stated(about["record"])]
    if not wanted or about["corruptions"] != wanted:
        return f"is of {about['corruptions']!r:.60}, and its record of {', '.join(wanted):.60}"
    for name in wanted:
        if name != CLEAN and not re.fullmatch("[a-z_]+-[1-5]", name):
            return f"has {name!r:.40} for a corruption, which is none"
    return wrong_shape(about)


def _stated(record: RecordJson) -> list[tuple[str, Any]]:
    """List the accuracies of a record by the names of their corruptions, in their order."""
    table = record["corruptions"]["accuracy"]
    listed = [(f"{kind}-{level}", own[level]) for kind, own in table.items() for level in own]
    return [*([] if record["clean"] is None else [(CLEAN, record["clean"])]), *listed]


def _rows(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    classes, count = about["record"]["model"]["num_classes"], len(about["corruptions"])
    for place, row in enumerate(rows):
        image = row["image"]
        if place and image < rows[place - 1]["image"]:
            return f"has image {image} in line {place + 1}, and its images are in order"
        if not re.fullmatch(f"[01]{{{count}}}", row["right"]):
            return f"has {row['right']!r:.40} for image {image}, and needs {count} of 0 and 1"
        if problem := wrong_label_or_hash(row, classes):
            return problem
    return None


def _accuracies(about: BundleFacts, rows: Rows, sizes: dict[str, int]) -> str | None:
    record, stated = about["record"], dict(_stated(about["record"]))
    found = dict(zip(about["corruptions"], rights(rows).mean(axis=0).tolist(), strict=True))
    mean = float(np.mean([own for name, own in found.items() if name != CLEAN]))
    known = {**found, "mean": mean}
    for name, value in [*stated.items(), ("mean", record["corruptions"]["mean"])]:
        if not is_a(value, float) or abs(value - known[name]) > OFF:
            return f"says the accuracy {value!r:.20} for {name}, and its rows give {known[name]:g}"
    if record.get("robust") is not None:
        return f"says {record['robust']!r:.20} for robust accuracy, which it does not measure"
    ends = (record.get("interval") or {}).get(CLEAN)
    return wrong_interval(ends, CLEAN, found[CLEAN], len(rows)) if CLEAN in found and ends else None
