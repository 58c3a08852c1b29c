"""Several balls: their union, the worst case over attacks in them, and a ladder of radii."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import checked, parts, unions
from jaxrobust.evaluation.records.record import AccuracyRecord, Measured

# The fields of a record that are measured, which the record of a union is made of.
_MEASURED = ["attacks", "clean", "robust", "flags"]
_MEASURED += ["costs", "accuracy_after", "replayed", "draws"]


class ThreatMember(NamedTuple):
    """An evaluation in one of several balls."""

    evaluation: Evaluation
    subject: Subject  # with the threat


def union(
    evaluation: Evaluation,
    members: list[ThreatMember],
    done: list[AccuracyRecord],
    *,
    worst_case: bool = False,
) -> AccuracyRecord:
    """Record all balls together: an image is robust if nothing in any of them fools it."""
    identity: dict[str, Any] = {"union": [own.evaluation.identity(own.subject) for own in members]}
    identity |= {"all": bool(done)} | ({"worst_case": True} if worst_case else {})
    number = evaluation.numbered(identity)
    if there := evaluation.recorded(number):
        return there
    if done and jax.process_index():  # the records of the first process are enough
        return AccuracyRecord(evaluation=number)
    measured = [_of_record(record, evaluation.out) for record in done]
    balls = [own.subject.ball for own in members]
    for count, (each, subject) in enumerate(members if not done else ()):
        standing = unions.joined(measured, balls).robust if count else None
        each.announce(subject, standing)
        ledgers = each.ledgers_to_replay(subject, number)
        part = f"{number}-{count}"
        measured.append(each.measure(subject, part, standing=standing, ledgers=ledgers))
    questions = [own.evaluation.question for own in members]
    if not worst_case:
        whole = unions.united(measured, balls, [*map(str, balls)])
        more: dict[str, Any] = {"union": {"each_on_all_images": bool(done)}}
    else:
        # Several attacks may have the same ball.
        names = [f"{ball} {q.attack}" for ball, q in zip(balls, questions, strict=True)]
        whole = unions.united(measured, balls, names)
        numbers = [record.evaluation for record in done] or [None] * len(members)
        methods = [question.method for question in questions]
        rows = unions.parts_of(measured, balls, methods, numbers, skips=not done)
        more = {"worst_case": rows}
    return evaluation.write(number, "union", *whole.noting(**more))


def ladder(evaluation: Evaluation, rungs: list[Subject]) -> list[AccuracyRecord]:
    """Record several radii of one norm, which rise.

    The largest radius goes first. What is robust there meets only the first attack at the smaller
    ones, whose balls lie within; what was fooled there is tried before any attack; what falls at a
    small radius has fallen at all larger ones. So each image is attacked in full at one radius.
    """
    radii = [float(subject.ball.epsilon) for subject in rungs]
    numbers = [evaluation.number(subject, ladder=radii) for subject in rungs]
    there = [evaluation.recorded(number) for number in numbers]
    if all(there):
        return [record for record in there if record]
    measured: dict[int, Measured] = {}
    beyond: dict[int, np.ndarray | None] = {}
    for place in reversed(range(len(rungs))):
        if not radii[place]:
            measured[place] = _clean(measured[place + 1])
            continue
        larger = measured.get(place + 1)
        beyond[place] = larger.verdicts.robust if larger else None
        evaluation.announce(rungs[place])
        above = [path for rung in measured for path in evaluation.ledgers(numbers[rung])]
        measured[place] = evaluation.measure(
            rungs[place], numbers[place], beyond=beyond[place], ledgers=above
        )
    for place in range(1, len(rungs)):
        fallen = ~measured[place - 1].verdicts.robust
        if not (fallen & measured[place].verdicts.robust).any():
            continue
        lower = [numbers[i] for i in range(place) if radii[i]]
        smaller = [path for number in lower for path in evaluation.ledgers(number)]
        again = evaluation.measure(
            rungs[place], numbers[place], beyond=beyond[place], ledgers=smaller
        )
        first, then = measured[place].record, again.record
        costs = (first.costs or []) + (then.costs or [])
        replayed = (first.replayed or []) + (then.replayed or [])
        measured[place] = again.noting(costs=costs, replayed=replayed)
    return [
        there[place]
        or evaluation.write(
            numbers[place],
            f"{evaluation.question.method}, ladder" if radii[place] else "clean",
            *measured[place].noting(ladder=_shared(radii, beyond.get(place), measured[place])),
        )
        for place in range(len(rungs))
    ]


def _clean(measured: Measured) -> Measured:
    own = measured.verdicts
    fooled_by = np.where(own.clean, "", "clean")
    none = {"norms": np.zeros_like(own.norms), "reached": np.full_like(own.reached, -1)}
    still = own._replace(fooled_by=fooled_by, **none)
    return Measured(AccuracyRecord(clean=measured.record.clean, accuracy_after={}, costs=[]), still)


def _shared(
    radii: list[float], beyond: np.ndarray | None, measured: Measured
) -> parts.LadderSettings:
    attacks = measured.record.attacks
    return {
        "radii": radii,
        "robust_beyond": 0 if beyond is None else int(beyond.sum()),
        "of_these_attacked_by": [attacks[0]["name"]] if attacks else [],
    }


def _of_record(record: AccuracyRecord, out: Path) -> Measured:
    kept = AccuracyRecord(**{name: getattr(record, name) for name in _MEASURED})
    return Measured(kept, checked.verdicts(record, out / "results.jsonl"))
