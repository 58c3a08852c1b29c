"""Whether stages can work after a training, asked before it begins."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrobust import models
from jaxrobust.config import Config, NetworkSpec, of_phase, phases
from jaxrobust.data.splits import grammar, spread
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.questions import questions
from jaxrobust.evaluation.questions.questions import AUTOATTACK, Question
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.publish import layouts, robustbench_entry
from jaxrobust.publish.references import Network
from jaxrobust.results.stages.stage import ATTACK, CLEAN, EXPORT, SELECT, Stage
from jaxrobust.runtime import pytorch
from jaxrobust.training.run import splits
from jaxrobust.types import Threat, threats

_MOMENTS = 10  # that a choice has at least, where the config does not say which are kept


def prepared(config: Any, stages: Sequence[Stage]) -> list[str]:
    """Make a run keep the weights that a choice is among, where its config keeps none; say it."""
    if config.checkpoint.keep_every_epochs or all(stage.kind != SELECT for stage in stages):
        return []
    every = max(config[phases(config)[-1]].epochs // _MOMENTS, 1)
    config.checkpoint.keep_every_epochs = every
    return [
        f"--then=select chooses among weights that are kept on the way: checkpoint."
        f"keep_every_epochs becomes {every}"
    ]


def check(config: Config, stages: Sequence[Stage], workdir: Path) -> None:
    """Refuse stages that would fail after the training, with what to do instead."""
    seen = of_phase(config, phases(config)[-1])
    for stage in stages:
        try:
            {SELECT: _select, ATTACK: _attack, EXPORT: _export}[stage.kind](seen, stage, workdir)
        except ValueError as error:
            reason = str(error).removeprefix(f"--then={stage.text}: ")
            raise ValueError(f"--then={stage.text}: {reason}") from error
        if stage.id:
            before = [each for each in stages[: stages.index(stage)] if each.attack == AUTOATTACK]
            _entry(seen, stage, before)


def _select(seen: Config, stage: Stage, workdir: Path) -> None:
    del stage, workdir
    data = seen.data
    if not data.selection_split:
        raise ValueError(
            "the config has no selection split to choose on; set data.selection_split to images "
            "that are neither trained nor tested on, such as train[98%:]"
        )
    if grammar.overlap(data.selection_split, data.test_split, data.name):
        same = "is" if data.selection_split == data.test_split else "holds images, or may, of"
        raise ValueError(
            f"the selection split {data.selection_split} {same} the test split {data.test_split}, "
            "which a choice must not look at; set data.selection_split to other images, such as "
            "train[98%:] with data.train_split=train[:98%]"
        )


def _subject(seen: Config) -> Subject:
    data, attack = seen.data, seen.attack
    return Subject(
        network=NetworkSpec.of_config(seen),
        dataset=data.name,
        split=data.test_split,
        threat=Threat.only(attack),
        norm=threats(attack)[0].norm,
        tested=data.preprocessing,
    )


def _attack(seen: Config, stage: Stage, workdir: Path) -> None:
    del workdir
    source, subject = splits.opened(seen, "test_split"), _subject(seen)
    question = Question(stage.attack, preprocessing=seen.data.preprocessing)
    for ball in stage.balls or threats(seen.attack):
        if stage.attack != CLEAN and not ball.epsilon:
            raise ValueError("a radius of 0 is no attack; write clean")
        questions.check(question, subject.within(ball), source)


def _export(seen: Config, stage: Stage, workdir: Path) -> None:
    model = seen.model
    if not pytorch.is_name(model.name):
        models.known(model.name)  # of a user's function nobody knows the PyTorch side
    layouts.known(stage.layout, place(workdir, stage))
    sizes = (model.num_classes, model.image_size, dict(model.options))
    layouts.check(Network(model.name, {}, {}, *sizes), stage.layout)
    if stage.layout not in ("jaxrobust", "timm") and not importlib.util.find_spec("torch"):
        raise ValueError(layouts.NEEDS_TORCH)
    if stage.id:
        robustbench_entry.check_id(stage.id)
        if stage.layout == "jaxrobust":
            raise ValueError("RobustBench reads PyTorch's files; choose export:module")


def place(workdir: Path, stage: Stage) -> Path:
    """Name the folder that an export writes."""
    return workdir / "export" / stage.layout


def images(config: Config) -> int:
    """Count the images of the test split that the stages evaluate; 0: all."""
    return config.test.images


def _entry(seen: Config, stage: Stage, before: Sequence[Stage]) -> None:
    """Refuse an entry of RobustBench for which no attack before it has its radius and images."""
    source = splits.opened(seen, "test_split")
    how = pipeline.preprocessing_id(source, seen.model.image_size, seen.data.preprocessing)
    count = min(images(seen) or len(source), len(source))
    own = threats(seen.attack)
    lacking: list[list[str]] = []
    for ball in [each for one in before for each in (one.balls or own)]:
        record = AccuracyRecord(
            dataset=seen.data.name,
            split=seen.data.test_split,
            ids_sha256=source.ids_sha256 or None,
            image_ids=records.ranges(spread.places(source, count).tolist()),
            preprocessing=how,
            dtype="float32",
            method=f"{AUTOATTACK} standard",
            attacks=[{"name": AUTOATTACK, **ball.settings()}],  # type: ignore[typeddict-item]
        )
        lacking.append(robustbench_entry.lacks(record))
    least = min(lacking, key=len)
    if least:
        raise ValueError(
            f"--then={stage.text}: no record before it would be one that RobustBench takes: "
            f"{'; '.join(least)}. Leave {stage.id} out, or evaluate what it takes"
        )


def epochs_kept(config: Config) -> int:
    """Count the moments whose weights the last phase keeps."""
    every = config.checkpoint.keep_every_epochs
    return math.ceil(config[phases(config)[-1]].epochs / every) if every else 0
