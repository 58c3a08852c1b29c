"""Reading records: checks that each is consistent, and comparison with others."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.attacks.ensembles import CUSTOM, FAST, VERSIONS
from jaxrobust.data.transforms.preparing import same_preprocessing
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import comparisons, records, sequences, stopping
from jaxrobust.evaluation.records import verdicts as files
from jaxrobust.evaluation.records.comparisons import Paired
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import CLEAN, REPLAY, HashedImages, Verdicts
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say

_ROUNDING = 1e-6  # of shares and of the ends of intervals
_HEAD = 200  # characters at the start of a verdicts file that contain its evaluation


def verdicts(record: AccuracyRecord, file: Path) -> Verdicts:
    """Read the verdicts of a record in `file` and check both.

    Raises:
      ValueError: the verdicts are missing or damaged, or contradict the record, or the record
        contradicts itself.
    """
    check(record, file)
    if record.verdicts is None:
        raise ValueError(
            f"the record {record.evaluation} in {file} has no per-image verdicts, because it comes "
            "from a training run or an older version; evaluate again with --out DIR"
        )
    stored = files.read(file.parent / record.verdicts)
    compare(record, file, stored)
    return stored


def compare(record: AccuracyRecord, file: Path, stored: Verdicts) -> None:
    """Raise if verdicts contradict their record in `file`."""
    if words := next(_disagreements(record, file.parent / str(record.verdicts), stored), ""):
        raise ValueError(
            f"{record.verdicts} does not belong to its record in {file}: {words}; download both "
            "again, or evaluate again with --again"
        )


def missing(record: AccuracyRecord, file: Path) -> str:
    """Report if the verdicts file of a record in `file` is missing, else return ""."""
    if record.verdicts is None or (file.parent / record.verdicts).is_file():
        return ""
    return (
        f"{file.parent / record.verdicts} is missing, so nothing confirms the numbers of "
        f"evaluation {record.evaluation}"
    )


def if_there(record: AccuracyRecord, file: Path) -> Verdicts | None:
    """Read and check as `verdicts` does; None if the record has none, or they are missing."""
    check(record, file)
    return None if record.verdicts is None or missing(record, file) else verdicts(record, file)


def confirmed(record: AccuracyRecord, file: Path) -> None:
    """Check as `if_there` does, and warn of missing verdicts."""
    if if_there(record, file) is None and (words := missing(record, file)):
        say(f"WARNING: {words}; copy it there, or evaluate again with --again")


def check(record: AccuracyRecord, where: Any) -> None:
    """Raise if the numbers of a record contradict each other."""
    if words := next(_contradictions(record), ""):
        number = f" {record.evaluation}" if record.evaluation else ""
        raise ValueError(
            f"{where} has a record{number} that contradicts itself: {words}; download the file "
            "again, or remove that line and evaluate again"
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
        yield f"its robust accuracy is {record.robust:.6g}, but {after[-1]:.6g} after all attacks"
    for part in record.worst_case or ():
        about = (part.get("robust"), part.get("images"), part.get("interval"))
        yield from _of_share(f"its accuracy under {part.get('method')}", *about)
    if one := (record.draws or {}).get("one_draw"):
        ends = {**(one.get("interval") or {})}
        yield from _of_share("its accuracy for one draw", one.get("robust"), n, ends.get("robust"))
    if (stopped := record.stopped) and record.robust is not None:
        if n != stopped["stopped_after"]:
            yield f"it stopped after {stopped['stopped_after']:,} images, but lists {n:,}"
        bounds = stopping.bounds_of(stopped, record.robust)
        if not np.allclose(bounds, stopped["robust"], atol=0.01):
            yield (
                f"its robust accuracy, {record.robust:.6g}, does not match the bounds "
                f"{_written(stopped['robust'])}"
            )
    for share in (record.certified or {}).get("accuracy", {}).values():
        yield from _of_share("its certified accuracy", share, n, None)
    if record.corruptions:
        shares = [v for row in record.corruptions["accuracy"].values() for v in row.values()]
        if abs(np.mean(shares) - record.corruptions["mean"]) > _ROUNDING:
            yield f"its mean under corruptions is not the mean of its {len(shares)} accuracies"


def _of_share(name: str, share: Any, n: int | None, ends: Any) -> Iterator[str]:
    if share is None:
        return
    if not 0 <= share <= 1:
        yield f"{name} is {share:g}, which is not between 0 and 1"
    elif n and ends and abs(share * n - round(share * n)) > _ROUNDING * n:
        yield f"{name}, {share:.6g}, is not a fraction of its {n:,} images"
    elif n and ends and not np.allclose(ends, records.interval(share, n) or (), atol=_ROUNDING):
        yield f"{name}, {share:.6g} of {n:,} images, does not match the interval {_written(ends)}"


def _written(ends: Any) -> str:
    return " to ".join(f"{end:.6g}" for end in ends)


def _disagreements(record: AccuracyRecord, path: Path, stored: Verdicts) -> Iterator[str]:
    n = len(stored.labels)
    with path.open() as lines:
        head = lines.read(_HEAD)
    if record.evaluation and f'"evaluation": "{record.evaluation}"' not in head:
        yield f"it is not for evaluation {record.evaluation}"
    listed = records.places(record.image_ids or "")
    if listed is not None and len(listed) != n:
        yield f"it has {n:,} images, but the record has {len(listed):,}"
    elif listed is not None and (np.sort(listed) != np.sort(stored.image_ids)).any():
        yield f"its images are not {record.image_ids:.40}, as in the record"
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
                f"its points are up to {norms.max():.4g} away in {threat.norm}, but the record's "
                f"radius is {threat.epsilon:g}"
            )


OTHER_PICTURES = "the images or labels with the same names differ"


def procedure(record: AccuracyRecord) -> dict[str, Any]:
    """List procedural facts that two records must share, by readable names; None: not known."""
    ladder, parts = record.ladder, record.worst_case or []
    on_all = record.union and record.union.get("each_on_all_images")
    if parts:
        on_all = all(part.get("robust") is not None for part in parts)
    order = "on all images" if on_all else "on the images that survive the ones before it"
    return {
        "kind": "worst case" if parts else "union" if record.is_union else "one threat",
        "each attack of a union": None if on_all is None else order,
        "version": _version(record),
        "ladder": ", ".join(f"{radius:.4g}" for radius in ladder["radii"]) if ladder else "none",
        "images attacked only by the first attack": record.robust_beyond or 0,
    }


def _version(record: AccuracyRecord) -> str | None:
    """Find the version of AutoAttack, even if only some of its attacks ran."""
    if record.fast:
        return FAST
    if record.version:
        return record.version
    words = (record.method or "").replace(" ", ", ", 1).split(", ")
    return next((word for word in words[1:] if word in (*VERSIONS, CUSTOM)), None)


def pictures(record: AccuracyRecord) -> tuple[Any, ...] | None:
    """Return facts that identify a record's images and labels, or None without a hash.

    The command hashes the data set's files, a program the arrays: these hashes are never equal.
    """
    sha256 = (record.fingerprint or {}).get("images")
    hashed = (record.stopped or {}).get("images") or record.image_ids
    about = (hashed, record.preprocessing, record.images_sha256 is not None)
    return (*about, sha256) if sha256 else None


def other_pictures(one: AccuracyRecord, other: AccuracyRecord) -> bool:
    """Compare the hashes of two records: True if their images or labels certainly differ."""
    a, b = pictures(one), pictures(other)
    return bool(a and b and a[:-1] == b[:-1] and a != b)


def image_differences(
    one: AccuracyRecord, other: AccuracyRecord, first: HashedImages, second: HashedImages
) -> str:
    """Report if images of the same names differ between two records; "" if nothing shows that.

    `first` and `second` are the images of the two records; hashes may be unknown.
    """
    if words := files.other_images(first, second):
        return words
    return OTHER_PICTURES if other_pictures(one, other) else ""


def same_images_shown(
    one: AccuracyRecord, other: AccuracyRecord, first: HashedImages, second: HashedImages
) -> bool:
    """Compare hashes: True if they prove that images of the same names are equal."""
    common, compared, _ = files.common_images(first, second)
    facts = pictures(one)
    return compared == common or (facts is not None and facts == pictures(other))


_ORDER = "seed of the image order"
# Keys that only some records have; other lists and classes also differ in their labels.
_OPTIONAL = (
    *("list of images", "list of classes", "image size", "search dtype"),
    *("version", "each attack of a union", _ORDER),
)


_NO_SETTING = ("name", "norm", "epsilon")
_FIELDS = {"data set": "dataset", "split": "split", "list of images": "ids_sha256"}
_FIELDS |= {"list of classes": "classes_sha256", "image size": "image_size"}
_FIELDS |= {"preprocessing": "preprocessing", "search dtype": "search_dtype"}


def balls(record: AccuracyRecord) -> list[tuple[str, str]]:
    """List norm and radius of each attack, formatted for messages."""
    return [(threat.norm, f"{threat.epsilon:.6g}") for threat in record.threats]


def question(record: AccuracyRecord) -> Iterator[tuple[str, Any]]:
    """Yield facts that comparable records share, by readable names."""
    yield from ((name, getattr(record, field)) for name, field in _FIELDS.items())
    yield from procedure(record).items()
    yield _ORDER, stop_order([record])
    attacks, attack_balls = record.attacks, balls(record)
    for at, kind in enumerate(("norm", "radius")):
        yield kind, ", ".join(dict.fromkeys(ball[at] for ball in attack_balls))
    yield "attacks", ", ".join(attack["name"] for attack in attacks)
    for attack, ball in zip(attacks, attack_balls, strict=True):
        of = f" ({' '.join(ball)})" if len(set(attack_balls)) > 1 else ""
        settings = {key: value for key, value in attack.items() if key not in _NO_SETTING}
        yield from ((f"{attack['name']}: {key}{of}", value) for key, value in settings.items())


def question_differences(
    there: AccuracyRecord, here: AccuracyRecord, but: Collection[str] = ()
) -> str:
    """Describe how two records' questions differ, ignoring the keys in `but`; "" if equal."""
    questions = [
        {key: value for key, value in question(record) if key not in but}
        for record in (there, here)
    ]
    for key in _OPTIONAL:
        if any(one.get(key) is None for one in questions):
            questions = [one | {key: None} for one in questions]
    preprocessings: list[Any] = [one.get("preprocessing") for one in questions]
    if all(preprocessings) and same_preprocessing(
        preprocessings[1], preprocessings[0], questions[0].get("image size") or 224
    ):
        questions[1]["preprocessing"] = preprocessings[0]  # RobustBench renames some of them
    attacked = [{attack["name"] for attack in record.attacks} for record in (there, here)]
    lone = tuple(f"{name}: " for name in attacked[0] ^ attacked[1])  # reported as "attacks"
    questions = [{k: v for k, v in one.items() if not k.startswith(lone)} for one in questions]
    return hosts.differences(*questions)


