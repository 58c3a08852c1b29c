"""Whether the verdicts of several records may be compared: what was done, beside the settings."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from jaxrobust.attacks.ensembles import CUSTOM, FAST, VERSIONS
from jaxrobust.data.transforms.preparing import same_preprocessing
from jaxrobust.evaluation.records import pairs, sequential, verdicts
from jaxrobust.evaluation.records.pairs import Paired
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import REPLAY, HashedImages, Verdicts
from jaxrobust.runtime.processes import hosts

OTHER_PICTURES = "the images or labels of the same names are others"


def procedure(record: AccuracyRecord) -> dict[str, Any]:
    """List what must be the same in two records, by names for people; None: not known."""
    ladder, parts = record.ladder, record.worst_case or []
    on_all = record.union and record.union.get("each_on_all_images")
    if parts:
        on_all = all(part.get("robust") is not None for part in parts)
    order = "on all images" if on_all else "on what stands before it"
    return {
        "kind": "worst case" if parts else "union" if record.is_union else "one threat",
        "each attack of a union": None if on_all is None else order,
        "version": _version(record),
        "ladder": ", ".join(f"{radius:.4g}" for radius in ladder["radii"]) if ladder else "none",
        "images met by the first attack alone": record.robust_beyond or 0,
    }


def _version(record: AccuracyRecord) -> str | None:
    """Find the version of AutoAttack, also where only some of its attacks ran."""
    if record.fast:
        return FAST
    if record.version:
        return record.version
    words = (record.method or "").replace(" ", ", ", 1).split(", ")
    return next((word for word in words[1:] if word in (*VERSIONS, CUSTOM)), None)


def pictures(record: AccuracyRecord) -> tuple[Any, ...] | None:
    """List what tells the images and labels of a record from others; None: it does not say.

    The command hashes what the data set has, and a program the arrays: these are never equal.
    """
    sha256 = (record.fingerprint or {}).get("images")
    hashed = (record.stopped or {}).get("images") or record.image_ids
    about = (hashed, record.preprocessing, record.images_sha256 is not None)
    return (*about, sha256) if sha256 else None


def other_pictures(one: AccuracyRecord, other: AccuracyRecord) -> bool:
    """Tell whether two records are surely of other images or labels, whatever their names."""
    a, b = pictures(one), pictures(other)
    return bool(a and b and a[:-1] == b[:-1] and a != b)


def image_differences(
    one: AccuracyRecord, other: AccuracyRecord, first: HashedImages, second: HashedImages
) -> str:
    """Say that two records are of different images of the same names; "" where nothing shows it.

    `first` and `second` are the images of both, whose hashes may be unknown.
    """
    if words := verdicts.other_images(first, second):
        return words
    return OTHER_PICTURES if other_pictures(one, other) else ""


def same_images_shown(
    one: AccuracyRecord, other: AccuracyRecord, first: HashedImages, second: HashedImages
) -> bool:
    """Tell whether hashes show that the images of the same names are the same images."""
    common, compared, _ = verdicts.common_images(first, second)
    own_pictures = pictures(one)
    return compared == common or (own_pictures is not None and own_pictures == pictures(other))


_ORDER = "order of images, by its seed"
# Keys that only some records have; the labels tell other lists and classes apart as well.
_OPTIONAL = (
    *("list of images", "list of classes", "image size", "type of the search"),
    *("version", "each attack of a union", _ORDER),
)


_NO_SETTING = ("name", "norm", "epsilon")
_FIELDS = {"data set": "dataset", "split": "split", "list of images": "ids_sha256"}
_FIELDS |= {"list of classes": "classes_sha256", "image size": "image_size"}
_FIELDS |= {"preprocessing": "preprocessing", "type of the search": "search_dtype"}


def balls(record: AccuracyRecord) -> list[tuple[str, str]]:
    """List norm and radius of each attack, as messages have them."""
    return [(threat.norm, f"{threat.epsilon:.6g}") for threat in record.threats]


def question(record: AccuracyRecord) -> Iterator[tuple[str, Any]]:
    """Yield what two records must share for their verdicts to be compared, by names for people."""
    yield from ((name, getattr(record, field)) for name, field in _FIELDS.items())
    yield from procedure(record).items()
    yield _ORDER, stop_order([record])
    attacks, own = record.attacks, balls(record)
    for at, kind in enumerate(("norm", "radius")):
        yield kind, ", ".join(dict.fromkeys(ball[at] for ball in own))
    yield "attacks", ", ".join(attack["name"] for attack in attacks)
    for attack, ball in zip(attacks, own, strict=True):
        of = f" ({' '.join(ball)})" if len(set(own)) > 1 else ""
        settings = {key: value for key, value in attack.items() if key not in _NO_SETTING}
        yield from ((f"{attack['name']}: {key}{of}", value) for key, value in settings.items())


def question_differences(
    there: AccuracyRecord, here: AccuracyRecord, but: Collection[str] = ()
) -> str:
    """Say how the questions of two records differ, without the keys in `but`; "": they do not."""
    questions = [
        {key: value for key, value in question(record) if key not in but}
        for record in (there, here)
    ]
    for key in _OPTIONAL:
        if any(one.get(key) is None for one in questions):
            questions = [one | {key: None} for one in questions]
    how: list[Any] = [one.get("preprocessing") for one in questions]
    if all(how) and same_preprocessing(how[1], how[0], questions[0].get("image size") or 224):
        questions[1]["preprocessing"] = how[0]  # RobustBench names some of ours
    attacked = [{attack["name"] for attack in record.attacks} for record in (there, here)]
    lone = tuple(f"{name}: " for name in attacked[0] ^ attacked[1])  # "attacks" says it
    questions = [{k: v for k, v in one.items() if not k.startswith(lone)} for one in questions]
    return hosts.differences(*questions)


def stop_order(records: Sequence[AccuracyRecord]) -> int | None:
    """Find the seed of the order in which one of several evaluations stopped; None: none did."""
    seeds = [record.stopped["order_seed"] for record in records if record.stopped]
    return seeds[0] if seeds else None


def paired(
    records: Sequence[AccuracyRecord], ids: np.ndarray, first: np.ndarray, second: np.ndarray
) -> Paired:
    """Compare two lists of verdicts on images with these ids, of records among `records`.

    Where one of the records stopped when its numbers said so, intervals and p-values of a fixed
    number of images do not hold: then they are those of sequences, in its order of images.
    """
    seed = stop_order(records)
    if seed is None or not len(ids):
        return pairs.compare(first, second)
    order = sequential.order(seed, ids.tolist())
    return sequential.compare(first[order], second[order])


def replayed(by_image: Verdicts) -> np.ndarray:
    """Tell which images a replayed point decided, bool[N], also in one of several balls."""
    names = np.asarray(by_image.fooled_by, str)
    return (names == REPLAY) | np.char.endswith(names, f": {REPLAY}")


def left_out(records: Sequence[AccuracyRecord], several: Sequence[Verdicts]) -> np.ndarray:
    """Tell on which images several evaluations cannot be compared, bool[N].

    These are those that a replayed point decided in one of them, as the attacks alone might have
    left them standing. On ladders of the same radii all met such points: there it is none.
    """
    decided = np.any([replayed(one) for one in several], axis=0)
    ladders = [(record.ladder or {}).get("radii") for record in records]
    if ladders[0] and all(radii == ladders[0] for radii in ladders) and own_radii(records):
        return np.zeros_like(decided)
    return decided


def own_radii(records: Sequence[AccuracyRecord]) -> bool:
    """Tell whether rungs of ladders replayed points of no radius but their own ladder's."""
    return all(
        any(np.isclose(source["epsilon"], radius) for radius in (record.ladder or {})["radii"])
        for record in records
        for source in record.replayed or []
    )


def replayed_line(record: AccuracyRecord) -> str:
    """Say how many images replayed points decided; "" where none were tried."""
    if not record.replayed:
        return ""
    count = sum(source["fooled"] for source in record.replayed)
    return f"{count:,} {'image' if count == 1 else 'images'} decided by replayed points"
