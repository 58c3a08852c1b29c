"""Several balls: their union, the worst case over attacks in them, and a ladder of radii that share
what they find.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.evaluation.questions import three_norms
from jaxrobust.evaluation.questions.recording import Evaluation, Record
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import unions, verdicts


class Member(NamedTuple):
    """What is asked in one of the balls."""

    evaluation: Evaluation
    subject: Subject  # with the threat


def union(
    evaluation: Evaluation,
    members: list[Member],
    done: list[Record],
    *,
    worst_case: bool = False,
) -> Record:
    """Return the record of all balls: an image is robust if nothing in any of them fools it.

    Args:
      evaluation: whose settings the record has.
      members: the balls.
      done: their records; without, what one has fooled is not attacked in the next.
      worst_case: they are those of `worst_case`; the record says what each found.
    """
    identity: dict[str, Any] = {"union": [own.evaluation.identity(own.subject) for own in members]}
    identity |= {"all": bool(done)} | ({"worst_case": True} if worst_case else {})
    number = evaluation.numbered(identity)
    if there := evaluation.there(number):
        return there
    if done and jax.process_index():  # the records of the first process are enough
        return {"evaluation": number}
    found = [_of_record(record, evaluation.out) for record in done]
    balls = [own.subject.ball for own in members]
    for count, (asks, subject) in enumerate(members if not done else ()):
        standing = unions.joined(found, balls).robust if count else None
        asks.tell(subject, standing)
        ledgers = asks.own(subject, number)
        found.append(asks.found(subject, f"{number}-{count}", standing=standing, ledgers=ledgers))
    asked = [own.evaluation.asked for own in members]
    if not worst_case:
        told = unions.united(found, balls, [*map(str, balls)])
        told |= {"union": {"each_on_all_images": bool(done)}}
        return evaluation.kept(number, "union", told)
    names = [three_norms.name(*own) for own in zip(balls, asked, strict=True)]
    numbers = [record["evaluation"] for record in done] or [None] * len(members)
    rows = unions.each_of(found, balls, [own.method for own in asked], numbers, skips=not done)
    told = unions.united(found, balls, names) | {"worst_case": rows}
    return evaluation.kept(number, "union", told)


def ladder(evaluation: Evaluation, rungs: list[Subject]) -> list[Record]:
    """Return the records of several radii of one norm, which rise.

    The largest radius goes first. What is robust there meets only the first attack at the smaller
    ones, whose balls lie within; what was fooled there is tried before any attack; what falls at a
    small radius has fallen at all larger ones. So each image is attacked in full at one radius.
    """
    radii = [float(subject.ball.epsilon) for subject in rungs]
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
    keys = ["attacks", "clean", "robust", "flags", "costs", "accuracy_after"]
    keys += [key for key in ("replayed", "draws") if key in record]
    return {key: record[key] for key in keys} | {
        "verdicts": verdicts.read(out / str(record["verdicts"]))
    }
