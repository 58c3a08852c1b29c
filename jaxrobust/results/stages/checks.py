"""Checks, before a training, that its stages can work, and an estimate of the total cost."""

import functools
import importlib.util
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust import models
from jaxrobust.attacks import fixed_steps
from jaxrobust.config import Config, NetworkSpec, of_phase, phases
from jaxrobust.data.splits import grammar, spread
from jaxrobust.data.stream import pipeline
from jaxrobust.doctor.estimate import account, account_lines
from jaxrobust.doctor.estimate.command import UTILISATION
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.evaluation.questions import questions
from jaxrobust.evaluation.questions.questions import AUTOATTACK, GivenFlags
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.publish import layouts, robustbench_entry
from jaxrobust.publish.references import Network
from jaxrobust.results.stages.stage import ATTACK, CLEAN, EXPORT, SELECT, Stage
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.devices import hardware
from jaxrobust.training.run import splits
from jaxrobust.types import Threat, threats

_MOMENTS = 10  # minimum number of kept weights for a choice, if the config keeps none
_STEPS = 10  # of APGD for the choice


def prepared(config: Any, stages: Sequence[Stage]) -> list[str]:
    """Make a run keep weights to choose from, if its config keeps none; return a message."""
    if config.checkpoint.keep_every_epochs or all(stage.kind != SELECT for stage in stages):
        return []
    every = max(config[phases(config)[-1]].epochs // _MOMENTS, 1)
    config.checkpoint.keep_every_epochs = every
    return [
        "--then=select needs weights saved during training, so checkpoint.keep_every_epochs "
        f"becomes {every}"
    ]


def check(config: Config, stages: Sequence[Stage], workdir: Path) -> None:
    """Raise if a stage would fail after the training; the error says what to do instead."""
    last = of_phase(config, phases(config)[-1])
    for number, stage in enumerate(stages):
        try:
            if stage.kind == SELECT:
                _check_selection(last)
            elif stage.kind == ATTACK:
                _check_attack(last, stage)
            else:
                _check_export(last, stage, workdir)
        except ValueError as error:
            reason = str(error).removeprefix(f"--then={stage.text}: ")
            raise ValueError(f"--then={stage.text}: {reason}") from error
        if stage.id:
            _check_entry(last, stage, [s for s in stages[:number] if s.attack == AUTOATTACK])


def _check_selection(config: Config) -> None:
    data = config.data
    if not data.selection_split:
        raise ValueError(
            "the config has no selection split to choose on; set data.selection_split to images "
            "used for neither training nor test, such as train[98%:]"
        )
    if grammar.overlap(data.selection_split, data.test_split, data.name):
        same = "is" if data.selection_split == data.test_split else "may overlap with"
        raise ValueError(
            f"the selection split {data.selection_split} {same} the test split {data.test_split}, "
            "which must not be used to choose weights; set data.selection_split to other images, "
            "such as train[98%:] with data.train_split=train[:98%]"
        )


def _check_attack(config: Config, stage: Stage) -> None:
    data, attack = config.data, config.attack
    source = splits.opened(config, "test_split")
    subject = Subject(
        network=NetworkSpec.of_config(config),
        dataset=data.name,
        split=data.test_split,
        threat=Threat.only(attack),
        norm=threats(attack)[0].norm,
        tested=data.preprocessing,
    )
    question = GivenFlags(attack=stage.attack, preprocessing=data.preprocessing)
    for ball in stage.balls or threats(attack):
        if stage.attack != CLEAN and not ball.epsilon:
            raise ValueError("a radius of 0 is not an attack; write clean")
        questions.check(question, subject.within(ball), source)


def _check_export(config: Config, stage: Stage, workdir: Path) -> None:
    model = config.model
    if not pytorch.is_name(model.name):
        models.known(model.name)  # a user's function has no PyTorch counterpart
    layouts.known(stage.layout, place(workdir, stage))
    sizes = (model.num_classes, model.image_size, dict(model.options))
    layouts.check(Network(model.name, {}, {}, *sizes), stage.layout)
    if stage.layout not in ("jaxrobust", "timm") and not importlib.util.find_spec("torch"):
        raise ValueError(layouts.NEEDS_TORCH)
    if stage.id:
        robustbench_entry.check_id(stage.id)
        if stage.layout == "jaxrobust":
            raise ValueError("RobustBench needs PyTorch files; choose export:module")


def place(workdir: Path, stage: Stage) -> Path:
    """Return the folder of an export."""
    return workdir / "export" / stage.layout


def images(config: Config) -> int:
    """Return the number of test images that the stages evaluate; 0 means all."""
    return config.test.images


def _check_entry(config: Config, stage: Stage, attacks: Sequence[Stage]) -> None:
    """Raise if no attack before a RobustBench entry has the radius and images it needs."""
    source = splits.opened(config, "test_split")
    data, size = config.data, config.model.image_size
    count = min(images(config) or len(source), len(source))
    lacking: list[list[str]] = []
    for ball in [ball for attack in attacks for ball in attack.balls or threats(config.attack)]:
        record = AccuracyRecord(
            dataset=data.name,
            split=data.test_split,
            ids_sha256=source.ids_sha256 or None,
            image_ids=records.ranges(spread.places(source, count).tolist()),
            preprocessing=pipeline.preprocessing_id(source, size, data.preprocessing),
            dtype="float32",
            method=f"{AUTOATTACK} standard",
            attacks=[{"name": AUTOATTACK, **ball.settings()}],  # type: ignore[typeddict-item]
        )
        lacking.append(robustbench_entry.lacks(record))
    if least := min(lacking, key=len):
        raise ValueError(
            f"--then={stage.text}: RobustBench would accept none of the preceding records: "
            f"{'; '.join(least)}. Leave {stage.id} out, or evaluate as it requires"
        )


def epochs_kept(config: Config) -> int:
    """Count how many times the last phase keeps weights."""
    every = config.checkpoint.keep_every_epochs
    return math.ceil(config[phases(config)[-1]].epochs / every) if every else 0


def devices() -> Target | None:
    """Describe the devices by their peak speeds, without compiling; None if unknown."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    on_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
    chip = _cores(count) if on_cpu else hardware.chip(kind)
    return chip and Target(kind, kind, count, chip, here=False, compiles=False)


@functools.cache
def _cores(devices: int) -> hardware.Chip:
    """Measure the peak speed of a device of this machine's CPU by a quick matrix product."""
    side, times = 1024, []
    product, matrix = jax.jit(jnp.matmul), jnp.ones((side, side))
    for _ in range(4):  # the first compiles
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - start)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return hardware.Chip(2 * side**3 / min(times) / devices, memory, math.nan, math.nan)


