"""Several balls: their union, and a ladder of radii that share what they find."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.evaluation import records, verdicts
from jaxrobust.evaluation.questions import Threat
from jaxrobust.evaluation.recording import Evaluation, Record
from jaxrobust.evaluation.subject import Subject
from jaxrobust.evaluation.verdicts import Verdicts
from jaxrobust.runtime import hosts


def union(evaluation: Evaluation, several: list[Subject], done: list[Record]) -> Record:
    """Return the record of all balls: an image is robust if nothing in any of them fools it.

    `done` are their records; without, what one ball has fooled is not attacked in the next.
    """
    identity = {"union": [evaluation.identity(subject) for subject in several], "all": bool(done)}
    hosts.agree(identity)
    number = records.number_of(identity)
    if there := evaluation.there(number):
        return there
    if done and jax.process_index():  # the records of the first process are enough
        return {"evaluation": number}
    found = [_of_record(record, evaluation.out) for record in done]
    for count, subject in enumerate(several if not done else ()):
        evaluation.tell(subject)
        standing = _joined(found, several).robust if count else None
        ledgers = evaluation.own(subject, number)
        found.append(
            evaluation.found(subject, f"{number}-{count}", standing=standing, ledgers=ledgers)
        )
    return evaluation.kept(number, "union", _united(found, several))


def ladder(evaluation: Evaluation, rungs: list[Subject]) -> list[Record]:
    """Return the records of several radii of one norm, which rise.

    The largest radius goes first. What is robust there meets only the first attack at the smaller
    ones, whose balls lie within; what was fooled there is tried before any attack; what falls at a
    small radius has fallen at all larger ones. So each image is attacked in full at one radius.
    """
    radii = [float(subject.epsilon or 0) for subject in rungs]
    numbers = [evaluation.number(subject, ladder=radii) for subject in rungs]
    there = [evaluation.there(number) for number in numbers]
    if all(there):
        return [record for record in there if record]
    found: dict[int, dict[str, Any]] = {}
    beyond: dict[int, np.ndarray | None] = {}
    for place in reversed(range(len(rungs))):
        if not radii[place]:
            found[place] = _clean(found[place + 1])
            continue
        beyond[place] = found[place + 1]["verdicts"].robust if place + 1 in found else None
        evaluation.tell(rungs[place])
        found[place] = evaluation.found(
            rungs[place],
            numbers[place],
            beyond=beyond[place],
            ledgers=[path for larger in found for path in evaluation.ledgers(numbers[larger])],
        )
    for place in range(1, len(rungs)):
        fallen = ~found[place - 1]["verdicts"].robust
        if not (fallen & found[place]["verdicts"].robust).any():
            continue
        lower = [numbers[i] for i in range(place) if radii[i]]
        smaller = [path for number in lower for path in evaluation.ledgers(number)]
        again = evaluation.found(
            rungs[place], numbers[place], beyond=beyond[place], ledgers=smaller
        )
        found[place] = again | {
            key: found[place].get(key, []) + again.get(key, []) for key in ("costs", "replayed")
        }
    return [
        there[place]
        or evaluation.kept(
            numbers[place],
            f"{evaluation.asked.method}, ladder" if radii[place] else "clean",
            found[place] | {"ladder": _shared(radii, beyond.get(place), found[place])},
        )
        for place in range(len(rungs))
    ]


def _clean(found: dict[str, Any]) -> dict[str, Any]:
    """Return what is found at radius 0, from what was found at another one."""
    own = found["verdicts"]
    fooled_by = np.where(own.clean, "", "clean")
    none = {"norms": np.zeros_like(own.norms), "reached": np.full_like(own.reached, -1)}
    still = own._replace(fooled_by=fooled_by, **none)
    told: dict[str, Any] = {"attacks": [], "accuracy_after": {}, "costs": [], "flags": {}}
    return told | {"clean": found["clean"], "robust": None, "verdicts": still}


def _shared(radii: list[float], beyond: np.ndarray | None, found: dict[str, Any]) -> dict[str, Any]:
    """Return what a record of a ladder says of what it owes to the other radii."""
    attacks = found["attacks"]
    return {
        "radii": radii,
        "robust_beyond": 0 if beyond is None else int(beyond.sum()),
        "of_these_attacked_by": [attacks[0]["name"]] if attacks else [],
    }


def _of_record(record: Record, out: Path) -> dict[str, Any]:
    """Return what a record that is there says, as `measuring` does."""
    keys = ("attacks", "clean", "robust", "flags", "costs", "accuracy_after")
    return {key: record[key] for key in keys} | {
        "verdicts": verdicts.read(out / str(record["verdicts"]))
    }


def _joined(found: list[dict[str, Any]], several: list[Subject]) -> Verdicts:
    """Return the verdicts of all balls: the first of them that fools an image has its name there.

    Those after the first may know only images that stood before them.
    """
    first = found[0]["verdicts"]
    fooled_by = np.array(first.fooled_by, dtype=object)
    norms, reached = np.array(first.norms), np.array(first.reached)
    for each, subject in zip(found, several, strict=False):
        own = each["verdicts"]
        places = np.searchsorted(first.image_ids, own.image_ids)
        hit = own.clean & ~own.robust
        new = hit & ((fooled_by[places] == "") | (own is first))
        fooled_by[places[new]] = [f"{_ball(subject)}: {name}" for name in own.fooled_by[new]]
        norms[places[new]], reached[places[new]] = own.norms[new], own.reached[new]
    return first._replace(fooled_by=fooled_by.astype(str), norms=norms, reached=reached)


def _ball(subject: Subject) -> Threat:
    return Threat(subject.norm, float(subject.epsilon or 0))


def _united(found: list[dict[str, Any]], several: list[Subject]) -> dict[str, Any]:
    """Return what the record of a union needs, from what was found in each ball."""
    after = {}
    for count, subject in enumerate(several, 1):
        after[str(_ball(subject))] = float(_joined(found[:count], several).robust.mean())
    whole = _joined(found, several)
    flags = {
        f"{_ball(subject)}: {name}": text
        for each, subject in zip(found, several, strict=True)
        for name, text in each.get("flags", {}).items()
    }
    replayed = [tried for each in found for tried in each.get("replayed", ())]
    return ({"replayed": replayed} if replayed else {}) | {
        "attacks": [settings for each in found for settings in each["attacks"]],
        "clean": float(whole.clean.mean()),
        "robust": float(whole.robust.mean()),
        "accuracy_after": after,
        "flags": flags,
        "verdicts": whole,
        "costs": [cost for each in found for cost in each["costs"]],
    }
