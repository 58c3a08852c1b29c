"""Whether the verdicts of several records may be compared: what was done, beside the settings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrobust.attacks.ensembles import CUSTOM, VERSIONS
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.evaluation.records.verdicts import REPLAY, Verdicts


def procedure(record: AccuracyRecord) -> dict[str, Any]:
    """List what must be the same in two records, by names for people; None: not known."""
    ladder, parts = record.ladder, record.worst_case or []
    whole = record.union and record.union.get("each_on_all_images")
    if parts:
        whole = all(part.get("robust") is not None for part in parts)
    return {
        "kind": "worst case" if parts else "union" if record.is_union else "one threat",
        "each attack of a union": None if whole is None else _ORDERS[bool(whole)],
        "version": _version(record),
        "ladder": ", ".join(f"{radius:.4g}" for radius in ladder["radii"]) if ladder else "none",
        "images met by the first attack alone": record.robust_beyond or 0,
    }


_ORDERS = {True: "on all images", False: "on what stands before it"}


def _version(record: AccuracyRecord) -> str | None:
    """Find the version of AutoAttack, also where only some of its attacks ran."""
    if record.version:
        return record.version
    words = (record.method or "").replace(" ", ", ", 1).split(", ")
    return next((word for word in words[1:] if word in (*VERSIONS, CUSTOM)), None)


def pictures(record: AccuracyRecord) -> tuple[Any, ...] | None:
    """List what tells the images and labels of a record from others; None: it does not say.

    The command hashes what the data set has, and a program the arrays: these are never equal.
    """
    own = (record.fingerprint or {}).get("images")
    how = (record.image_ids, record.preprocessing, record.images_sha256 is not None)
    return (*how, own) if own else None


def other_pictures(one: AccuracyRecord, other: AccuracyRecord) -> bool:
    """Tell whether two records are surely of other images or labels, whatever their names."""
    a, b = pictures(one), pictures(other)
    return bool(a and b and a[:-1] == b[:-1] and a != b)


def replayed(own: Verdicts) -> np.ndarray:
    """Tell which images a replayed point decided, bool[N], also in one of several balls."""
    names = np.asarray(own.fooled_by, str)
    return (names == REPLAY) | np.char.endswith(names, f": {REPLAY}")


def left_out(records: Sequence[AccuracyRecord], several: Sequence[Verdicts]) -> np.ndarray:
    """Tell on which images several evaluations cannot be compared, bool[N].

    These are those that a replayed point decided in one of them, as the attacks alone might have
    left them standing. On ladders of the same radii all met such points: there it is none.
    """
    decided = np.any([replayed(one) for one in several], axis=0)
    ladders = [(record.ladder or {}).get("radii") for record in records]
    if ladders[0] and all(own == ladders[0] for own in ladders) and own_radii(records):
        return np.zeros_like(decided)
    return decided


def own_radii(records: Sequence[AccuracyRecord]) -> bool:
    """Tell whether all points that rungs of ladders met are of radii of their own ladder."""
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
