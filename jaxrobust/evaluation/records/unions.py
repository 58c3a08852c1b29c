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
    for each, ball in zip(measured, balls, strict=False):
        own = each.verdicts
        places = np.searchsorted(first.image_ids, own.image_ids)
        hit = own.clean & ~own.robust
        new = hit & ((fooled_by[places] == "") | (own is first))
        fooled_by[places[new]] = [f"{ball}: {name}" for name in own.fooled_by[new]]
        norms[places[new]], reached[places[new]] = own.norms[new], own.reached[new]
    return first._replace(fooled_by=fooled_by.astype(str), norms=norms, reached=reached)


def united(measured: Sequence[Measured], balls: Sequence[Threat], names: Sequence[str]) -> Measured:
    """Unite what was measured in each ball, which `names` call."""
    whole = joined(measured, balls)
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
        clean=float(whole.clean.mean()),
        robust=float(whole.robust.mean()),
        accuracy_after={
            name: float(joined(measured[:count], balls).robust.mean())
            for count, name in enumerate(names, 1)
        },
        flags=flags,
        costs=[cost for record in records_of for cost in record.costs or ()],
        replayed=replayed or None,
        draws={**judged[0], "one_draw": _by_one(measured)} if judged else None,
    )
    return Measured(record, whole)


def _by_one(measured: Sequence[Measured]) -> parts.OneDraw | None:
    """Unite the accuracies by one draw; None: a part of an older version lacks them.

    What a ball did not attack, because the rule says that one before it fools it, may stand by one
    draw: then `at_most` is True, and the robust accuracy a bound.
    """
    whole = measured[0].verdicts
    robust, at_most = np.ones(len(whole.image_ids), bool), False
    for each in measured:
        own, draws = each.verdicts, each.record.draws
        stands = own.robust
        if draws:
            one = draws.get("one_draw")
            if not one or "bits" not in one:
                return None
            stands = randomised.unpacked(one["bits"], len(own.image_ids))
        places = np.searchsorted(whole.image_ids, own.image_ids)
        left_out = np.ones(len(robust), bool)
        left_out[places] = False
        at_most |= bool((robust & left_out).any())
        robust[places] &= stands
    first = measured[0].record.draws
    once = first["one_draw"] if first else None
    clean = once["clean"] if once else None
    right = float(whole.clean.mean()) if clean is None else clean
    return {**records.one_draw(right, robust), "at_most": at_most}


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
        ball = balls[place]
        row: parts.WorstCasePart = {"method": methods[place]}
        row |= {"norm": ball.norm, "epsilon": ball.epsilon}
        row |= {"attacks": [settings["name"] for settings in record.attacks], "images": n}
        row |= {"robust": robust, "interval": records.interval(robust, n)}
        rows.append({**row, "evaluation": numbers[place]})
    return rows