def lines(config: Config, stages: Sequence[Stage], workdir: Path) -> list[str]:
    """Format the estimated cost of the training and of each stage after it."""
    on = devices()
    if on is None:
        kind = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        return [
            f"cannot estimate the cost on {kind}, whose speed is unknown; jaxrobust estimate "
            "CONFIG --on v5e:8x8 estimates it for other devices"
        ]
    searches = any(stage.attack == AUTOATTACK for stage in stages)
    settings: dict[str, Any] = {"utilisation": UTILISATION}
    count = (images(config) or None) if searches else 0
    result = account.account(config, on, images=count, **settings)
    starts = account.start_costs(config, workdir, on, **settings)
    rows = {row["run"]: row["training"]["seconds"] for row in starts if row["training"]}
    rows["training"] = result["training"]["seconds"]
    rows |= {stage.text: _seconds(stage, config, result) for stage in stages}
    parts = [
        f"{name} {'not estimated' if seconds is None else account_lines.duration(seconds)}"
        for name, seconds in rows.items()
    ]
    if len(rows) > 1:
        total = sum(seconds for seconds in rows.values() if seconds)
        parts.append(f"total {account_lines.duration(total)}")
    assumed = f"at {UTILISATION:.0%} of the peak, without compilation"
    sentences = [f"estimated cost ({assumed}): {'; '.join(parts)}"]
    if autoattack := result.get("autoattack"):
        most = autoattack["at_most"]["seconds"] / max(autoattack["expected"]["seconds"], 1e-9)
        sentences.append(
            f"AutoAttack's time assumes that {autoattack['robust']:.0%} of the images are robust "
            f"to each threat; if all are, it takes {most:.2g} times as long"
        )
    return sentences


def _seconds(stage: Stage, config: Config, result: dict[str, Any]) -> float | None:
    """Estimate the time of a stage from an account; None if unknown."""
    if stage.kind == EXPORT:
        return None
    last = result["phases"][-1]
    trained = len(threats(config.attack))  # the test covers all of them
    count = len(stage.threats) or trained
    if stage.kind == SELECT:
        times = -(-last["epochs"] // config.evaluation.every_epochs)
        once = last["parts_s"]["selection"] / times
        share = _passes(_STEPS) / _passes(config.evaluation.steps)
        return 2 * epochs_kept(config) * once * share  # raw and averaged weights
    if stage.attack == AUTOATTACK:
        return count * result["autoattack"]["expected"]["seconds"]
    fixed, once = fixed_steps.parse(stage.attack), last["parts_s"]["test"] / trained
    if fixed:
        return count * once * _passes(fixed.steps) / _passes(config.test.steps)
    return once / _passes(config.test.steps) if stage.attack == CLEAN else None


def _passes(steps: int) -> int:
    """Count the passes of APGD and its two verdicts; a backward pass counts as two."""
    return 3 * steps + 2
