"""Weights kept during a run (`checkpoint.keep_every_epochs`), and the selected ones."""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrobust.config import network_of
from jaxrobust.types import Params, Weights
from jaxrobust.weights.store import hashes
from jaxrobust.weights.store.steps import steps
from jaxrobust.weights.trained import runs

FOLDER = "kept"  # in a phase
SELECTION = "selection.json"  # in a run
SCHEMA = 1  # of that file
WHICH = ("raw", "ema")
_TOOL = "jaxrobust select"


class Kept(NamedTuple):
    """Raw and averaged weights at a moment of training."""

    params: Params
    stats: Params
    ema_params: Params
    ema_stats: Params

    def of(self, kind: str) -> Weights:
        """Choose the "raw" or the "ema" weights."""
        raw = Weights(self.params, self.stats)
        return raw if kind == "raw" else Weights(self.ema_params, self.ema_stats)


class ChosenWeights(NamedTuple):
    """The weights that `jaxrobust select` selected."""

    phase: str
    step: int
    epoch: float  # since the start of the phase
    weights: str  # raw or ema
    image_size: int  # pixels
    weights_sha256: str

    @property
    def words(self) -> str:
        """Name these weights as in a record: "train, epoch 30, raw"."""
        return f"{self.phase}, epoch {self.epoch:g}, {self.weights}"


def steps_of(workdir: Path, phase: str) -> list[int]:
    """List the steps of a phase with kept weights, in order."""
    return steps(workdir / phase / FOLDER)


def keep(workdir: Path, phase: str, step: int, both: Kept, *, steps_per_epoch: int) -> None:
    """Store both weights after `step`, unless already stored. All hosts must call this."""
    from jaxrobust.weights.store.checkpoint import Checkpoints  # Orbax

    with contextlib.closing(Checkpoints(workdir / phase / FOLDER, keep_all=True)) as files:
        files.save(step, both, {"steps_per_epoch": steps_per_epoch})
        files.wait()


def read(workdir: Path, phase: str, step: int) -> tuple[float, Kept]:
    """Read both weights after a step, and the epoch that ended there; `ValueError` if not kept."""
    from jaxrobust.weights.store import checkpoint

    if step not in steps_of(workdir, phase):
        raise ValueError(f"{workdir / phase / FOLDER} has no step {step} (any more)")
    shapes = jax.eval_shape(network_of(runs.run_config(workdir, phase)).init, jax.random.key(0))
    _, both, meta = checkpoint.read(workdir / phase / FOLDER, Kept(*shapes, *shapes), step)
    return step / meta["steps_per_epoch"], both


def at_size(workdir: Path, phase: str, weights: Weights, image_size: int) -> Weights:
    """Resize the positions in a run's weights to images of this size, in pixels."""
    return runs.at_size(runs.run_config(workdir, phase), weights, image_size)


def selected(workdir: Path) -> ChosenWeights:
    """Read which of a run's weights were selected on its selection split."""
    runs.run_config(workdir)  # rejects anything but a run
    path = workdir / SELECTION
    if not path.is_file():
        raise ValueError(
            f"--selected: no weights are selected in {workdir} yet; run {_TOOL} {workdir}"
        )
    chosen = read_selection(path)["chosen"]
    if chosen is None:
        raise ValueError(
            f"--selected: {path} is not finished; to continue it, run {_TOOL} {workdir}"
        )
    try:
        return ChosenWeights(**{key: chosen[key] for key in ChosenWeights._fields})
    except (KeyError, TypeError) as error:
        raise ValueError(_damaged(path, error)) from error


def chosen_on(workdir: Path) -> dict[str, Any]:
    """Return data set, split and attack of the selection, None for what its file lacks."""
    selection = read_selection(workdir / SELECTION)
    attack = selection.get("attack")
    of = {key: selection.get(key) for key in ("dataset", "split")}
    return of | {"attack": attack.get("name") if isinstance(attack, dict) else None}


def read_selection(path: Path) -> dict[str, Any]:
    """Read the file of `jaxrobust select`."""
    try:
        selection = json.loads(path.read_text())
        schema, _, _ = selection["schema"], selection["chosen"], selection["candidates"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(path, error)) from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema}, but this code reads {SCHEMA}; use the version of "
            "jaxrobust that wrote it, or move the file away and select again"
        )
    return selection


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged ({error!r}); remove it and select again: {_TOOL} {path.parent}"


def selected_weights(
    workdir: Path, chosen: ChosenWeights, *, image_size: int | None = None
) -> tuple[str, Weights]:
    """Read the selected weights, with their name as in a record."""
    _, both = read(workdir, chosen.phase, chosen.step)
    weights = at_size(workdir, chosen.phase, both.of(chosen.weights), chosen.image_size)
    if hashes.weights_sha256(*weights) != chosen.weights_sha256:
        raise ValueError(
            f"the weights of {chosen.words} are not the selected ones (the sha256 differs); "
            f"remove {workdir / SELECTION} and select again: {_TOOL} {workdir}"
        )
    if image_size not in (None, chosen.image_size):
        weights = at_size(workdir, chosen.phase, both.of(chosen.weights), image_size)
    return chosen.words, weights
