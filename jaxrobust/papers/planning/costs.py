"""The cost of a plan's runs on some devices, as by `jaxrobust estimate`, cached in a file."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust import __version__
from jaxrobust.config import phases, plain
from jaxrobust.doctor.estimate import account
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.papers.planning.runs import PaperRun
from jaxrobust.runtime.files import jsonl

# Keys that do not change the cost: runs that only differ in these are estimated once.
_SECTIONS = ("seed", "init", "label_smoothing", "mixup", "erase", "log", "trouble")
_KEYS = (
    *("lr", "final_lr", "warmup_lr", "warmup_epochs", "weight_decay", "b2", "ema_decay"),
    *("from_random", "trades_beta", "mart_beta", "dkl_alpha", "dkl_beta", "hat_beta", "hat_gamma"),
    *("l1", "head", "stem", "normalize"),
)


class RunCost(NamedTuple):
    """Hours on all devices together."""

    training: float
    evaluations: float  # AutoAttack under each threat of its rows; other attacks are ignored
    refused: str = ""  # why training cannot run on these devices; no cost then

    @property
    def hours(self) -> float:
        """Return the total."""
        return self.training + self.evaluations


def of_runs(
    planned: list[PaperRun], target: Target, *, utilisation: float, file: Path
) -> Iterator[tuple[PaperRun, RunCost]]:
    """Estimate each run, reading known estimates from the file and adding new ones."""
    stored = {row["key"]: row for row in jsonl.read(file)}
    for planned_run in planned:
        config = planned_run.run.load()
        key = _key(config, target, utilisation)
        if key not in stored:
            stored[key] = {"key": key, **_estimated(config, target, utilisation)}
            file.parent.mkdir(parents=True, exist_ok=True)
            jsonl.append(file, stored[key])
        if refused := stored[key].get("refused"):
            yield planned_run, RunCost(0.0, 0.0, refused)
            continue
        threats = sum(
            flags.count("--threat") for flags in planned_run.flags if "--attack" not in flags
        )
        threats += 3 * sum("--worst_case" in flags for flags in planned_run.flags)
        yield planned_run, RunCost(stored[key]["training"], threats * stored[key]["autoattack"])


def _key(config: Any, target: Target, utilisation: float) -> str:
    values = plain(config)
    for name in _SECTIONS:
        values.pop(name, None)
    for name in config.phases:
        phase_values = values.pop(name)
        if name in phases(config):
            values[name] = {k: v for k, v in phase_values.items() if k not in _KEYS}
    about = [__version__, target.name, utilisation, values]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _estimated(config: Any, target: Target, utilisation: float) -> dict[str, Any]:
    try:
        training, autoattack = account.hours(config, target, utilisation=utilisation)
    except ValueError as error:  # with training's own sentence, such as about the batch
        return {"refused": str(error)}
    return {"training": training, "autoattack": autoattack}
