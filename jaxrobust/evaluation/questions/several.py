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
    identity: dict[str, Any] = {"union": [one.evaluation.identity(one.subject) for one in members]}
    identity |= {"all": bool(done)} | ({"worst_case": True} if worst_case else {})
    number = evaluation.numbered(identity)
    if there := evaluation.recorded(number):
        return there
    if done and jax.process_index():  # the records of the first process are enough
        return AccuracyRecord(evaluation=number)
    measured = [_of_record(record, evaluation.out) for record in done]
    balls = [member.subject.ball for member in members]
    for count, (of_member, subject) in enumerate(members if not done else ()):
        standing = unions.joined(measured, balls).robust if count else None
        of_member.announce(subject, standing)
        ledgers = of_member.ledgers_to_replay(subject, number)
        part = f"{number}-{count}"
        measured.append(of_member.measure(subject, part, standing=standing, ledgers=ledgers))
    names, more = [*map(str, balls)], {"union": {"each_on_all_images": bool(done)}}
    if worst_case:
        questions = [member.evaluation.question for member in members]
        # Several attacks may have the same ball.
        names = [f"{ball} {q.attack}" for ball, q in zip(balls, questions, strict=True)]
        numbers = [record.evaluation for record in done] or [None] * len(members)
        methods = [question.method for question in questions]
        rows: Any = unions.parts_of(measured, balls, methods, numbers, skips=not done)
        more = {"worst_case": rows}
    united = unions.united(measured, balls, names)
    return evaluation.write(number, "union", *united.noting(**more))


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
    written = []
    for place, number in enumerate(numbers):
        robust_beyond, attacks = beyond.get(place), measured[place].record.attacks
        ladder: parts.LadderSettings = {
            "radii": radii,
            "robust_beyond": 0 if robust_beyond is None else int(robust_beyond.sum()),
            "of_these_attacked_by": [attacks[0]["name"]] if attacks else [],
        }
        method = f"{evaluation.question.method}, ladder" if radii[place] else "clean"
        parts_of_record = measured[place].noting(ladder=ladder)
        written.append(there[place] or evaluation.write(number, method, *parts_of_record))
    return written


def _clean(measured: Measured) -> Measured:
    verdicts = measured.verdicts._replace(
        fooled_by=np.where(measured.verdicts.clean, "", "clean"),
        norms=np.zeros_like(measured.verdicts.norms),
        reached=np.full_like(measured.verdicts.reached, -1),
    )
    record = AccuracyRecord(clean=measured.record.clean, accuracy_after={}, costs=[])
    return Measured(record, verdicts)


def _of_record(record: AccuracyRecord, out: Path) -> Measured:
    fields = AccuracyRecord(**{name: getattr(record, name) for name in _MEASURED})
    return Measured(fields, checked.verdicts(record, out / "results.jsonl"))
