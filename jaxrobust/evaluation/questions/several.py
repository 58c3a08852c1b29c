"""Several threats: their union, the worst case over attacks, and a ladder of radii.

An image is robust in a union if nothing in any of its balls fools the network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.evaluation.network import randomised
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import checked, records
from jaxrobust.evaluation.records.record import (
    AccuracyRecord,
    LadderSettings,
    Measured,
    OneDraw,
    WorstCasePart,
)
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.types import Threat

# The measured fields of records, which a union combines.
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
    """Record the union of all threats: a robust image withstands each of them."""
    identity: dict[str, Any] = {"union": [one.evaluation.identity(one.subject) for one in members]}
    identity |= {"all": bool(done)} | ({"worst_case": True} if worst_case else {})
    number = evaluation.numbered(identity)
    if there := evaluation.recorded(number):
        return there
    if done and jax.process_index():  # only the first process needs the records
        return AccuracyRecord(evaluation=number)
    measured = [_of_record(record, evaluation.out) for record in done]
    balls = [member.subject.ball for member in members]
    for count, (of_member, subject) in enumerate(members if not done else ()):
        standing = joined(measured, balls).robust if count else None
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
        rows: Any = parts_of(measured, balls, methods, numbers, skips=not done)
        more = {"worst_case": rows}
    union_of_all = united(measured, balls, names)
    return evaluation.write(number, "union", *union_of_all.noting(**more))


def ladder(evaluation: Evaluation, rungs: list[Subject]) -> list[AccuracyRecord]:
    """Record several ascending radii of one norm.

    The largest radius goes first. Images robust there meet only the first attack at smaller radii,
    whose balls lie within. Points found there are tried before any attack, and images that fall at
    a small radius fall at all larger ones. So each image is attacked in full at only one radius.
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
        ladder: LadderSettings = {
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


def joined(measured: Sequence[Measured], balls: Sequence[Threat]) -> Verdicts:
    """Join the verdicts in all balls; a fooled image names the first ball in which it falls.

    Later balls may cover only the images that survived the earlier ones.
    """
    first = measured[0].verdicts
    fooled_by = np.array(first.fooled_by, dtype=object)
    norms, reached = np.array(first.norms), np.array(first.reached)
    for (_, of_ball, _), ball in zip(measured, balls, strict=False):
        places = np.searchsorted(first.image_ids, of_ball.image_ids)
        hit = of_ball.clean & ~of_ball.robust
        new = hit & ((fooled_by[places] == "") | (of_ball is first))
        fooled_by[places[new]] = [f"{ball}: {name}" for name in of_ball.fooled_by[new]]
        norms[places[new]], reached[places[new]] = of_ball.norms[new], of_ball.reached[new]
    return first._replace(fooled_by=fooled_by.astype(str), norms=norms, reached=reached)


def united(measured: Sequence[Measured], balls: Sequence[Threat], names: Sequence[str]) -> Measured:
    """Combine the measurements in all balls; `names` label the accuracies after each."""
    verdicts = joined(measured, balls)
    records_of = [one.record for one in measured]
    flags = {
        f"{ball}: {name}": text
        for record, ball in zip(records_of, balls, strict=True)
        for name, text in record.flags.items()
    }
    replayed = [source for record in records_of for source in record.replayed or ()]
    judged = [record.draws for record in records_of if record.draws]
    record = AccuracyRecord(
        attacks=[settings for record in records_of for settings in record.attacks],
        clean=float(verdicts.clean.mean()),
        robust=float(verdicts.robust.mean()),
        accuracy_after={
            name: float(joined(measured[:count], balls).robust.mean())
            for count, name in enumerate(names, 1)
        },
        flags=flags,
        costs=[cost for record in records_of for cost in record.costs or ()],
        replayed=replayed or None,
        draws={**judged[0], "one_draw": _by_one(measured)} if judged else None,
    )
    return Measured(record, verdicts)


def _by_one(measured: Sequence[Measured]) -> OneDraw | None:
    """Combine the accuracies by one draw; None if a part by an older version lacks them."""
    # An image that a ball skipped, because by the rule an earlier ball fools it, may stand by one
    # draw. Then `at_most` is True, and the robust accuracy is a bound.
    first, at_most = measured[0].verdicts, False
    robust = np.ones(len(first.image_ids), bool)
    for record, verdicts, _ in measured:
        stands = verdicts.robust
        if record.draws:
            one = record.draws.get("one_draw")
            if not one or "bits" not in one:
                return None
            stands = randomised.unpacked(one["bits"], len(verdicts.image_ids))
        places = np.searchsorted(first.image_ids, verdicts.image_ids)
        is_skipped = np.ones(len(robust), bool)
        is_skipped[places] = False
        at_most |= bool((robust & is_skipped).any())
        robust[places] &= stands
    one = (measured[0].record.draws or {}).get("one_draw")
    clean = one["clean"] if one else float(first.clean.mean())
    return {**records.one_draw(clean, robust), "at_most": at_most}


def parts_of(
    measured: Sequence[Measured],
    balls: Sequence[Threat],
    methods: Sequence[str],
    numbers: Sequence[str | None],
    *,
    skips: bool,
) -> list[WorstCasePart]:
    """List each attack with its number of images and the share of them that survived."""
    rows: list[WorstCasePart] = []
    for place, (record, verdicts, _) in enumerate(measured):
        n, robust = len(verdicts.image_ids), None if skips and place else record.robust
        row: WorstCasePart = {
            "method": methods[place],
            "norm": balls[place].norm,
            "epsilon": balls[place].epsilon,
            "attacks": [settings["name"] for settings in record.attacks],
            "images": n,
            "robust": robust,
            "interval": records.interval(robust, n),
            "evaluation": numbers[place],
        }
        rows.append(row)
    return rows
