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
    found = files.read(file.parent / record.verdicts)
    compare(record, file, found)
    return found


def compare(record: AccuracyRecord, file: Path, found: Verdicts) -> None:
    """Refuse verdicts that contradict their record in `file`."""
    if words := next(_disagreements(record, file.parent / str(record.verdicts), found), ""):
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
    if record.verdicts is None or missing(record, file):
        check(record, file)
        return None
    return verdicts(record, file)


def confirmed(record: AccuracyRecord, file: Path) -> None:
    """Check as `if_there` does, and say where verdicts are missing."""
    if_there(record, file)
    if words := missing(record, file):
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
    if record.stopped and record.robust is not None:
        yield from _of_sequence(record.stopped, record.robust, n)
    for share in (record.certified or {}).get("accuracy", {}).values():
        yield from _of_share("its certified accuracy", share, n, None)
    if record.corruptions:
        each = [v for row in record.corruptions["accuracy"].values() for v in row.values()]
        if abs(np.mean(each) - record.corruptions["mean"]) > _ROUNDING:
            yield f"its mean under corruptions is not that of its {len(each)} accuracies"


def _of_share(name: str, share: Any, n: int | None, ends: Any) -> Iterator[str]:
    if share is None:
        return
    if not 0 <= share <= 1:
        yield f"{name} is {share:g}, which is no share"
    elif n and ends and abs(share * n - round(share * n)) > _ROUNDING * n:
        yield f"{name}, {share:.6g}, is no share of its {n:,} images"
    elif n and ends and not np.allclose(ends, records.interval(share, n) or (), atol=_ROUNDING):
        yield f"{name}, {share:.6g} of {n:,} images, has another interval than {_written(ends)}"


def _of_sequence(stopped: Any, robust: float, n: int | None) -> Iterator[str]:
    if n != stopped["stopped_after"]:
        yield f"it stopped after {stopped['stopped_after']:,} images, and lists {n:,}"
    elif not np.allclose(stopping.bounds_of(stopped, robust), stopped["robust"], atol=0.01):
        ends = _written(stopped["robust"])
        yield f"its robust accuracy, {robust:.6g}, has other bounds than {ends}"


def _written(ends: Any) -> str:
    return " to ".join(f"{end:.6g}" for end in ends)


def _disagreements(record: AccuracyRecord, path: Path, found: Verdicts) -> Iterator[str]:
    n = len(found.labels)
    with path.open() as lines:
        head = lines.read(_HEAD)
    if record.evaluation and f'"evaluation": "{record.evaluation}"' not in head:
        yield f"it is not of evaluation {record.evaluation}"
    listed = records.places(record.image_ids or "")
    if listed is not None and len(listed) != n:
        yield f"it has {n:,} images, and the record {len(listed):,}"
    elif listed is not None and (np.sort(listed) != np.sort(found.image_ids)).any():
        yield f"it is of other images than {record.image_ids:.40}, as the record says"
    for key in ("clean", "robust") if record.attacks else ("clean",):
        yield from _of_verdicts(key, getattr(found, key), getattr(record, key))
    threats, norms = {*record.threats}, found.norms[np.isfinite(found.norms)]
    if len(threats) == 1 and norms.size:
        (threat,), distance = threats, norms.max()
        if distance > checks.most(threat.epsilon):
            yield (
                f"its points are up to {distance:.4g} in {threat.norm} away, and the record's "
                f"radius is {threat.epsilon:g}"
            )
    after = record.accuracy_after or {}
    if {*found.fooled_by.tolist()} <= {"", CLEAN, *after}:
        standing = found.clean.copy()
        for name, share in after.items():
            standing &= found.fooled_by != name
            yield from _of_verdicts(f"the accuracy after {name}", standing, share)


def _of_verdicts(name: str, right: np.ndarray, share: float | None) -> Iterator[str]:
    if len(right) and (share is None or abs(right.mean() - share) > 0.5 / len(right)):
        yield f"{name} is {right.mean():.4f} there, {share} in the record"
