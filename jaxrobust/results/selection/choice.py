"""The choice among the weights that a run kept: evaluate, compare and record them."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrobust.data.splits import grammar as splits
from jaxrobust.evaluation.network import collapse
from jaxrobust.results.plotting import plotting
from jaxrobust.results.selection import candidates as measuring
from jaxrobust.results.selection.candidates import Size
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.files import jsonl, locks, provenance
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.training.update import objectives
from jaxrobust.types import Threat, threats
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import history, kept, runs

RULE = "ties go to the later epoch, then to ema over raw, then to the smaller images"
ONE_CLASS = "one that predicts a single class only if all do"
_COLOURS = ("#1f4e79", "#d1495b", "#3c896d", "#b07d2b", "#6b4c9a", "#5f6b73")


class SelectionSettings(NamedTuple):
    """The candidates, the images and the attack of a choice."""

    run: Path
    phase: str | None = None
    image_size: tuple[int, ...] = ()
    attack: str = "apgd-ce"  # or autoattack
    steps: int | None = 10  # None: for AutoAttack
    split: str | None = None
    n: int = 0  # images, spread over the classes; 0: all
    batch: int | None = None


def select(settings: SelectionSettings) -> dict[str, Any]:
    """Evaluate missing candidates, choose, and return the content of the file.

    Several hosts evaluate together, and the first one writes.
    """
    run, phase = settings.run, _phase(settings)
    config, path = _config(settings, phase), run / kept.SELECTION
    sides = sorted(set(settings.image_size or [config.model.image_size]))
    attack = {"name": settings.attack, "steps": settings.steps}
    question = {
        "phase": phase,
        "metric": "robust" if objectives.named(config[phase].objective).attacks else "clean",
        "dataset": config.data.name,
        "split": config.data.selection_split,
        "images": settings.n or None,  # null: all
        "seed": config.seed,
        "dtype": "float32" if settings.attack == "autoattack" else config.model.dtype,
        "attack": attack | _settings(threats(config.attack)),
    }
    code = {"commit": provenance.commit(), "versions": provenance.versions()}
    compilation.use_persistent_cache(run.parent)
    subject = f"the choice in {run}"
    lock = locks.held(run / "selection.lock", resource=subject, otherwise="copy the run")
    first = jax.process_index() == 0
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        hosts.together(lambda: stack.enter_context(lock) if first else None)
        search: dict[str, Any] = {"steps": settings.steps, "folder": Path(folder)}
        at = {side: measuring.at_size(run, phase, config, side, **search) for side in sides}
        computed = measuring.computed(run, phase, at)
        done = hosts.together(lambda: measuring.candidates(path, question, computed))
        candidates, computed = hosts.everyone(done)[0]
        measuring.check_weights(run, candidates)
        code |= computed | {"image_choice": at[sides[0]].images.choice}
        for row in _measured(settings, phase, at, {key_of(row) for row in candidates}):
            candidates = sorted([*candidates, row], key=key_of)
            _write(path, question, candidates, code)
        chosen, reason = choose(candidates, question["metric"])
        while not chosen.get("exact", True):  # upper bounds below an exact best cannot win
            exact = _in_full(settings, phase, at, chosen)
            candidates = [exact if key_of(row) == key_of(exact) else row for row in candidates]
            _write(path, question, candidates, code)
            chosen, reason = choose(candidates, question["metric"])
        written = _write(path, question, candidates, code, chosen=chosen, reason=reason)
        picture = draw(written, run / "selection.png") if first else ""
    if first:
        print(f"{kept.selected(run).words}, {chosen['image_size']} px: {reason}")
        for line in warnings_of(chosen, candidates):
            print(f"WARNING: {line}")
        print(f"{path}\n{picture}")
        print(f"test it once: jaxrobust evaluate --workdir {run} --selected")
    return written


def _phase(settings: SelectionSettings) -> str:
    config = runs.run_config(settings.run, settings.phase)
    having = [name for name in config.phases if kept.steps_of(settings.run, name)]
    if not having or settings.phase not in (None, *having):
        of = f"the phase {settings.phase} of {settings.run}" if having else str(settings.run)
        raise ValueError(
            f"{of} has no saved weights to choose from; train with "
            "--config.checkpoint.keep_every_epochs=N"
        )
    return settings.phase or having[-1]


def _config(settings: SelectionSettings, phase: str) -> Any:
    config = runs.run_config(settings.run, phase)
    changes = {"images": settings.n, "batch_size": settings.batch}
    sections: dict[str, Any] = {"data": {"selection_split": settings.split}, "evaluation": changes}
    config = measuring.changed(config, sections)
    data = config.data
    if splits.overlap(data.selection_split, data.test_split, data.name):
        same = data.selection_split == data.test_split
        why = "is" if same else f"may overlap with {data.test_split},"
        raise ValueError(
            f"{data.selection_split} {why} the test split of {settings.run}, which must not "
            "be used to choose weights; give another --split"
        )
    for images in history.trained_on(config, phase):
        trained = images["dataset"], images["split"]
        if splits.same_images(trained, (data.name, data.selection_split)):
            say(
                f"WARNING: {data.selection_split} shares images with {trained[1]}, which {phase} "
                "is trained on, so the choice does not reveal overfitting"
            )
    return config


def _settings(balls: Sequence[Threat]) -> dict[str, Any]:
    """Return the settings of a threat, or of several that an image must all withstand."""
    threats = [ball.settings() for ball in balls]
    return (
        threats[0]
        if len(threats) == 1
        else {key: [ball[key] for ball in threats] for key in threats[0]}
    )


def _measured(
    settings: SelectionSettings, phase: str, at: dict[int, Size], done: set[tuple[int, str, int]]
) -> Iterator[dict[str, Any]]:
    for step in kept.steps_of(settings.run, phase):
        choices = ((kind, size) for kind in kept.WHICH for size in at)
        missing = [one for one in choices if (step, *one) not in done]
        if not missing:
            continue
        epoch, both = kept.read(settings.run, phase, step)
        for kind, size in missing:
            weights = kept.at_size(settings.run, phase, both.of(kind), size)
            reached = at[size].measure(weights, False)
            exact = settings.attack != "autoattack"
            collapsed = ", collapsed to one class" if collapse.proven(reached) else ""
            say(
                f"{phase}, epoch {epoch:g}, {kind}, {size} px: clean {reached['clean']:.2%}, "
                f"robust {'' if exact else 'at most '}{reached['robust']:.2%} of "
                f"{reached['images']:,} images{collapsed}"
            )
            yield {
                "phase": phase,
                "step": step,
                "epoch": epoch,
                "weights": kind,
                "image_size": size,
                "preprocessing": at[size].preprocessing,
                "weights_sha256": hashes.weights_sha256(*weights),
                **{key: reached[key] for key in ("clean", "robust", "images")},
                "passes": reached.get("passes"),  # of AutoAttack; a backward pass counts as 2
                "exact": exact,
                "collapse": reached.get("collapse"),  # null: no collapse found
            }


def _in_full(
    settings: SelectionSettings, phase: str, at: dict[int, Size], row: Any
) -> dict[str, Any]:
    size, kind = row["image_size"], row["weights"]
    if size not in at:
        raise ValueError(
            f"{size} px may be the best size, but only the first attack has run at it; give "
            f"--image_size {size} too"
        )
    epoch, both = kept.read(settings.run, phase, row["step"])
    reached = at[size].measure(kept.at_size(settings.run, phase, both.of(kind), size), True)
    robust = min(row["robust"], reached["robust"])
    say(f"{phase}, epoch {epoch:g}, {kind}, {size} px, in full: robust {robust:.2%}")
    passes = (row["passes"] or 0) + reached.get("passes", 0)
    return row | {"robust": robust, "exact": True, "passes": passes}


def choose(candidates: list[dict[str, Any]], metric: str) -> tuple[dict[str, Any], str]:
    """Return the best candidate and the reason.

    A network that answers one class keeps its answer under attack, which is not robustness. It is
    chosen only if all candidates are such networks.
    """

    def rank(row: dict[str, Any]) -> tuple[Any, ...]:
        one = collapse.proven(row)
        return not one, row[metric], row["step"], row["weights"] == "ema", -row["image_size"]

    best = max(candidates, key=rank)
    aside = [] if collapse.proven(best) else [row for row in candidates if collapse.proven(row)]
    equal = sum(row[metric] == best[metric] for row in candidates if row not in aside) - 1
    reason = (
        f"the highest {metric} accuracy of {len(candidates)} candidates, {best[metric]:.2%} of "
        f"{best['images']:,} images"
    )
    if aside:
        words = "one that predicts" if len(aside) == 1 else f"{len(aside)} that predict"
        reason += f"; {words} a single class left out, at most {max(r[metric] for r in aside):.2%}"
    bounded = sum(not row.get("exact", True) for row in candidates)
    reason += f"; {bounded} cannot do better after APGD-CE alone" if bounded else ""
    others = "another reaches" if equal == 1 else f"{equal} others reach"
    return best, reason + (f"; {others} as much: {RULE}" if equal else "")


def key_of(row: dict[str, Any]) -> tuple[int, str, int]:
    """Return step, kind of weights and image size, which identify a candidate."""
    return row["step"], row["weights"], row["image_size"]


def warnings_of(chosen: dict[str, Any], candidates: list[dict[str, Any]]) -> Iterator[str]:
    """Yield reasons to doubt a choice: it answers one class, or that is unknown."""
    if chosen.get("collapse"):
        yield chosen["collapse"]["words"]
    if older := sum("collapse" not in row for row in candidates):
        yield (
            f"{older} of {len(candidates)} candidates were measured by an older version, which did "
            "not check whether they predict a single class; move the file away to measure them "
            "again"
        )


def _write(
    path: Path, question: Any, candidates: Any, code: Any, *, chosen: Any = None, reason: Any = None
) -> dict[str, Any]:
    written = {"schema": kept.SCHEMA, **question, "rule": f"the highest; {ONE_CLASS}; {RULE}"}
    written |= {"chosen": chosen, "reason": reason, "candidates": candidates} | code
    if jax.process_index() == 0:
        jsonl.replace(path, json.dumps(written, indent=2) + "\n")
    return written


def draw(selection: dict[str, Any], path: Path) -> str:
    """Draw both accuracies over the epochs; return the picture's path, or why it is missing."""
    try:
        plt = plotting()
    except ValueError as error:
        return f"no curve: {error}"
    figure, panel = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rows, chosen = selection["candidates"], selection["chosen"]
    lines = sorted({(row["image_size"], row["weights"]) for row in rows})
    for i, (size, kind) in enumerate(lines):
        line = [row for row in rows if (row["image_size"], row["weights"]) == (size, kind)]
        epochs, colour = [row["epoch"] for row in line], _COLOURS[i % len(_COLOURS)]
        for key, style in (("robust", "o-"), ("clean", "o--")):
            values, label = [100 * row[key] for row in line], f"{key}, {kind}, {size} px"
            panel.plot(epochs, values, style, ms=3, color=colour, label=label)
    best, steps = 100 * chosen[selection["metric"]], selection["attack"]["steps"]
    panel.plot(chosen["epoch"], best, "*", ms=14, color="black", label="chosen", zorder=0)
    bounds = not all(row.get("exact", True) for row in rows)
    attack = selection["attack"]["name"] + ", upper bounds" * bounds
    attack += f", {steps} steps" if steps else ""
    panel.set(xlabel=f"epoch of {selection['phase']}", ylabel="accuracy, %", ylim=(0, 103))
    panel.set_title(f"{selection['dataset']}, split {selection['split']}: {attack}", fontsize=9)
    panel.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return str(path)
