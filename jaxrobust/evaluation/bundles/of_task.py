"""Bundles of tasks: the points are stored, and the task's score judges them again.

A bundle of a task has no targets and no program: who checks it brings targets and task. A score
within rounding of its threshold may be judged otherwise on another device.
"""

from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np

from jaxrobust.evaluation.bundles import bundle, claims, findings
from jaxrobust.evaluation.engine.result import AutoAttackResult, CallerFacts
from jaxrobust.evaluation.network.images import InRange
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.tasks.task import Task, TaskNetwork

_BATCH = 64  # images


def write(
    folder: str | Path,
    result: AutoAttackResult,
    network: Any,
    images: Any,
    targets: Any,
    task: Task,
    **facts: Unpack[CallerFacts],
) -> None:
    """Write the bundle of a finished `autoattack(network, images, targets, task=task, ...)`.

    Its images need the ids 0 to N - 1. `facts` are those of `AutoAttackResult.record`. With several
    processes, all call this and the first one writes.
    """
    record, n, place = result.typed_record(**facts), len(images), Path(folder)
    if record.task != task.name:
        raise ValueError(f"result is for task {record.task}, not {task.name}; pass its task")
    if not np.array_equal(result.verdicts.image_ids, np.arange(n)):
        raise ValueError(
            f"result covers the images {record.image_ids}, but there are {n}; bundles need all of "
            "them, evaluated without image_ids or stop"
        )
    points: Any = result.images_adv
    evaluated = bundle.BundledEvaluation(
        record, result.verdicts, InRange(images), lambda at: points[np.array([at])][0]
    )

    def write() -> None:
        if jax.process_index() or bundle.check_place(place, str(record.evaluation), of_task=True):
            return
        bundle.write(evaluated, place, _judged(task, network, targets, images), _BATCH, n)

    hosts.together(write)


def check(
    folder: str | Path, network: Any, images: Any, targets: Any, task: Task
) -> findings.Findings:
    """Compare a task's bundle with a network on your images and targets.

    It holds if `.whole`: then at most `.standing` of its `.images` withstand the attacks. Else
    `.unconfirmed` lists images, "right" those that stand here. `ValueError`: another task's bundle.
    """
    opened = claims.read(Path(folder), of_task=True)
    if opened.record.get("task") != task.name:
        raise ValueError(f"{folder} is for task {opened.record.get('task')}, not {task.name}")
    return findings.judge(
        opened,
        lambda _, ids: InRange(images)[np.asarray(ids)],
        _judged(task, network, targets, images),
        count=len(images),
        labels=np.zeros(len(images), int),
        batch=_BATCH,
        tell=say,
    )


def _judged(task: Task, network: Any, targets: Any, images: Any) -> claims.Logits:
    of_task = TaskNetwork.of(task, network, targets, np.arange(len(images), dtype=np.uint32))
    return bundle.forward(of_task.judged(), images.shape[1:], _BATCH, operand="ids")
