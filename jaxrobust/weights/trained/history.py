"""The origin of weights: the images and attacks that trained and selected them, run by run.

A history lists the runs that led to some weights, the oldest first; None stands for unknown
training. It is copied into `init.json` when a run starts and into the `config.json` of exported
weights, so it survives the loss of the folders before.
"""

import json
import math
from pathlib import Path
from typing import Any

from jaxrobust.attacks import mixes, registry
from jaxrobust.config import attributes, of_phase
from jaxrobust.runtime import pytorch
from jaxrobust.weights.trained import runs

History = list[dict[str, Any] | None]

START = "init.json"  # in a run's workdir: the weights it started from
_KEYS = {"phases": list, "passes": int | float, "trained_on": list, "selected_on": list}


def of_run(
    workdir: Path, phase: str, *, config: Any = None, chosen: dict[str, Any] | None = None
) -> History:
    """Read the history of the weights of a run's phase.

    `config`: the run's, as plain values, if its workdir may be on another host; `chosen`: the
    images on which the weights were selected.
    """
    config = runs.whole_config(workdir) if config is None else attributes(config)
    data = _read(workdir / "data.json") or {}
    facts = of_config(config, phase, data=data, chosen=chosen)
    return [*before(workdir, config), facts]


def before(workdir: Path, config: Any) -> History:
    """Read the history of the weights that a run started from; empty: they were random."""
    start = start_of(workdir)
    is_module = pytorch.is_name(config["model"]["name"])  # which may have loaded weights
    weights = config["init"]["weights"] if start is None else start.get("weights")
    if start is None or "training" not in start:
        return [None] if is_module or weights else []
    return checked(start["training"])


def start_of(workdir: Path) -> dict[str, Any] | None:
    """Read the record of the weights that a run started from; None: they were random."""
    return _read(workdir / START)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text())) if path.exists() else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error


def checked(history: Any) -> History:
    """Validate a history from a file; anything else counts as unknown training.

    >>> checked(None), checked([{"phases": []}])
    ([None], [None])
    """
    sound = lambda run: (  # noqa: E731
        isinstance(run, dict) and all(isinstance(run.get(k), kind) for k, kind in _KEYS.items())
    )
    if not isinstance(history, list):
        return [None]
    return [run if sound(run) else None for run in history]


def of_config(
    config: Any,
    phase: str,
    *,
    data: dict[str, Any] | None = None,
    chosen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """List the facts of a run up to a phase; `data`: what it recorded about its data sets.

    A pass covers one image: an attack of K steps costs K passes forward and backward besides the
    update's, and several norms at once cost correspondingly more, see `mixes.cost`; rounded up.
    """
    rows: list[dict[str, Any]] = []
    names, passes = list(config.phases), 0.0
    trained: list[dict[str, Any]] = []
    selected: list[dict[str, Any]] = []
    path = _path(config, phase)
    for name in names[: names.index(phase) + 1]:
        if config[name].epochs and name not in path:
            continue
        phase_config = of_phase(config, name)
        section, attack = phase_config[name], phase_config.attack
        clean = section.objective == "clean"
        steps = 0 if clean else registry.steps(attack.name, attack.steps)
        rows.append({"phase": name, "objective": section.objective, "epochs": section.epochs})
        rows[-1] |= {"attack": attack.name if steps else None, "attack_steps": steps}
        if steps:
            keys = ("norm", "epsilon", "mix", "relative_step", "step_size", "start", "start_std")
            rows[-1] |= {k: attack[k] for k in (*keys, "loss") if attack.get(k) is not None}
            if sha256 := (data or {}).get(f"{name}.attack.loss.sha256"):
                rows[-1] |= {"loss_sha256": sha256}
        passes += section.epochs * (1 + steps * (mixes.cost(attack) if steps else 1))
        if section.epochs or name == phase:
            chosen_under = {"attack": phase_config.evaluation.get("attack")}
            images = _images(phase_config.data, "name", "selection_split", name, data or {})
            selected.append(images | chosen_under)
        if section.epochs:
            trained += trained_on(phase_config, name, data)
    if chosen is not None:
        selected[-1] = dict(chosen)
    return {
        "phases": rows,
        "passes": math.ceil(passes),
        "trained_on": trained,
        "selected_on": selected,
    }


def trained_on(config: Any, phase: str, data: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """List the training images of a config, as a phase sees it."""
    images = [_images(config.data, "name", "train_split", phase, data or {})]
    if config.data.get("extra"):
        images.append(_images(config.data, "extra", "extra_split", phase, data or {}))
    return images


def _images(section: Any, name: str, split: str, phase: str, noted: dict[str, Any]) -> Any:
    """Name images, with the hash of their files from `data.json`, if any."""
    key = f"data.{'extra' if name == 'extra' else split}.files_sha256"
    sha256 = noted.get(f"{phase}.{key}", noted.get(key))
    return {"dataset": section[name], "split": section[split], "files_sha256": sha256}


def _path(config: Any, phase: str) -> list[str]:
    """List the phases that lead to a phase, following what each starts from."""
    names = list(config.phases)
    path = [phase]
    while earlier := [n for n in names[: names.index(path[0])] if config[n].epochs]:
        path.insert(0, config[path[0]].start or earlier[-1])
    return path