def stop_order(records: Sequence[AccuracyRecord]) -> int | None:
    """Find the image-order seed of an evaluation that stopped; None if none did."""
    seeds = [record.stopped["order_seed"] for record in records if record.stopped]
    return seeds[0] if seeds else None


def paired(
    records: Sequence[AccuracyRecord], ids: np.ndarray, first: np.ndarray, second: np.ndarray
) -> Paired:
    """Compare two lists of verdicts on images with these ids, from `records`.

    If one of the records was stopped by a rule, intervals and p-values for a fixed number of images
    do not hold. Then those of sequences are used, in its order of images.
    """
    seed = stop_order(records)
    if seed is None or not len(ids):
        return comparisons.compare(first, second)
    order = sequences.order(seed, ids.tolist())
    return comparisons.compare_sequences(first[order], second[order])


def replayed(by_image: Verdicts) -> np.ndarray:
    """Mark the images that a replayed point decided, in any of several balls, bool[N]."""
    names = np.asarray(by_image.fooled_by, str)
    return (names == REPLAY) | np.char.endswith(names, f": {REPLAY}")


def left_out(records: Sequence[AccuracyRecord], several: Sequence[Verdicts]) -> np.ndarray:
    """Mark the images on which several evaluations cannot be compared, bool[N].

    These were decided by a replayed point in one evaluation, so the attacks alone might have left
    them standing. On ladders of the same radii all evaluations replay, so no image is left out.
    """
    decided = np.any([replayed(one) for one in several], axis=0)
    ladders = [(record.ladder or {}).get("radii") for record in records]
    if ladders[0] and all(radii == ladders[0] for radii in ladders) and own_radii(records):
        return np.zeros_like(decided)
    return decided


def own_radii(records: Sequence[AccuracyRecord]) -> bool:
    """Tell whether rungs of ladders replayed only points of their own ladder's radii."""
    return all(
        any(np.isclose(source["epsilon"], radius) for radius in (record.ladder or {})["radii"])
        for record in records
        for source in record.replayed or []
    )
