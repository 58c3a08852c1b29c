"""Records as every command reads them: checked against themselves and against their verdicts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import records, stopping
from jaxrobust.evaluation.records import verdicts as files
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import CLEAN, Verdicts
from jaxrobust.runtime.text.progress import say

_ROUNDING = 1e-6  # of shares and of the ends of intervals
_HEAD = 200  # letters of a file of verdicts, which have its evaluation


def verdicts(record: AccuracyRecord, file: Path) -> Verdicts:
    """Read the verdicts of a record in `file` and check both.

    Raises:
      ValueError: the verdicts are missing or damaged, or contradict the record, or the record
        contradicts itself.
    """
    check(record, file)
    if record.verdicts is None:
        raise ValueError(
            f"the record {record.evaluation} in {file} has no verdicts image by image, as of a "
            "training or of an older version; evaluate again with --out DIR"
        )
    stored = files.read(file.parent / record.verdicts)
    compare(record, file, stored)
    return stored


def compare(record: AccuracyRecord, file: Path, stored: Verdicts) -> None:
    """Refuse verdicts that contradict their record in `file`."""
    if words := next(_disagreements(record, file.parent / str(record.verdicts), stored), ""):
        raise ValueError(
            f"{record.verdicts} does not belong to its record in {file}: {words}; get both again, "
            "or evaluate again with --again"
        )


def missing(record: AccuracyRecord, file: Path) -> str:
    """Say that the verdicts of a record in `file` are missing; "" where they are there."""
    if record.verdicts is None or (file.parent / record.verdicts).is_file():
        return ""
    return (
        f"{file.parent / record.verdicts} is missing, so that nothing confirms the numbers of "
        f"evaluation {record.evaluation}"
    )


def if_there(record: AccuracyRecord, file: Path) -> Verdicts | None:
    """Read and check as `verdicts` does; None: the record has none, or they are `missing`."""
    check(record, file)
    return None if record.verdicts is None or missing(record, file) else verdicts(record, file)


def confirmed(record: AccuracyRecord, file: Path) -> None:
    """Check as `if_there` does, and say where verdicts are missing."""
    if if_there(record, file) is None and (words := missing(record, file)):
        say(f"WARNING: {words}; copy it there, or evaluate again with --again")


def check(record: AccuracyRecord, where: Any) -> None:
    """Refuse a record whose numbers contradict each other."""
    if words := next(_contradictions(record), ""):
        number = f" {record.evaluation}" if record.evaluation else ""
        raise ValueError(
            f"{where} has a record{number} that contradicts itself: {words}; get the file again, "
            "or remove that line and evaluate again"
        )


def _contradictions(record: AccuracyRecord) -> Iterator[str]:
    n = records.images_of(record)
    ends: dict[str, Any] = {**(record.interval or {})}
    for key in ("clean", "robust"):
        share: float | None = getattr(record, key)
        yield from _of_share(f"its {key} accuracy", share, n, ends.get(key))
    after = [share for share in (record.accuracy_after or {}).values() if share is not None]
    for share in after:
        yield from _of_share("its accuracy after an attack", share, n, None)
    if after and record.robust is not None and abs(after[-1] - record.robust) > _ROUNDING:
        yield f"its robust accuracy is {record.robust:.6g}, and {after[-1]:.6g} after all attacks"
    for part in record.worst_case or ():
        about = (part.get("robust"), part.get("images"), part.get("interval"))
        yield from _of_share(f"its accuracy under {part.get('method')}", *about)
    if one := (record.draws or {}).get("one_draw"):
        ends = {**(one.get("interval") or {})}
        yield from _of_share("its accuracy by one draw", one.get("robust"), n, ends.get("robust"))
    if (stopped := record.stopped) and record.robust is not None:
        if n != stopped["stopped_after"]:
            yield f"it stopped after {stopped['stopped_after']:,} images, and lists {n:,}"
        bounds = stopping.bounds_of(stopped, record.robust)
        if not np.allclose(bounds, stopped["robust"], atol=0.01):
            yield (
                f"its robust accuracy, {record.robust:.6g}, has other bounds than "
                f"{_written(stopped['robust'])}"
            )
    for share in (record.certified or {}).get("accuracy", {}).values():
        yield from _of_share("its certified accuracy", share, n, None)
    if record.corruptions:
        shares = [v for row in record.corruptions["accuracy"].values() for v in row.values()]
        if abs(np.mean(shares) - record.corruptions["mean"]) > _ROUNDING:
            yield f"its mean under corruptions is not that of its {len(shares)} accuracies"


def _of_share(name: str, share: Any, n: int | None, ends: Any) -> Iterator[str]:
    if share is None:
        return
    if not 0 <= share <= 1:
        yield f"{name} is {share:g}, which is no share"
    elif n and ends and abs(share * n - round(share * n)) > _ROUNDING * n:
        yield f"{name}, {share:.6g}, is no share of its {n:,} images"
    elif n and ends and not np.allclose(ends, records.interval(share, n) or (), atol=_ROUNDING):
        yield f"{name}, {share:.6g} of {n:,} images, has another interval than {_written(ends)}"


def _written(ends: Any) -> str:
    return " to ".join(f"{end:.6g}" for end in ends)


def _disagreements(record: AccuracyRecord, path: Path, stored: Verdicts) -> Iterator[str]:
    n = len(stored.labels)
    with path.open() as lines:
        head = lines.read(_HEAD)
    if record.evaluation and f'"evaluation": "{record.evaluation}"' not in head:
        yield f"it is not of evaluation {record.evaluation}"
    listed = records.places(record.image_ids or "")
    if listed is not None and len(listed) != n:
        yield f"it has {n:,} images, and the record {len(listed):,}"
    elif listed is not None and (np.sort(listed) != np.sort(stored.image_ids)).any():
        yield f"it is of other images than {record.image_ids:.40}, as the record says"
    shares = {"clean": (stored.clean, record.clean)}
    if record.attacks:
        shares["robust"] = (stored.robust, record.robust)
    after = record.accuracy_after or {}
    if {*stored.fooled_by.tolist()} <= {"", CLEAN, *after}:
        standing = stored.clean
        for name, share in after.items():
            standing = standing & (stored.fooled_by != name)
            shares[f"the accuracy after {name}"] = (standing, share)
    for name, (right, share) in shares.items():
        if n and (share is None or abs(right.mean() - share) > 0.5 / n):
            yield f"{name} is {right.mean():.4f} there, {share} in the record"
    threats, norms = {*record.threats}, stored.norms[np.isfinite(stored.norms)]
    for threat in threats if len(threats) == 1 and norms.size else ():
        if norms.max() > checks.most(threat.epsilon):
            yield (
                f"its points are up to {norms.max():.4g} in {threat.norm} away, and the record's "
                f"radius is {threat.epsilon:g}"
            )
