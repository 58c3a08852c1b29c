"""A task: a goal with a name, and its network as the evaluator sees it.

To the evaluator every task is one of two classes: an image stands, or an attack has succeeded on
it. So slots, ledgers, records and replays need to know nothing of masks or embeddings.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import Goal, apgd_machine, square_machine
from jaxrobust.attacks.refused_network import as_function
from jaxrobust.attacks.registry import MachineFacts, NamedAttack, StandardSettings, add
from jaxrobust.types import Array

_PROBED = 64  # images
_STEP = 8 / 255


class Task(NamedTuple):
    """What an evaluation asks: `goal` needs a score, and says when an attack has succeeded."""

    name: str  # in records
    goal: Goal


class TaskNetwork(NamedTuple):
    """A task's network with the targets of N images."""

    task: Task
    network: jax.tree_util.Partial  # images -> outputs
    targets: Any  # arrays [N, ...]
    ids: np.ndarray  # u32[N]

    @classmethod
    def of(cls, task: Task, network: Any, targets: Any, ids: np.ndarray) -> "TaskNetwork":
        """Check a network and its targets; `ValueError` where they do not fit `ids`."""
        if not isinstance(task, Task):
            raise ValueError(
                f"task={task!r} is not a task; pass one such as jaxrobust.tasks.segmentation()"
            )
        if task.goal.score is None:
            raise ValueError(
                f"task {task.name!r} has no score, so no attack could succeed; give its Goal a "
                "score (outputs, targets) -> f[B]"
            )
        for path, leaf in jax.tree_util.tree_leaves_with_path(targets):
            if jnp.shape(leaf)[:1] != ids.shape:
                raise ValueError(
                    f"targets{jax.tree_util.keystr(path)} have shape {jnp.shape(leaf)} for "
                    f"{len(ids)} images; pass arrays whose first axis is the image"
                )
        if not isinstance(network, jax.tree_util.Partial):
            network = jax.tree_util.Partial(as_function(network))
        return cls(task, network, jax.tree.map(jnp.asarray, targets), ids)

    def judged(self) -> jax.tree_util.Partial:
        """Make a network (points, ids) -> f[B, 2]: 1 where the image stands, else -1; the loss."""
        goal, ids, targets = self.task.goal, self.ids, self.targets
        if not len(ids):  # a program needs a row to look up
            ids = np.zeros(1, np.uint32)
            targets = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), targets)
        order = np.argsort(ids)

        def judge(network: Any, targets: Any, ids: Array, points: Array, point_ids: Array) -> Array:
            places = jnp.minimum(jnp.searchsorted(ids, point_ids), len(ids) - 1)
            rows = jax.tree.map(lambda a: a[places], targets)
            loss, score = _values(goal, network, points, rows)
            stands = jnp.where(goal.done(score), -1.0, 1.0)
            return jnp.stack([jnp.where(jnp.isnan(score), jnp.nan, stands), loss], axis=1)

        targets = jax.tree.map(lambda a: a[order], targets)
        return jax.tree_util.Partial(judge, self.network, targets, jnp.asarray(ids[order]))

    def flags(self, images: Any) -> dict[str, str]:
        """Flag a loss that is not finite, or whose ascent helps the network, on up to 64 images."""
        goal, n = self.task.goal, min(len(images), _PROBED)

        def probe(network: Any, points: Array, rows: Any) -> tuple[Array, Array, Array]:
            ascent = jax.grad(lambda points: _values(goal, network, points, rows)[0].sum())(points)
            up, down = (
                _values(goal, network, jnp.clip(points + step * jnp.sign(ascent), 0, 1), rows)[1]
                for step in (_STEP, -_STEP)
            )
            return _values(goal, network, points, rows)[0], up, down

        rows = jax.tree.map(lambda a: a[:n], self.targets)
        points = jnp.asarray(np.asarray(images[np.arange(n)]), jnp.float32)
        loss, up, down = map(np.asarray, jax.jit(probe)(self.network, points, rows))
        broken, better, worse = ~np.isfinite(loss), (up > down).sum(), (up < down).sum()
        flags = {}
        if broken.any():
            flags["nan-loss"] = (
                f"the loss of {broken.sum()} of {n} clean images is NaN or infinite, and no attack "
                "can follow it; look for log, sqrt or a division at 0"
            )
        if better > 3 * worse + 4:
            flags["wrong-sign"] = (
                f"a step up the loss leaves a higher score than a step down it for {better} of {n} "
                f"images, and a lower one for {worse}: the attacks help the network; return minus "
                "the loss, which must be larger where the network is worse"
            )
        return flags


def _values(goal: Goal, network: Any, points: Array, rows: Any) -> tuple[Array, Array]:
    """Compute loss and score f[B]; `ValueError` unless there is one of each for each image."""
    outputs = network(points)
    return goal.value(outputs, rows, jnp.float32), goal.scored(outputs, rows)


# What `judged` returns, as an attack sees it.
_JUDGED = Goal(lambda judged, labels: judged[:, 1], lambda judged, labels: judged[:, 0])
_APGD = MachineFacts(
    machine="apgd-task",
    make=lambda setting, epsilon: apgd_machine(
        norm=setting.norm, epsilon=epsilon, steps=setting.steps, loss=_JUDGED
    ),
    rule="twice the radius at first, halved where the loss stops rising",
    least={"steps": 1, "restarts": 1, "eot": 1},
    flat=True,
)
_SQUARE = MachineFacts(
    machine="square-task",
    make=lambda setting, epsilon: square_machine(
        norm=setting.norm, epsilon=epsilon, queries=setting.steps, loss=_JUDGED
    ),
    rule="random squares of a shrinking size",
    backward=0,
    least={"steps": 1, "restarts": 1},
)
_HELP = "on the loss of a task"
add(
    _APGD,
    NamedAttack(
        "apgd-task", f"Auto-PGD {_HELP}", _APGD, StandardSettings(30, 100, 5, of_tasks=True)
    ),
)
add(
    _SQUARE,
    NamedAttack(
        "square-task", f"Square {_HELP}", _SQUARE, StandardSettings(31, 5000, of_tasks=True)
    ),
)
