"""What the workdir of a run holds for others: its config, its classes, its best weights."""

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
from jaxrobust.weights.store import checkpoint, hashes

FUNCTION = "function.json"  # of a run: the network's `models.origin` when it began
CLASSES = "classes.txt"  # of a run: the classes' names, one a line in the order of labels


def run_config(workdir: Path, phase: str | None = None) -> Config:
    """Read the config of a run as a phase sees it (default: the last that has weights)."""
    config = _config(workdir)
    return of_phase(config, phase_of(workdir, phase, config))


def phase_of(workdir: Path, phase: str | None = None, config: Config | None = None) -> str:
    """Choose a phase of a run, whose config may be known: the named one, else the last trained."""
    names = (config or _config(workdir)).phases
    if phase not in (None, *names):
        raise ValueError(f"--phase={phase} is unknown; one of {', '.join(names)}")
    done = [name for name in names if checkpoint.steps(workdir / name / "best")]
    return phase or (done or names)[-1]


def _config(workdir: Path) -> Any:
    path = workdir / "config.json"
    if not path.is_file():
        near = folders.similar(workdir) or "; name the folder of a training"
        raise ValueError(f"{workdir}: no run is there, config.json is missing{near}")
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
    """Take the programs of PyTorch's modules that a run keeps, for itself and for its phases."""
    for folder in (workdir, *(workdir / name for name in phases)):
        if pytorch.has_programs(programs := folder / pytorch.FOLDER):
            pytorch.find("remember")(programs)


def whole_config(workdir: Path) -> dict[str, Any]:
    """Read the config of a run as plain values, with the keys that are younger than the run."""
    return _config(workdir)


def of_this_version(config: dict[str, Any], path: Path) -> Any:
    """Take the version of its keys from a run's config; refuse another version than this code's."""
    if (version := config.get("version")) != VERSION:
        raise ValueError(
            f"{path} has version {version} of the config's keys, and this code has {VERSION}: use "
            "the version of jaxrobust that began the run, or another folder"
        )
    return {key: value for key, value in config.items() if key != "version"}


def classes_file(workdir: Path, phase: str) -> Path:
    """Find the file with the classes of a phase: its own, if its data is not the run's."""
    phase_file = workdir / phase / CLASSES
    return phase_file if phase_file.exists() else workdir / CLASSES


def rewritten(workdir: Path, function: dict[str, Any] | None) -> str:
    """Warn where the file of a user's function, which makes a run's network, has changed since the
    run began; empty: it has not.
    """
    path = workdir / FUNCTION
    if function is None or not path.exists():
        return ""
    noted = json.loads(path.read_text())["sha256"]
    if noted == function["sha256"]:
        return ""
    if pytorch.is_name(function["name"]) and pytorch.has_programs(workdir / pytorch.FOLDER):
        subject = f"{function['file'] or function['name']} is no longer what the run in {workdir}"
        return f"{subject} began with; the run continues with the program that it keeps since then"
    return (
        f"WARNING: {function['file']} has changed since the run in {workdir} began (sha256 "
        f"{str(noted)[:12]} then, {str(function['sha256'])[:12]} now), and its weights are now in "
        "the network that this file makes"
    )


def check_classes(path: Path, source: registry.Source, *, renamed: bool = False) -> None:
    """Refuse other classes than those in `path`, a run's: labels would mean something else.

    With `renamed`, lists without a common name tell nothing: another data set may name the same
    classes its way.
    """
    classes = path.read_text().splitlines() if path.exists() else []
    names = list(source.classes)
    if classes == names or not (classes and names) or (renamed and set(classes).isdisjoint(names)):
        return
    missing, new = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
    choose = f"choose them with --classes {path}" if renamed else "give a new --workdir"
    raise ValueError(
        f"{source.where()} has other classes than {path}: {len(missing)} of its names are missing "
        f"{missing[:3]}, {len(new)} are new {new[:3]}, and labels would shift. Restore the data "
        f"set, or {choose}"
    )


def records_of(workdir: Path, weights_sha256: str) -> list[dict[str, Any]]:
    """Find the records of some weights in a run: those of its tests and of its evaluations."""
    rows = [row for file in record_files(workdir) for row in jsonl.read(file)]
    return [row for row in rows if row.get("weights_sha256") == weights_sha256]


def record_files(workdir: Path) -> tuple[Path, Path]:
    """Name the files of records of a run: of its tests, and of its evaluations."""
    return workdir / "results.jsonl", workdir / "evaluation" / "results.jsonl"


def run_weights(
    workdir: Path, phase: str | None = None, *, image_size: int | None = None
) -> tuple[str, Weights]:
    """Read the best weights of a phase (default: the last one that has them), and their name."""
    config, name = run_config(workdir, phase), phase_of(workdir, phase)
    if not checkpoint.steps(workdir / name / "best"):
        either = " or ".join([phase] if phase else reversed(config.phases))
        raise ValueError(
            f"{workdir} has no best checkpoint of {either}; train until it has one (the training "
            "command continues)"
        )
    shapes = Weights(*jax.eval_shape(network_of(config).init, jax.random.key(0)))
    number, weights, _ = checkpoint.read(workdir / name / "best", shapes)
    words = f"{name}, step {number}, {config.evaluation.weights}"
    rows = jsonl.read(workdir / "results.jsonl")
    tested = {row.get("weights_sha256") for row in rows if row.get("weights") == words}
    if tested and hashes.weights_sha256(*weights) not in tested:
        raise ValueError(
            f"{workdir / name / 'best' / str(number)} holds other weights than {workdir}/"
            f"results.jsonl records of {words} (another sha256); restore it from a copy, or repeat "
            "the training command, which tests these"
        )
    if image_size is not None:
        weights = at_size(config, weights, image_size)
    return words, weights


def at_size(config: Config, weights: Weights, image_size: int) -> Weights:
    """Resize positions in a run's weights to images of that size, in pixels."""
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
