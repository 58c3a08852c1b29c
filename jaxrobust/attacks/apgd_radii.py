"""APGD in balls of shrinking radius, used by AutoAttack for L1.

Source: Croce & Hein 2021 (arXiv 2103.01208), section 3.3; parity: tests/attacks/test_apgd.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust.attacks.apgd import ApgdState, apgd_machine
from jaxrobust.attacks.geometry.balls import GEOMETRIES, where
from jaxrobust.attacks.inputs import check_inputs, start_points
from jaxrobust.attacks.losses import BY_TARGET, Goal, goal_of
from jaxrobust.attacks.registry import MachineFacts, add
from jaxrobust.types import Array, Counts, Machine, Mask, PerImage, Points, Start


class MultiRadiusState(NamedTuple):
    """Three successive runs of APGD; the first axis of every array is the image."""

    stage: Counts  # 0, 1 or 2
    run: ApgdState


def apgd_multi_radius_machine(
    *, norm: str, epsilon: float | Array, steps: int, loss: str | Callable[..., Array] | Goal = "ce"
) -> Machine:
    """Make APGD in balls of 3, 2 and 1 times the radius, each starting at the previous best point.

    Arguments and `init` as in `apgd_machine`; only points in the last ball count. `steps` is split
    3 : 3 : 4. Each stage also evaluates its start, so there are `steps + 3` evaluations.
    """
    early = math.ceil(0.3 * steps)
    plan = ((3, early), (2, early), (1, steps - 2 * early))
    if min(length for _, length in plan) < 1:
        raise ValueError(f"steps={steps} cannot be split into three stages; pass at least 4")
    stages = [
        apgd_machine(norm=norm, epsilon=factor * epsilon, steps=length, loss=loss)
        for factor, length in plan
    ]
    project, goal = GEOMETRIES[norm].project, goal_of(loss)

    def radius(stage: int, images: Points) -> PerImage:
        return jnp.full_like(images.reshape(images.shape[0], -1)[:, 0], plan[stage][0] * epsilon)

    def init(
        images: Any, labels: Any, *, keys: Any = None, targets: Any = None, start: Start = "random"
    ) -> MultiRadiusState:
        images, labels = check_inputs(images, labels, logits=goal.logits)
        widest = radius(0, images)
        start = project(start_points(GEOMETRIES[norm], start, images, widest, keys), images, widest)
        run = stages[0].init(images, labels, start=start, targets=targets)
        return MultiRadiusState(jnp.full_like(run.iteration, 0), run)

    def begin(state: MultiRadiusState, over: Mask) -> MultiRadiusState:
        for stage in (1, 2):
            run = state.run
            start = project(run.x_best, run.images, radius(stage, run.images))
            new = stages[stage].init(run.images, run.labels, start=start, targets=run.targets)
            enters = over & (state.stage == stage - 1)
            run = jax.tree.map(partial(where, enters), new, run)
            state = MultiRadiusState(jnp.where(enters, stage, state.stage), run)
            over = over & ~enters
        return state

    def tell(state: MultiRadiusState, loss: Any, score: Any, gradient: Points) -> MultiRadiusState:
        state = state._replace(run=stages[0].tell(state.run, loss, score, gradient))
        over = stages[0].finished(state.run) & (state.stage < 2)
        same = lambda state, over: state  # noqa: E731
        state = jax.lax.cond(jnp.any(over), begin, same, state, over)
        return state

    return Machine(
        init=init,
        query=lambda state: stages[0].query(state.run),
        loss=lambda state, outputs: stages[0].loss(state.run, outputs),
        score=(lambda state, outputs: goal.state_score(state.run, outputs)) if goal.score else None,
        tell=tell,
        finished=lambda state: stages[0].finished(state.run) & (state.stage == 2),
        result=lambda state: stages[0].result(state.run),
        counts=lambda state: state.stage == 2,
        logits=goal.logits,
    )


add(
    MachineFacts(
        machine="apgd-multi-radius",  # for attacks other than `apgd_machine`
        make=lambda setting, epsilon: apgd_multi_radius_machine(
            norm=setting.norm, epsilon=epsilon, steps=setting.steps, loss=BY_TARGET
        ),
        rule="as APGD's, at three radii",
        extra=3,  # each stage evaluates its start
        least={"steps": 5, "restarts": 1, "targets": 1, "eot": 1},  # three stages with a step each
        flat=True,
    )
)
