"""Whether the verdicts of several records may be compared: what was done, beside the settings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrobust.attacks.ensembles import CUSTOM, VERSIONS
from jaxrobust.evaluation.records.verdicts import REPLAY, Verdicts


def procedure(record: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same in two records, by names for people; None: not known.

    Attacks, settings, balls and images are none of it.
    """
    ladder, parts = record.get("ladder"), record.get("worst_case") or []
    union = record.get("method") == "union"
    whole = (record.get("union") or {}).get("each_on_all_images")
    if parts:
        whole = all(part.get("robust") is not None for part in parts)
    return {
        "kind": "worst case" if parts else "union" if union else "one threat",
        "each attack of a union": None if whole is None else _ORDERS[bool(whole)],
        "version": _version(record),
        "ladder": ", ".join(f"{radius:.4g}" for radius in ladder["radii"]) if ladder else "none",
        "images met by the first attack alone": record.get("robust_beyond", 0),
    }


_ORDERS = {True: "on all images", False: "on what stands before it"}


def _version(record: dict[str, Any]) -> str | None:
    """Return the version of AutoAttack, also where only some of its attacks ran."""
    if record.get("version"):
        return str(record["version"])
    words = str(record.get("method") or "").replace(" ", ", ", 1).split(", ")
    return next((word for word in words[1:] if word in (*VERSIONS, CUSTOM)), None)


def pictures(record: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return what tells the images and labels of a record from others; None: it does not say.

    The command hashes what the data set has, and a program the arrays: these are never equal.
    """
    own = (record.get("fingerprint") or {}).get("images")
    how = (record.get("image_ids"), record.get("preprocessing"), "images_sha256" in record)
    return own and (*how, own)


def other_pictures(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two records are surely of other images or labels, whatever their names."""
    a, b = pictures(one), pictures(other)
    return bool(a and b and a[:-1] == b[:-1] and a != b)


def replayed(found: Verdicts) -> np.ndarray:
    """Return which images a replayed point decided, bool[N], also in one of several balls."""
    names = np.asarray(found.fooled_by, str)
    return (names == REPLAY) | np.char.endswith(names, f": {REPLAY}")


def left_out(records: Sequence[dict[str, Any]], found: Sequence[Verdicts]) -> np.ndarray:
    """Return on which images several evaluations cannot be compared, bool[N].

    These are those that a replayed point decided in one of them, as the attacks alone might have
    left them standing. On ladders of the same radii all met such points: there it is none.

    Args:
      records: of the evaluations.
      found: their verdicts, on the same images in the same order.
    """
    decided = np.any([replayed(one) for one in found], axis=0)
    ladders = [(record.get("ladder") or {}).get("radii") for record in records]
    if ladders[0] and all(own == ladders[0] for own in ladders) and _own_radii(records):
        return np.zeros_like(decided)
    return decided


def _own_radii(records: Sequence[dict[str, Any]]) -> bool:
    """Tell whether ladders replayed nothing but what they themselves found."""
    return all(
        any(np.isclose(source["epsilon"], radius) for radius in record["ladder"]["radii"])
        for record in records
        for source in record.get("replayed") or []
    )


def tried(record: dict[str, Any]) -> str:
    """Return in words how many images replayed points decided; "" where none were tried."""
    if not (sources := record.get("replayed")):
        return ""
    count = sum(source["fooled"] for source in sources)
    return f"{count:,} {'image' if count == 1 else 'images'} decided by replayed points"
