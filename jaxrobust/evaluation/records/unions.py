"""What several attacks found of the same images, as one: an image is robust if none fools it."""

from collections.abc import Sequence

import numpy as np

from jaxrobust.evaluation.network import randomised
from jaxrobust.evaluation.records import parts, records
from jaxrobust.evaluation.records.record import AccuracyRecord, Measured
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.types import Threat


def joined(measured: Sequence[Measured], balls: Sequence[Threat]) -> Verdicts:
    """Join the verdicts of all balls: the first of them that fools an image has its name there.

    Those after the first may know only images that stood before them.
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
    """Unite what was measured in each ball, which `names` call."""
    verdicts = joined(measured, balls)
    records_of = [each.record for each in measured]
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


def _by_one(measured: Sequence[Measured]) -> parts.OneDraw | None:
    """Unite the accuracies by one draw; None: a part of an older version lacks them.

    What a ball did not attack, because the rule says that one before it fools it, may stand by one
    draw: then `at_most` is True, and the robust accuracy a bound.
    """
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
) -> list[parts.WorstCasePart]:
    """List each attack, on how many images it was, and what share of them it left."""
    rows: list[parts.WorstCasePart] = []
    for place, (record, verdicts, _) in enumerate(measured):
        n, robust = len(verdicts.image_ids), None if skips and place else record.robust
        row: parts.WorstCasePart = {
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
