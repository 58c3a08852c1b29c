"""Auto-PGD: gradient ascent with momentum that halves its step when progress stalls.

One machine serves both training (start at the image, train on the point of highest loss) and
AutoAttack (random or given start, report the last misclassified point).

Source: Croce & Hein 2020 (arXiv 2003.01690), algorithm 1; for L1 Croce & Hein 2021 (arXiv
2103.01208), section 3.2. Details that the papers leave open follow auto-attack a392200; parity:
tests/attacks/test_apgd.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import types as t
from jaxrobust.attacks import inputs
from jaxrobust.attacks.geometry.balls import GEOMETRIES, all_finite, l0_norm, per_image, where
from jaxrobust.attacks.losses import BY_TARGET, DLR, Goal, goal_of
from jaxrobust.attacks.machine import as_attack, run
from jaxrobust.attacks.registry import MachineFacts, NamedAttack, StandardSettings, add
from jaxrobust.runtime.text import spelling


class ApgdState(NamedTuple):
    """The state of APGD; the first axis of every array is the image, so slots can be refilled.

    It contains all settings that `tell` uses, so states of two machines that differ only in radius
    or number of steps may share a batch and use either machine's `tell`.
    """

    images: t.Points  # the center of the ball; may leave [0, 1] for Linf and L2
    labels: Any  # i32[B] or f[B, C], or the targets of a loss function
    targets: t.Labels  # classes, used only by the targeted loss
    epsilon: t.PerImage
    steps: t.Counts  # iterations after the start
    period_floor: t.Counts  # the shortest time between two checkpoints
    period_decrement: t.Counts  # how much that time shrinks at each checkpoint
    # Where it is.
    points: t.Points  # to be evaluated next
    previous: t.Points  # the previous iterate, for the momentum
    step: t.PerImage
    kept: t.PerImage  # L1 only: the fraction of entries that a step moves
    iteration: t.Counts  # evaluations told so far; the first is the start's
    # What it found.
    x_best: t.Points  # the point of highest loss
    loss_best: t.PerImage
    gradient_best: t.Points
    x_best_adv: t.Points  # the latest misclassified point, or the start
    correct: t.Mask  # whether no point has been misclassified so far
    # Since the last checkpoint.
    period: t.Counts  # iterations from the last checkpoint to the next
    since: t.Counts  # how many of these are done
    rises: t.Counts  # how often the loss rose between iterates
    last_loss: t.PerImage
    loss_at_check: t.PerImage  # `loss_best` at the checkpoint
    reduced: t.Mask  # whether the step was halved there
    sparsity: t.PerImage  # L1 only: entries in which `x_best` differed from the image there


# --- Algorithm 1: the schedule of checkpoints, the two conditions, one iteration ---


def _periods(norm: str, steps: int) -> tuple[int, int, int]:
    """Compute the first and the shortest period between checkpoints, and the decrement."""
    # `int(0.22 * steps)` in Python doubles, as the reference rounds it.
    if norm == "l1":
        return max(int(0.04 * steps), 1), max(int(0.04 * steps), 1), 0
    return max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)


def _next_period(state: ApgdState, due: t.Mask) -> ApgdState:
    shorter = jnp.maximum(state.period - state.period_decrement, state.period_floor)
    return state._replace(
        period=jnp.where(due, shorter, state.period),
        since=jnp.where(due, 0, state.since),
        rises=jnp.where(due, 0, state.rises),
        loss_at_check=jnp.where(due, state.loss_best, state.loss_at_check),
    )


def _halve_when_stuck(state: ApgdState, due: t.Mask) -> tuple[ApgdState, t.Mask]:
    """Halve the step if a condition for Linf and L2 holds, and restart from the best point."""
    # Condition 1: the loss rose in at most rho = 3/4 of the steps since the last checkpoint.
    oscillates = 4 * state.rises <= 3 * state.since
    # Condition 2: the best loss did not rise, nor was the step halved at the last checkpoint.
    stalls = ~state.reduced & (state.loss_at_check >= state.loss_best)
    halve = due & (oscillates | stalls)
    return state._replace(
        step=jnp.where(halve, state.step / 2, state.step),
        reduced=jnp.where(due, halve, state.reduced),
    ), halve


def _follow_sparsity(state: ApgdState, due: t.Mask) -> tuple[ApgdState, t.Mask]:
    """Return to the full step if the best point became sparser on L1, else shorten the step."""
    # Later steps move two thirds as many entries as the best point changes.
    sparsity = l0_norm(state.x_best - state.images)
    sparser = sparsity / state.sparsity < 0.95  # False for 0/0
    step = jnp.where(sparser, state.epsilon, _divide(state.step, 1.5))
    step = jnp.clip(step, _divide(state.epsilon, 10), state.epsilon)
    state = state._replace(
        step=jnp.where(due, step, state.step),
        kept=jnp.where(due, _kept_of(sparsity, state.images), state.kept),
        sparsity=jnp.where(due, sparsity, state.sparsity),
    )
    return state, due & sparser


def _kept_of(sparsity: t.PerImage, images: t.Points) -> t.PerImage:
    return _divide(_divide(sparsity, images[0].size), 1.5)


def _divide(values: t.PerImage, divisor: float) -> t.PerImage:
    """Divide by a constant without reassociation."""
    # XLA would multiply by the rounded reciprocal, and merge two divisions; an error in the last
    # place of `kept` can move one entry more or less.
    values, divisors = jax.lax.optimization_barrier((values, jnp.full_like(values, divisor)))
    quotients: t.PerImage = values / divisors
    return quotients


def _tell(
    state: ApgdState,
    value: t.PerImage,
    score: t.PerImage | None,
    gradient: t.Points,
    *,
    ball: t.Geometry,
    goal: Goal,
    adapt: Callable[[ApgdState, t.Array], tuple[ApgdState, t.Array]],
    momentum: bool,
) -> ApgdState:
    # Record the evaluation: the start's first, then the iterates'.
    correct = ~goal.reached(score, value)
    iterate = state.iteration > 0
    better = value > state.loss_best  # strictly; NaN is never better
    loss_best = jnp.where(better, value, state.loss_best)
    state = state._replace(
        iteration=state.iteration + 1,
        x_best=where(better, state.points, state.x_best),
        gradient_best=where(better, gradient, state.gradient_best),
        loss_best=loss_best,
        x_best_adv=where(correct, state.x_best_adv, state.points),
        correct=state.correct & correct,
        since=state.since + iterate.astype(jnp.int32),
        rises=state.rises + (iterate & (value > state.last_loss)).astype(jnp.int32),
        last_loss=jnp.where(iterate, value, state.last_loss),
        loss_at_check=jnp.where(iterate, state.loss_at_check, loss_best),
    )
    # At a checkpoint, adapt the step and maybe continue from the best point.
    due = state.since == state.period
    state, restart = adapt(state, due)
    state = _next_period(state, due)
    point = where(restart, state.x_best, state.points)
    gradient = where(restart, state.gradient_best, gradient)
    # Step uphill, then mix in the last direction.
    moved = ball.ascend(point, gradient, state.step, state.kept)
    moved = ball.project(moved, state.images, state.epsilon)
    if momentum:
        weight = jnp.where(state.iteration == 1, 0.0, 0.25).astype(moved.dtype)
        weight, ahead, last = per_image(weight, moved), moved - point, point - state.previous
        # ahead * 0.75, written so that a fused multiply-add cannot change the rounding.
        mixed = point + (ahead - ahead * weight) + last * weight
        moved = ball.project(mixed, state.images, state.epsilon)
    return state._replace(points=where(all_finite(gradient), moved, point), previous=point)


# --- As a machine, a run of AutoAttack, and an attack for training ---


def apgd_machine(
    *,
    norm: str,
    epsilon: float | t.Array,
    steps: int,
    loss: str | Callable[..., t.Array] | Goal = "ce",
    kept_fraction: float = 0.2,
) -> t.Machine:
    """Make a `types.Machine` for APGD with `steps + 1` evaluations; the last needs no gradient.

    Arguments as in `apgd_run`, but `epsilon` may also be an array, which is not checked. `result`
    is the point of highest loss; AutoAttack reads the state's `x_best_adv` and `correct` instead. A
    driver must not `tell` a finished image; this is not checked.
    """
    norm, goal = spelling.norm(norm), goal_of(loss)
    inputs.check_settings(norm=norm, epsilon=epsilon, steps=steps, kept_fraction=kept_fraction)
    ball = GEOMETRIES[norm]

    def init(
        images: Any, labels: Any, *, keys: Any = None, targets: Any = None, start: t.Start = "image"
    ) -> ApgdState:
        images, labels = inputs.check_inputs(images, labels, logits=goal.logits)
        inputs.check_radii(epsilon, images)
        floats, integers = inputs.fillers(images)
        if goal.aims and targets is None:
            raise ValueError(f"loss={loss!r} needs targets i32[B]; pass targets=...")
        if norm == "l1":
            images = jnp.clip(images, 0, 1)  # as the projection does, for a meaningful sparsity
        points = jnp.clip(inputs.start_points(ball, start, images, floats(epsilon), keys), 0, 1)
        if isinstance(start, str):
            kept_share, sparsity = floats(kept_fraction), floats(images[0].size)
        else:
            sparsity = l0_norm(points - images)
            kept_share = _kept_of(sparsity, images)
        period, period_floor, period_decrement = _periods(norm, steps)
        return ApgdState(
            images=images,
            labels=labels,
            targets=inputs.target_classes(targets, len(images)) if goal.aims else integers(0),
            epsilon=floats(epsilon),
            steps=integers(steps),
            period_floor=integers(period_floor),
            period_decrement=integers(period_decrement),
            points=points,
            previous=points,
            step=floats(epsilon if norm == "l1" else 2 * epsilon),
            kept=kept_share,
            iteration=integers(0),
            x_best=points,
            loss_best=floats(-jnp.inf),
            gradient_best=jnp.zeros_like(points),
            x_best_adv=points,
            correct=floats(True, dtype=bool),
            period=integers(period),
            since=integers(0),
            rises=integers(0),
            # Not the start's loss: the reference compares the first iterate with an empty row of
            # its table of losses.
            last_loss=floats(0),
            loss_at_check=floats(0),
            reduced=floats(True, dtype=bool),
            sparsity=sparsity,
        )

    def loss_of(state: ApgdState, outputs: Any) -> t.PerImage:
        return goal.value(outputs, state.labels, state.epsilon.dtype, state.targets)

    adapt = _follow_sparsity if norm == "l1" else _halve_when_stuck
    return t.Machine(
        init=init,
        query=lambda state: state.points,
        loss=loss_of,
        score=goal.state_score if goal.score else None,
        tell=partial(_tell, ball=ball, goal=goal, adapt=adapt, momentum=norm != "l1"),
        finished=lambda state: state.iteration > state.steps,
        result=lambda state: ball.settle(state.x_best, state.images),
        logits=goal.logits,
    )


def apgd_run(
    logits_fn: t.LogitsFn,
    images: t.GivenImages,
    labels: t.Array,
    *,
    norm: str,
    epsilon: float,
    steps: int,
    loss: str | Callable[..., t.Array] | Goal = "ce",
    key: t.Array | None = None,
    start: t.Start = "image",
    targets: t.Labels | None = None,
    kept_fraction: float = 0.2,
) -> ApgdState:
    """Run APGD once, as AutoAttack does; return the full final state.

    Args:
      labels: i32[B], f[B,C] with `ce` and `kl`, or the `targets` of a loss function.
      norm: "linf", "l2" or "l1".
      epsilon: radius, in units of pixels in [0, 1].
      steps: K >= 1; costs K+1 forward and K backward passes.
      loss: a name in `LOSSES`, a function `(outputs, targets) -> f[B]`, or a `Goal`;
        "dlr-targeted" needs `targets` i32[B].
      key: one key or keys [B], used only by the random start.
      start: "image", "random", or points f[B,H,W,C] inside the ball.
      kept_fraction: L1 only, the fraction of entries that the first steps move; if the start is
        given as points, their sparsity decides instead.
    Returns:
      `ApgdState`: `x_best`, `loss_best`, `x_best_adv`, `correct`, `step` and the rest.
    """
    machine = apgd_machine(
        norm=norm, epsilon=epsilon, steps=steps, loss=loss, kept_fraction=kept_fraction
    )
    keys = None if key is None else inputs.image_keys(key, images.shape[0])
    state: ApgdState = machine.init(images, labels, keys=keys, targets=targets, start=start)
    return run(machine, logits_fn, state, gradient_steps=steps, final_forward=True)


def apgd(
    *,
    norm: str = "linf",
    epsilon: float | t.Array,
    steps: int,
    loss: str | Callable[..., t.Array] | Goal = "ce",
    random_start: bool = False,
    kept_fraction: float = 0.05,
    info: bool = False,
) -> t.Attack:
    """Make an Auto-PGD attack for training: it returns the point of highest loss, start included.

    Args:
      norm: "linf", "l2" or "l1".
      epsilon: radius, in units of pixels in [0, 1]; inside `jit` it may be an array f[B].
      steps: K >= 1; costs K+1 forward and K backward passes.
      loss: "ce" (labels i32[B] or f[B,C]), "kl" (f[B,C]), "dlr", "cw" or "pm" (i32[B]); a function
        `(outputs, targets) -> f[B]` of the network's outputs and whatever is passed as labels,
        where larger is worse for the network; or a `Goal`, which also has a score.
      random_start: start at AutoAttack's random point instead of the image clipped to [0, 1].
      kept_fraction: L1 only, the fraction of entries that the first steps move.
      info: return `(images_adv, AttackInfo)`, at the cost of one more forward pass.
    Returns:
      attack(network, key, images, labels) -> images_adv. `network` is a function of images, an NNX
      module, or a pair (Linen module, variables). `key` is one key, or keys [B] (see
      `inputs.image_keys`); without a random start it is not used and may be None. A label outside
      the classes raises an error outside `jit` and is undefined inside.
    Source: Singh, Croce & Hein 2023 (arXiv 2303.01870), training attack.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda images: images.mean((1, 2)) @ jnp.array([[1.0, -1.0]])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> attack = apgd(norm="linf", epsilon=0.25, steps=5)
    >>> images_adv = attack(logits_fn, jax.random.key(0), images, labels)
    >>> float(images_adv.max())
    0.25
    """
    inputs.check_no_targets(goal_of(loss))
    machine = apgd_machine(
        norm=norm, epsilon=epsilon, steps=steps, loss=loss, kept_fraction=kept_fraction
    )
    drive: dict[str, Any] = {"gradient_steps": steps, "final_forward": True}
    return as_attack(machine, random_start=random_start, info=info, **drive)


_FACTS = MachineFacts(
    machine="apgd",
    make=lambda setting, epsilon, loss=BY_TARGET: apgd_machine(
        norm=setting.norm, epsilon=epsilon, steps=setting.steps, loss=loss
    ),
    rule="twice the radius at first, halved where the loss stops rising",
    final_forward=True,
    least={"steps": 1, "restarts": 1, "targets": 1, "eot": 1},
    flat=True,
)
add(
    _FACTS,
    NamedAttack("apgd", "Auto-PGD, which adapts its step size", _FACTS, trains=True, make=apgd),
    NamedAttack("apgd-ce", "Auto-PGD on the cross-entropy", _FACTS, StandardSettings(0, 100)),
    NamedAttack("apgd-dlr", "Auto-PGD on the DLR loss", _FACTS, StandardSettings(1, 100, code=DLR)),
    NamedAttack(
        "apgd-t", "Auto-PGD on the targeted DLR loss", _FACTS, StandardSettings(2, 100, targets=9)
    ),
)
