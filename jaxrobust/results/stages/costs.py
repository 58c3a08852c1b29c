"""What a training and its stages will cost, said before they begin, by `jaxrobust estimate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrobust.attacks import fixed_steps
from jaxrobust.config import Config
from jaxrobust.doctor.estimate import account, account_lines, start_costs
from jaxrobust.doctor.estimate.command import UTILISATION
from jaxrobust.doctor.estimate.devices import Target, target
from jaxrobust.evaluation.questions.questions import AUTOATTACK
from jaxrobust.results.stages import checks
from jaxrobust.results.stages.stage import CLEAN, EXPORT, SELECT, Stage
from jaxrobust.runtime.devices import hardware
from jaxrobust.types import threats

_SECONDS = 0.5  # for which each step and each attack is measured
_STEPS = 10  # of the APGD that chooses
_UNKNOWN = "not estimated"


def devices() -> Target | None:
    """Describe the devices for an estimate; None: their speed is not known."""
    if jax.process_count() == 1:
        return target(jax.default_backend())
    kind = jax.devices()[0].device_kind
    chip = hardware.chip(kind)
    return chip and Target(kind, kind, jax.device_count(), chip, here=False, compiles=False)


def lines(config: Config, stages: Sequence[Stage], workdir: Path) -> list[str]:
    """Write what the training costs, and each stage after it."""
    on = devices()
    if on is None:
        kind = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        return [
            f"what it costs on {kind} is not known; jaxrobust estimate CONFIG --on v5e:8x8 says it "
            "of chips"
        ]
    searches = any(stage.attack == AUTOATTACK for stage in stages)
    how: dict[str, Any] = {"utilisation": UTILISATION, "seconds": _SECONDS}
    images = (checks.images(config) or None) if searches else 0
    result = account.account(config, on, images=images, **how)
    starts = start_costs.of_config(config, workdir, on, **how)
    rows = {row["run"]: row["training"]["seconds"] for row in starts if row["training"]}
    rows["training"] = result["training"]["seconds"]
    rows |= {stage.text: _seconds(stage, config, result) for stage in stages}
    return [*_told(rows, on, result.get("autoattack"))]


def _told(
    rows: dict[str, float | None], on: Target, autoattack: dict[str, Any] | None
) -> list[str]:
    known = [f"{name} {_words(seconds)}" for name, seconds in rows.items()]
    total = sum(seconds for seconds in rows.values() if seconds)
    how = "measured here for a moment" if on.here else f"at {UTILISATION:.0%} of the peak"
    told = [f"what it costs ({how}): {'; '.join(known)}; in all {_words(total)}"]
    if autoattack:
        most = autoattack["at_most"]["seconds"] / max(autoattack["expected"]["seconds"], 1e-9)
        told.append(
            f"AutoAttack's time is that with {autoattack['robust']:.0%} of the images robust in "
            f"each threat; with all robust it takes {most:.2g} times as long"
        )
    return told


def _words(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else account_lines.duration(seconds)


def _seconds(stage: Stage, config: Config, result: dict[str, Any]) -> float | None:
    """Estimate a stage from the figures of an account; None: nothing is known of it."""
    if stage.kind == EXPORT:
        return None
    last = result["phases"][-1]
    trained = len(threats(config.attack))  # whose test is of all of them
    count = len(stage.threats) or trained
    if stage.kind == SELECT:
        times = -(-last["epochs"] // config.evaluation.every_epochs)
        once = last["parts_s"]["selection"] / times
        share = _passes(_STEPS) / _passes(config.evaluation.steps)
        return 2 * checks.epochs_kept(config) * once * share  # raw and averaged weights
    if stage.attack == AUTOATTACK:
        return count * result["autoattack"]["expected"]["seconds"]
    fixed, once = fixed_steps.parse(stage.attack), last["parts_s"]["test"] / trained
    if fixed:
        return count * once * _passes(fixed.steps) / _passes(config.test.steps)
    return once / _passes(config.test.steps) if stage.attack == CLEAN else None


def _passes(steps: int) -> int:
    """Count the passes of APGD and of the verdicts before and after it; a backward one is two."""
    return 3 * steps + 2
