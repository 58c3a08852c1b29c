"""What the workdir of a run holds for others: its config, its classes, its best weights."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.config import PHASES, VERSION, Network, Values, base, network_of
from jaxrobust.data import sources
from jaxrobust.runtime import jsonl, sharding
from jaxrobust.types import Weights
from jaxrobust.weights import convert
from jaxrobust.weights.checkpoint import Checkpoints, abstract_state, steps

FUNCTION = "function.json"  # of a run: what `models.origin` said of the network when it began
CLASSES = "classes.txt"  # of a run: the classes' names, one a line in the order of labels


def run_config(workdir: Path) -> Values:
    """Return the config of a run, from its workdir."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--workdir {workdir}: no run is there, config.json is missing; give the --workdir of "
            "a training, or --model NAME --weights PATH"
        )
    try:
        config = json.loads(path.read_text(), object_hook=Values)
        missing = {"model", "data", "attack", "evaluation", "test"} - config.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); give another --workdir") from error
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}: it is not a run's config")
    return of_this_version(config, path)


def of_this_version(config: dict[str, Any], path: Path) -> Any:
    """Return the config of a run without the version of its keys.

    A key that came after the run began has its default, which changes nothing.

    Raises:
      ValueError: it is another version than this code's.
    """
    if (found := config.get("version")) != VERSION:
        raise ValueError(
            f"{path} has version {found} of the config's keys, and this code has {VERSION}: use "
            "the version of jaxrobust that began the run, or give a new --workdir"
        )
    later = json.loads(base().to_json(), object_hook=type(config))
    return _filled({key: value for key, value in config.items() if key != "version"}, later)


def _filled(config: dict[str, Any], defaults: Any) -> Any:
    """Return a config of the type of `defaults`, with those of its keys that are missing."""
    nested = {
        key: _filled(value, defaults[key])
        for key, value in config.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
    }
    return type(defaults)({**defaults, **config, **nested})


def rewritten(workdir: Path, function: dict[str, Any] | None) -> str:
    """Return a sentence where the file of a user's function, which makes a run's network, is not
    the one that the run began with; else nothing.
    """
    path = workdir / FUNCTION
    if function is None or not path.exists():
        return ""
    noted = json.loads(path.read_text())["sha256"]
    if noted == function["sha256"]:
        return ""
    return (
        f"WARNING: {function['file']} has changed since the run in {workdir} began (sha256 "
        f"{str(noted)[:12]} then, {str(function['sha256'])[:12]} now), and its weights are now in "
        "the network that this file makes"
    )


def check_classes(workdir: Path, source: sources.Source, *, renamed: bool = False) -> None:
    """Raise `ValueError` if a run there has other classes: labels would mean something else.

    With `renamed`, lists without a common name tell nothing: another data set may name the same
    classes its way.
    """
    path = workdir / CLASSES
    known = path.read_text().splitlines() if path.exists() else []
    names = list(source.classes)
    if known == names or not (known and names) or (renamed and set(known).isdisjoint(names)):
        return
    missing, new = sorted(set(known) - set(names)), sorted(set(names) - set(known))
    choose = f"choose them with --classes {path}" if renamed else "give a new --workdir"
    raise ValueError(
        f"{source.where()} has other classes than {path}: {len(missing)} of its names are missing "
        f"{missing[:3]}, {len(new)} are new {new[:3]}, and labels would shift. Restore the data "
        f"set, or {choose}"
    )


def records_of(workdir: Path, weights_sha256: str) -> list[dict[str, Any]]:
    """Return the records of some weights that a run holds, of its own tests and its evaluations."""
    files = (workdir / "results.jsonl", workdir / "evaluation" / "results.jsonl")
    rows = [row for file in files for row in jsonl.read(file)]
    return [row for row in rows if row.get("weights_sha256") == weights_sha256]


def run_weights(
    workdir: Path, phase: str | None = None, *, image_size: int | None = None
) -> tuple[str, Weights]:
    """Return the best weights of a phase (default: the last one that has them), and their name.

    Positions are resized, as conversion does, to another `image_size` than that of the run.
    Raises:
      ValueError: there is no such phase, or none of its weights.
    """
    if phase not in (None, *PHASES):
        raise ValueError(f"--phase={phase} is unknown; one of {', '.join(PHASES)}")
    phases = [phase] if phase else list(reversed(PHASES))
    done = [p for p in phases if steps(workdir / p / "best")]
    if not done:
        raise ValueError(
            f"{workdir} has no best checkpoint of {' or '.join(phases)}; train until it has one "
            "(the training command continues)"
        )
    config = run_config(workdir)
    shapes = Weights(*jax.eval_shape(network_of(config).init, jax.random.key(0)))
    everywhere = sharding.replicated(sharding.make_mesh())
    with contextlib.closing(Checkpoints(workdir / done[0] / "best", read_only=True)) as best:
        number = best.latest_step()
        assert number is not None
        weights = best.restore(number, abstract_state(shapes, everywhere))
    if image_size not in (None, config.model.image_size):
        network = replace(Network.of_config(config), image_size=image_size)
        weights = Weights(*jax.device_put(_resized(network, weights), everywhere))
    return f"{done[0]}, step {number}, {config.evaluation.weights}", weights


def _resized(network: Network, weights: Weights) -> list[dict[str, np.ndarray]]:
    """Return params and stats of the same network at another image size, as those of `network`."""
    arrays = jax.device_get(weights.params | weights.stats)
    wanted = Weights(*jax.eval_shape(network.create(dtype="float32").init, jax.random.key(0)))
    shapes = {name: array.shape for name, array in (wanted.params | wanted.stats).items()}
    try:
        filled = convert.rename(convert.names(network.name, arrays).rows, arrays, shapes)
    except ValueError as error:
        raise ValueError(f"--image_size={network.image_size}: {error}") from error
    return [{name: filled[name] for name in part} for part in wanted]
