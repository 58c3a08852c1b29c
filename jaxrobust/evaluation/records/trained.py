"""How weights came about, for a record: their training, and on which images they were chosen."""

import math
from typing import Any

from jaxrobust.attacks import mixes, registry
from jaxrobust.data.splits import grammar
from jaxrobust.evaluation.records import parts
from jaxrobust.resolved import of_phase


def training(
    config: Any,
    phase: str,
    *,
    dataset: str,
    split: str,
    chosen: parts.SelectionImages | None = None,
) -> parts.TrainingFacts:
    """Read from a run's config how it trained up to a phase; a pass is one over an image.

    An attack of K steps costs K passes forward and backward before that of the update, and those of
    several norms at once so many times as much, see `mixes.cost`; rounded up. `selection`
    says on which images the weights were chosen, and whether these are among those of the record
    (null: it is not known); `on_evaluated_images` says whether some of those were trained on. Both
    as far as the names of splits tell, see `grammar.overlap`.
    """
    made: list[dict[str, Any]] = []
    names, seen_images = list(config.phases), []
    for name in names[: names.index(phase) + 1]:
        seen = of_phase(config, name)
        seen_images += trained_on(seen) if seen[name].epochs else []
        section, attack = seen[name], seen.attack
        clean = section.objective == "clean"
        steps = 0 if clean else registry.steps(attack.name, attack.steps)
        made.append({"phase": name, "objective": section.objective, "epochs": section.epochs})
        made[-1] |= {"attack": attack.name if steps else None, "attack_steps": steps}
        made[-1]["at_once"] = mixes.cost(attack) if steps else 1
        if steps:
            keys = ("norm", "epsilon", "mix", "relative_step", "step_size", "start", "start_std")
            made[-1] |= {key: attack[key] for key in keys if attack.get(key) is not None}
    passes = math.ceil(sum(m["epochs"] * (1 + m["attack_steps"] * m.pop("at_once")) for m in made))
    seen = of_phase(config, phase)
    ours: parts.SelectionImages = {"split": seen.data.selection_split}
    ours["attack"] = seen.evaluation.get("attack")
    evaluated, on = (dataset, split), chosen or {"dataset": seen.data.name, **ours}
    images = (on["dataset"], on["split"]) if on["split"] else None
    same = grammar.same_images(images, evaluated) if images else None
    return {
        "phases": made,
        "passes": passes,
        "on_evaluated_images": any(grammar.same_images(one, evaluated) for one in seen_images),
        "selection": {**(chosen or ours), "on_evaluated_images": same},
    }


def trained_on(config: Any) -> list[tuple[str, str]]:
    """List the data sets and splits that a config, as a phase sees it, trains on."""
    data = config.data
    extra = [(data.extra, data.extra_split)] if data.get("extra") else []
    return [(data.name, data.train_split), *extra]


def flags(facts: parts.TrainingFacts | None) -> dict[str, str]:
    """Write a record's flags for images that the weights were chosen or trained on."""
    if not facts:
        return {}
    doubts, chosen = {}, facts["selection"]
    if chosen["on_evaluated_images"]:
        doubts["selection"] = (
            f"the weights were chosen on images of {chosen['split']}, some of which, or all, are "
            "evaluated here: the numbers are too high by what the choice gained"
        )
    if chosen["on_evaluated_images"] is None:
        doubts["selection"] = "nothing says on which images the weights were chosen"
    if facts["on_evaluated_images"]:
        doubts["training"] = "the weights were trained on some of these images, or on all of them"
    return doubts
