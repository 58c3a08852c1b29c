"""What several attacks found of the same images, as one: an image is robust if none fools it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrobust.evaluation.network import randomised
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.types import Threat


def joined(found: Sequence[dict[str, Any]], balls: Sequence[Threat]) -> Verdicts:
    """Return the verdicts of all balls: the first of them that fools an image has its name there.

    Those after the first may know only images that stood before them.
    """
    first = found[0]["verdicts"]
    fooled_by = np.array(first.fooled_by, dtype=object)
    norms, reached = np.array(first.norms), np.array(first.reached)
    for each, ball in zip(found, balls, strict=False):
        own = each["verdicts"]
        places = np.searchsorted(first.image_ids, own.image_ids)
        hit = own.clean & ~own.robust
        new = hit & ((fooled_by[places] == "") | (own is first))
        fooled_by[places[new]] = [f"{ball}: {name}" for name in own.fooled_by[new]]
        norms[places[new]], reached[places[new]] = own.norms[new], own.reached[new]
    return first._replace(fooled_by=fooled_by.astype(str), norms=norms, reached=reached)


def united(
    found: Sequence[dict[str, Any]], balls: Sequence[Threat], names: Sequence[str]
) -> dict[str, Any]:
    """Return what the record of all of them needs, from what was found in each ball.

    Args:
      found: as `measuring` returns it.
      balls: of each.
      names: what each is called.
    """
    after = {
        name: float(joined(found[:count], balls).robust.mean())
        for count, name in enumerate(names, 1)
    }
    whole = joined(found, balls)
    flags = {
        f"{ball}: {name}": text
        for each, ball in zip(found, balls, strict=True)
        for name, text in each.get("flags", {}).items()
    }
    replayed = [tried for each in found for tried in each.get("replayed", ())]
    judged = [each["draws"] | {"one_draw": _by_one(found)} for each in found if each.get("draws")]
    return ({"replayed": replayed} if replayed else {}) | {
        **({"draws": judged[0]} if judged else {}),
        "attacks": [settings for each in found for settings in each["attacks"]],
        "clean": float(whole.clean.mean()),
        "robust": float(whole.robust.mean()),
        "accuracy_after": after,
        "flags": flags,
        "verdicts": whole,
        "costs": [cost for each in found for cost in each["costs"]],
    }


def _by_one(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the accuracies of all balls by one draw; None: a part of an older version lacks them.

    What a ball did not attack, because the rule says that one before it fools it, may stand by one
    draw: then `at_most` is True, and the robust accuracy a bound.
    """
    whole = found[0]["verdicts"]
    robust, at_most = np.ones(len(whole.image_ids), bool), False
    for each in found:
        own, draws = each["verdicts"], each.get("draws")
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
    n, clean = len(robust), (found[0].get("draws") or {}).get("one_draw", {}).get("clean")
    means = {"clean": float(whole.clean.mean()) if clean is None else clean}
    means |= {"robust": float(robust.mean())}
    ends = {key: records.interval(value, n) for key, value in means.items()}
    return means | {"interval": ends, "bits": randomised.packed(robust), "at_most": at_most}


def each_of(
    found: Sequence[dict[str, Any]],
    balls: Sequence[Threat],
    methods: Sequence[str],
    numbers: Sequence[str | None],
    *,
    skips: bool,
) -> list[dict[str, Any]]:
    """Return what each attack was, on how many images, and what share of them it left.

    Args:
      found, balls: as in `united`.
      methods: each in words.
      numbers: of the evaluations of each alone; None: there is none.
      skips: each saw only what stood before it, so that but for the first one its own robust
        accuracy is not known: None.
    """
    rows: list[dict[str, Any]] = []
    for place, own in enumerate(found):
        n, robust = len(own["verdicts"].image_ids), own["robust"]
        if skips and place:
            robust = None
        rows.append({"method": methods[place], **balls[place].settings()})
        rows[-1] |= {"attacks": [settings["name"] for settings in own["attacks"]]}
        rows[-1] |= {"images": n, "robust": robust, "interval": records.interval(robust, n)}
        rows[-1] |= {"evaluation": numbers[place]}
    return rows
