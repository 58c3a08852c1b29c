"""A run that other runs start from: `init.weights=run:CONFIG`, next to its workdir.

`run:convstem_pretraining:vit_s_cvst` is that config's run, in the folder that training names by
default, `convstem_pretraining-vit_s_cvst`. All runs in a parent folder share it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.config import Config, completed, phases, plain
from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.files import buckets, jsonl
from jaxrobust.weights.store import weights_folder
from jaxrobust.weights.store.steps import steps
from jaxrobust.weights.trained import runs

PREFIX = "run:"
FINISHED, BEGUN, ABSENT = "finished", "begun", "absent"
# What a start inherits from the config that names it: keys that do not affect training and, if both
# have the same classes, the images, whose place may differ from the recipe's.
_OF_MACHINE = {
    "data": ("dir", "workers", "strict", "max_damaged"),
    "mesh": ("fsdp",),
    "log": ("every_steps", "to"),
    "trouble": ("skips", "rollbacks", "lr"),
}
_OF_IMAGES = ("name", "train_split", "selection_split", "test_split", "classes")
_FREE_OPTIONS = ("bn_group",)  # of a network: checkpoints record how images were grouped


class StartRun(NamedTuple):
    """A run that another run starts from."""

    named: str  # its config, FILE[:ARGUMENTS]
    folder: Path
    config: Config

    @property
    def words(self) -> str:
        """Name the run like the config that starts from it."""
        return f"init.weights={PREFIX}{self.named}"


def named(weights: str | None) -> str | None:
    """Return the config whose run `init.weights` names; None if it names none by config.

    >>> named("run:larger_radius:vit_s_cvst"), named("runs/larger_radius-vit_s_cvst")
    ('larger_radius:vit_s_cvst', None)
    """
    text = str(weights or "")
    return text.removeprefix(PREFIX) if text.startswith(PREFIX) else None


def folder(start: str, workdir: Path) -> Path:
    """Return the folder of a start, next to the workdir of the run that starts from it."""
    return buckets.fetched(workdir.parent / arguments.run_name(start))


def chain(config: Config, workdir: Path) -> list[StartRun]:
    """List the runs that a run starts from, directly and indirectly, the nearest first.

    Raises:
      ValueError: no such config, or a run that would start from itself.
    """
    runs_before: list[StartRun] = []
    folders = {workdir.absolute()}
    while wanted := named(config.init.weights):
        here = StartRun(wanted, folder(wanted, workdir), config)
        if here.folder.absolute() in folders:
            raise ValueError(
                f"{here.words} is the run in {here.folder} itself; choose another --workdir, or "
                "other weights"
            )
        folders.add(here.folder.absolute())
        try:
            loaded = arguments.load_config(wanted)
        except ValueError as error:
            raise ValueError(f"{here.words}: {error}") from error
        for section, keys in _OF_MACHINE.items():
            loaded[section].update({key: config[section][key] for key in keys})
        if all(config.model[key] == loaded.model[key] for key in ("num_classes", "in_channels")):
            loaded.data.update({key: config.data[key] for key in _OF_IMAGES})
        config = loaded.lock()
        runs_before.append(here._replace(config=config))
    return runs_before


def state(run: StartRun) -> str:
    """Return the state of a start: absent, begun or finished.

    Raises:
      ValueError: its folder holds another run.
    """
    if not (run.folder / "config.json").is_file():
        return ABSENT
    if differing := differences(run.folder, run.config):
        raise ValueError(
            f"{run.words}: the run in {run.folder} has a different config: "
            f"{'; '.join(differing)}. "
            f"To start from it anyway, set init.weights={run.folder}; otherwise, move it away"
        )
    return FINISHED if is_finished(run.folder, run.config) else BEGUN


def is_finished(folder: Path, config: Config) -> bool:
    """Return whether a run has tested its last phase and still has its weights."""
    last = phases(config)[-1]
    tested = (str(row.get("weights")) for row in jsonl.read(folder / "results.jsonl"))
    there = bool(steps(folder / last / "best"))
    return there and any(words.startswith(f"{last},") for words in tested)


def differences(folder: Path, config: Config) -> list[str]:
    """List how network, start and epochs of a folder's run differ from a config."""
    old_config, new_config = _identity(runs.whole_config(folder)), _identity(plain(config))
    start = new_config["init.weights"]
    if start and _imported(old_config["init.weights"]) == start:
        old_config["init.weights"] = start
    return [
        f"{key} is {old_config.get(key)!r} there, {new_config.get(key)!r} in the config"
        for key in sorted(old_config.keys() | new_config.keys())
        if old_config.get(key) != new_config.get(key)
    ]


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    config = completed(config)
    options = config["model"]["options"]
    model = {key: value for key, value in config["model"].items() if key != "options"}
    model |= {f"options.{key}": v for key, v in options.items() if key not in _FREE_OPTIONS}
    keys: dict[str, Any] = {f"model.{key}": value for key, value in model.items()}
    keys |= {f"init.{key}": value for key, value in config["init"].items()}
    for name in config["phases"]:
        if config[name]["epochs"]:  # the others do not run
            keys |= {f"{name}.{key}": config[name][key] for key in ("objective", "epochs")}
    return json.loads(json.dumps(keys))


def _imported(weights: str | None) -> str | None:
    """Return the source of an imported folder, as used on machines without a network."""
    if not weights or not Path(weights).is_dir():
        return None
    about = weights_folder.about(Path(weights))
    return None if about is None else imported_from(about)


def imported_from(about: dict[str, Any]) -> str | None:
    """Return the source of an imported folder, if nothing in it was newly initialized."""
    if about.get("drawn"):
        return None
    return about.get("published_id") or str(about.get("source")).removeprefix("hf://timm/")
