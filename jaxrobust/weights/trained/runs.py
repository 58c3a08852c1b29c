"""What a run's workdir offers others: its config, its classes, its best weights."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxrobust.config import (
    VERSION,
    Config,
    NetworkSpec,
    attributes,
    completed,
    network_of,
    of_phase,
)
from jaxrobust.data.sources import registry
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import folders, jsonl
from jaxrobust.types import Weights
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import hashes
from jaxrobust.weights.store.steps import steps

FUNCTION = "function.json"  # in a run: the network's `models.origin` at the start
CLASSES = "classes.txt"  # in a run: class names, one per line in the order of labels


def run_config(workdir: Path, phase: str | None = None) -> Config:
    """Read a run's config as a phase sees it (default: the last with weights)."""
    config = _config(workdir)
    return of_phase(config, phase_of(workdir, phase, config))


def phase_of(workdir: Path, phase: str | None = None, config: Config | None = None) -> str:
    """Choose a phase of a run, given its config if known: the named one, else the last trained."""
    names = (config or _config(workdir)).phases
    if phase not in (None, *names):
        raise ValueError(f"--phase={phase} is unknown; choose one of {', '.join(names)}")
    done = [name for name in names if steps(workdir / name / "best")]
    return phase or (done or names)[-1]


def _config(workdir: Path) -> Any:
    path = workdir / "config.json"
    if not path.is_file():
        near = folders.similar(workdir) or "; name the folder of a training run"
        raise ValueError(f"{workdir} is not a run: config.json is missing{near}")
    try:
        config = json.loads(path.read_text())
        missing = {"model", "data", "attack", "evaluation", "test"} - config.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or name another run") from error
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}: it is not a run's config")
    remember_programs(workdir, config.get("phases", ()))
    resolved = completed(of_this_version(config, path))
    return attributes(resolved)


def remember_programs(workdir: Path, phases: Sequence[str]) -> None:
    """Register the programs of PyTorch modules that a run and its phases keep."""
    for folder in (workdir, *(workdir / name for name in phases)):
        if pytorch.has_programs(programs := folder / pytorch.FOLDER):
            pytorch.find("remember")(programs)


def whole_config(workdir: Path) -> dict[str, Any]:
    """Read a run's config as plain values, adding keys that are newer than the run."""
    return _config(workdir)


def of_this_version(config: dict[str, Any], path: Path) -> Any:
    """Remove the key version from a run's config; reject a version other than this code's."""
    if (version := config.get("version")) != VERSION:
        raise ValueError(
            f"{path} has version {version} of the config's keys, but this code has {VERSION}; use "
            "the version of jaxrobust that began the run, or another folder"
        )
    return {key: value for key, value in config.items() if key != "version"}


def classes_file(workdir: Path, phase: str) -> Path:
    """Return the file with a phase's classes: its own if its data differ from the run's."""
    phase_file = workdir / phase / CLASSES
    return phase_file if phase_file.exists() else workdir / CLASSES


def rewritten(workdir: Path, function: dict[str, Any] | None) -> str:
    """Warn if the file of the user's function that makes a run's network has changed since the run
    began; empty: it has not.
    """
    path = workdir / FUNCTION
    if function is None or not path.exists():
        return ""
    noted = json.loads(path.read_text())["sha256"]
    if noted == function["sha256"]:
        return ""
    if pytorch.is_name(function["name"]) and pytorch.has_programs(workdir / pytorch.FOLDER):
        subject = f"{function['file'] or function['name']} has changed since the run in {workdir}"
        return f"{subject} began; the run continues with the program stored at its start"
    return (
        f"WARNING: {function['file']} has changed since the run in {workdir} began (sha256 "
        f"{str(noted)[:12]} then, {str(function['sha256'])[:12]} now), so its weights are now used "
        "in the network that the changed file defines"
    )


def check_classes(path: Path, source: registry.Source, *, renamed: bool = False) -> None:
    """Reject other classes than those in a run's file `path`: labels would change meaning.

    With `renamed`, lists without a common name are accepted: another data set may name the same
    classes in its own way.
    """
    classes = path.read_text().splitlines() if path.exists() else []
    names = list(source.classes)
    if classes == names or not (classes and names) or (renamed and set(classes).isdisjoint(names)):
        return
    missing, new = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
    choose = f"choose them with --classes {path}" if renamed else "give a new --workdir"
    raise ValueError(
        f"{source.where()} has different classes from {path}: {len(missing)} names are missing "
        f"{missing[:3]}, {len(new)} are new {new[:3]}, so labels would shift. Restore the data "
        f"set, or {choose}"
    )


def records_of(workdir: Path, weights_sha256: str) -> list[dict[str, Any]]:
    """Return the records of some weights in a run: from its tests and its evaluations."""
    rows = [row for file in record_files(workdir) for row in jsonl.read(file)]
    return [row for row in rows if row.get("weights_sha256") == weights_sha256]


def record_files(workdir: Path) -> tuple[Path, Path]:
    """Return the record files of a run: of its tests, and of its evaluations."""
    return workdir / "results.jsonl", workdir / "evaluation" / "results.jsonl"


def run_weights(
    workdir: Path, phase: str | None = None, *, image_size: int | None = None
) -> tuple[str, Weights]:
    """Read the best weights of a phase (default: the last that has some), and their name."""
    config, name = run_config(workdir, phase), phase_of(workdir, phase)
    if not steps(workdir / name / "best"):
        either = " or ".join([phase] if phase else reversed(config.phases))
        raise ValueError(
            f"{workdir} has no best checkpoint of {either}; train until there is one (repeat the "
            "training command)"
        )
    shapes = Weights(*jax.eval_shape(network_of(config).init, jax.random.key(0)))
    from jaxrobust.weights.store import checkpoint  # Orbax

    number, weights, _ = checkpoint.read(workdir / name / "best", shapes)
    words = f"{name}, step {number}, {config.evaluation.weights}"
    rows = jsonl.read(workdir / "results.jsonl")
    tested = {row.get("weights_sha256") for row in rows if row.get("weights") == words}
    if tested and hashes.weights_sha256(*weights) not in tested:
        raise ValueError(
            f"{workdir / name / 'best' / str(number)} does not hold the weights that {workdir}/"
            f"results.jsonl records as {words} (the sha256 differs); restore it from a copy, or "
            "repeat the training command, which tests these weights"
        )
    if image_size is not None:
        weights = at_size(config, weights, image_size)
    return words, weights


def at_size(config: Config, weights: Weights, image_size: int) -> Weights:
    """Resize the positions in a run's weights to images of this size, in pixels."""
    if image_size == config.model.image_size:
        return weights
    network = replace(NetworkSpec.of_config(config), image_size=image_size)
    shapes = jax.eval_shape(network.create(dtype="float32").init, jax.random.key(0))
    arrays = jax.device_get(weights.params | weights.stats)
    try:
        filled = convert.filled(shapes, convert.names(network.name, arrays).rows, arrays)
    except ValueError as error:
        raise ValueError(f"--image_size={image_size}: {error}") from error
    return Weights(*jax.device_put(filled, sharding.replicated(sharding.make_mesh())))
