"""What minimum-norm attacks share: a machine that remembers the nearest adversarial example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrobust.attacks import inputs
from jaxrobust.attacks.geometry.balls import l2_norm, per_image, where
from jaxrobust.attacks.losses import Goal
from jaxrobust.types import Counts, Machine, Mask, PerImage, Points, check_number


class NearestState(NamedTuple):
    """The state of a minimum-norm attack; the first axis of every array is the image."""

    images: Points  # in [0, 1]
    labels: Any  # i32[B], or the targets of a `Goal`
    points: Points  # to evaluate next, first the images
    epsilon: PerImage  # the norm of the latest step
    iteration: Counts  # evaluations told so far
    steps: Counts
    adv: Points  # the adversarial example of smallest norm so far, or the image
    norm_best: PerImage  # its distance to the image; infinite if there is none


def nearest_machine(
    goal: Goal, tell: Callable[..., NearestState], *, epsilon: float, steps: int, gamma: float
) -> Machine:
    """Make a `types.Machine` of `steps` evaluations, starting at the image; `result` is `adv`."""
    inputs.check_no_targets(goal)
    if goal.score is None:
        raise ValueError(
            "a loss function does not define which images are adversarial; pass "
            "loss=attacks.Goal(loss, score)"
        )
    if not 0 < check_number("gamma", gamma) < 1:
        raise ValueError(f"gamma={gamma} must be between 0 and 1, such as 0.05")

    def init(images: Any, labels: Any, *, start: Any = "image", **_: Any) -> NearestState:
        if not (isinstance(start, str) and start == "image"):
            raise ValueError("minimum-norm attacks start at the image; pass start='image'")
        images, labels = inputs.check_inputs(images, labels, logits=goal.logits)
        images = jnp.clip(images, 0, 1)
        floats, integers = inputs.fillers(images)
        return NearestState(
            images=images,
            labels=labels,
            points=images,
            epsilon=floats(epsilon),
            iteration=integers(0),
            steps=integers(steps),
            adv=images,
            norm_best=floats(jnp.inf),
        )

    return Machine(
        init=init,
        query=lambda state: state.points,
        loss=lambda state, outputs: goal.value(outputs, state.labels, state.epsilon.dtype),
        score=goal.state_score,
        tell=tell,
        finished=lambda state: state.iteration >= state.steps,
        result=lambda state: state.adv,
        logits=goal.logits,
    )


def keep_nearest(state: NearestState, adversarial: Mask, norm: PerImage) -> NearestState:
    """Count an evaluation, and store its point if it is the nearest adversarial example so far."""
    better = adversarial & (norm < state.norm_best)
    return state._replace(
        iteration=state.iteration + 1,
        adv=where(better, state.points, state.adv),
        norm_best=jnp.where(better, norm, state.norm_best),
    )


def annealed(state: NearestState, first: float, last: float) -> PerImage:
    """Return a setting that falls from `first` towards `last` along half a cosine."""
    share = state.iteration.astype(state.epsilon.dtype) / state.steps.astype(state.epsilon.dtype)
    return last + (first - last) * (1 + jnp.cos(jnp.pi * share)) / 2


def direction(gradient: Points) -> Points:
    """Scale each image's gradient to an L2 norm of 1; zeros stay."""
    # Scale by the largest entry first: a tiny gradient's squares are 0.
    size = jnp.max(jnp.abs(gradient.reshape(len(gradient), -1)), axis=1)
    gradient = gradient / per_image(jnp.where(size > 0, size, 1), gradient)
    return gradient / per_image(jnp.maximum(l2_norm(gradient), 1), gradient)
