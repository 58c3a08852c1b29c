"""A task: a goal with a name, and its network as the evaluator sees it.

To the evaluator every task is one of two classes: an image stands, or an attack has succeeded on
it. So slots, ledgers, records and replays need to know nothing of masks or embeddings.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import Goal
from jaxrobust.attacks.losses import goal_of
from jaxrobust.attacks.refused_network import as_function, called
from jaxrobust.attacks.registry import NamedAttack, add, searching
from jaxrobust.attacks.sparse import sparse_pgd, sparse_rs  # noqa: F401  (enter their rows)
from jaxrobust.types import Array

_PROBED = 64  # images
_STEP = 8 / 255
# On which `Goal.done` is compared: thresholds that lie between two of these are not told apart.
_FINE, _WIDE = np.linspace(-2, 2, 8001), np.geomspace(2, 1e9, 4000)
_SCORES = np.concatenate([-_WIDE[::-1], _FINE, _WIDE]).astype(np.float32)


class Task(NamedTuple):
    """What an evaluation asks: `goal` needs a score, and says when an attack has succeeded."""

    name: str  # in records
    goal: Goal
    check: Callable[[Any, Any], None] | None = None  # (shapes of outputs, targets): `ValueError`


class TaskNetwork(NamedTuple):
    """A task's network with the targets of N images."""

    task: Task
    network: jax.tree_util.Partial  # images -> outputs
    targets: Any  # arrays [N, ...]
    ids: np.ndarray  # u32[N]
    verdicts: str  # hash of which scores mean success

    @classmethod
    def of(cls, task: Task, network: Any, targets: Any, ids: np.ndarray) -> "TaskNetwork":
        """Check a network and its targets; `ValueError` where they do not fit `ids`."""
        goal = task.goal if isinstance(task, Task) and isinstance(task.name, str) else None
        if not isinstance(goal, Goal) or goal.score is None or goal.aims:
            raise ValueError(
                f"task={task!r} is not a task with a score; pass one such as "
                "jaxrobust.tasks.segmentation(), or Task(name, Goal(loss, score))"
            )
        for path, leaf in jax.tree_util.tree_leaves_with_path(targets):
            array, name = np.asarray(leaf), f"targets{jax.tree_util.keystr(path)}"
            kind = array.dtype.kind
            if array.shape[:1] != ids.shape:
                raise ValueError(
                    f"{name} have shape {array.shape} for {len(ids)} images; pass arrays whose "
                    "first axis is the image"
                )
            if kind == "O" or (kind in "iu" and (np.asarray(jnp.asarray(array)) != array).any()):
                raise ValueError(
                    f"{name} are {array.dtype} and do not fit JAX's 32 bits; pass smaller numbers"
                )
        goal_of(goal)  # checks what its functions take
        done = np.asarray(goal.reached(jnp.asarray(_SCORES), jnp.asarray(_SCORES)))
        verdicts = hashlib.sha256(np.packbits(done).tobytes()).hexdigest()[:12]
        if not isinstance(network, jax.tree_util.Partial):
            network = jax.tree_util.Partial(as_function(network))
        return cls(task, network, jax.tree.map(jnp.asarray, targets), ids, verdicts)

    @property
    def identity(self) -> dict[str, str]:
        """Return the task's name and a hash of the scores that mean success, for a ledger."""
        return {"name": self.task.name, "done": self.verdicts}

    def hashes(self, digest: str, image_hashes: np.ndarray) -> tuple[str, np.ndarray]:
        """Add the task and the targets to the hashes of all images and of each, str[N]."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(self.targets)]

        def joined(text: str, rows: Any) -> str:
            combined = hashlib.sha256(f"{text} {self.identity}".encode())
            for leaf in leaves:
                combined.update(np.ascontiguousarray(leaf[rows]).tobytes())
            return combined.hexdigest()

        each = [h and h[0] + joined(h, i)[:8] for i, h in enumerate(image_hashes.tolist())]
        return joined(digest, slice(None)), np.array(each, str)

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
            stands = jnp.where(goal.reached(score, loss), -1.0, 1.0)
            return jnp.stack([jnp.where(jnp.isnan(score), jnp.nan, stands), loss], axis=1)

        targets = jax.tree.map(lambda a: a[order], targets)
        return jax.tree_util.Partial(judge, self.network, targets, jnp.asarray(ids[order]))

    def flags(self, images: Any, batch: int) -> dict[str, str]:
        """Flag what a few passes over at most 64 images, `batch` at a time, show about the task.

        That is a loss that is not finite or whose ascent helps the network, and a score that
        depends on the other images. `ValueError`: the targets are not of this network.
        """
        goal, n = self.task.goal, min(len(images), _PROBED)

        def probe(network: Any, points: Array, rows: Any) -> tuple[Array, ...]:
            values = functools.partial(_values, goal, network)
            # At the image itself, a distance to the clean outputs has no gradient.
            near = points + jnp.resize(jnp.array([_STEP, -_STEP]) / 8, points.shape)
            ascent = jax.grad(lambda points: values(points, rows)[0].sum())(near)
            up, down = (
                values(jnp.clip(near + step * jnp.sign(ascent), 0, 1), rows)[1]
                for step in (_STEP, -_STEP)
            )
            first = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), (points, rows))
            alone = values(*first)[1]
            loss, score = values(points, rows)
            return loss, up, down, jnp.broadcast_to(score[0] - alone[0], score.shape), score

        probe, parts = jax.jit(probe), []
        for start in range(0, n, batch):
            places = np.resize(np.arange(start, min(start + batch, n)), batch)
            points = jnp.asarray(np.asarray(images[places]), jnp.float32)
            rows = jax.tree.map(lambda a, places=places: a[places], self.targets)
            parts.append(np.asarray(probe(self.network, points, rows)))
            if self.task.check and not start:
                outputs = jax.eval_shape(self.network, points)
                self.task.check(outputs, jax.tree.map(np.asarray, self.targets))
        loss, up, down, moved, score = np.concatenate(parts, axis=1)[:, :n]
        broken, better, worse = ~np.isfinite(loss), (up > down).sum(), (up < down).sum()
        flags = {}
        if np.abs(moved).max() > max(1e-3 * np.ptp(score), 1e-5 * np.abs(score).max()):
            flags["batch-dependent"] = (
                f"the score of an image changes by {np.abs(moved).max():.3g} when the other "
                "images in its batch change; return one number for each image, without means over "
                "the batch, and put the network into evaluation mode"
            )
        if broken.any():
            flags["nan-loss"] = (
                f"the loss of {broken.sum()} of {n} clean images is NaN or infinite, so no attack "
                "can follow it; look for log, sqrt or a division at 0"
            )
        if better > 3 * worse + 4:
            flags["wrong-sign"] = (
                f"a step up the loss gives a higher score than a step down for {better} of {n} "
                f"images, and a lower one for {worse}, so the attacks help the network; negate "
                "the loss, which must be larger where the network is worse"
            )
        return flags


def _values(goal: Goal, network: Any, points: Array, rows: Any) -> tuple[Array, Array]:
    """Compute loss and score f[B]; `ValueError` unless there is one of each for each image."""
    outputs = called(network, points)
    return goal.value(outputs, rows, jnp.float32), goal.scored(outputs, rows)


# What `judged` returns, as an attack sees it.
_JUDGED = Goal(lambda judged, labels: judged[:, 1], lambda judged, labels: judged[:, 0])


for number, (of, restarts) in enumerate(  # numbers that never change
    (("apgd-ce", 5), ("square", 1), ("sparse-pgd", 1), ("sparse-pgd-p", 1), ("sparse-rs", 1)), 30
):
    facts, standard = searching()[of]
    facts = facts._replace(
        machine=f"{facts.machine}-task", make=functools.partial(facts.make, loss=_JUDGED)
    )
    standard = standard._replace(number=number, restarts=restarts, of_tasks=True)
    add(facts, NamedAttack(facts.machine, f"{of} on the loss of a task", facts, standard))
