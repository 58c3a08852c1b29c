"""Square: gradient-free random search with square windows.

Every query draws a window and changes the best point so far inside it: for Linf by the full width
of the ball, for L2 and L1 by moving the mass of two windows into one of them. Changes that raise
the loss stay. The windows shrink over time.

Source: Andriushchenko et al. 2020 (arXiv 1912.00049), algorithms 1 to 3; the L1 version is Croce &
Hein 2021 (arXiv 2103.01208). Details that the papers leave open follow auto-attack a392200, except
that each image has its own windows and signs instead of those of the whole batch. Parity:
tests/attacks/test_square.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import types as t
from jaxrobust.attacks import inputs
from jaxrobust.attacks.geometry import square_proposals
from jaxrobust.attacks.geometry.balls import GEOMETRIES, where
from jaxrobust.attacks.geometry.square_proposals import KeyData, Rows, as_rows
from jaxrobust.attacks.geometry.square_windows import check_schedule, window_levels, window_table
from jaxrobust.attacks.losses import Goal, cw_loss, goal_of
from jaxrobust.attacks.machine import State, advance, as_attack, checked
from jaxrobust.attacks.registry import MachineFacts, NamedAttack, StandardSettings, add
from jaxrobust.runtime.text import spelling


class SquareState(NamedTuple):
    """The state of Square; the first axis of every array is the image, so slots can be refilled.

    States of two machines that differ only in radius may share a batch and `tell`.
    """

    images: Rows  # the center of the ball; may leave [0, 1] for Linf and L2
    labels: Any  # i32[B], or the targets of a loss function
    epsilon: t.PerImage
    keys: KeyData  # raw data, because `where` and shard_map do not accept typed keys
    iteration: t.Counts  # evaluations told so far; the first is the start's
    points: t.Images  # to evaluate next
    x_best: Rows  # the point of smallest margin; at first the start
    margin_best: t.PerImage  # minus the loss: label's logit minus the largest other; inf at first
    score_best: t.PerImage  # the score of `x_best`; NaN at first


def square_run(
    logits_fn: t.LogitsFn,
    images: t.GivenImages,
    labels: t.Array,
    *,
    norm: str,
    epsilon: float | t.Array,
    queries: int = 5000,
    loss: str | Callable[..., t.Array] | Goal = "cw",
    key: t.Array,
    p_init: float = 0.8,
    rescale: bool = False,
) -> SquareState:
    """Run Square until every image has succeeded or is out of queries; return its state.

    Args:
      logits_fn: f[B,H,W,C] -> f[B,C], or any input of `loss`; not differentiated.
      norm: "linf", "l2" or "l1".
      epsilon: radius, in units of pixels in [0, 1].
      queries: maximum number; the start costs one more evaluation.
      loss: what the search maximizes, as in `apgd`; "cw" (the margin) stops at the first
        misclassified point, a `Goal` when it is done, a plain function never.
      key: one key or keys [B] (see `inputs.image_keys`).
      p_init: the fraction of an image's pixels that the first windows cover.
      rescale: stretch the schedule, designed for 10,000 queries, to `queries`.
    Returns:
      `SquareState`: `x_best`, `margin_best` (success: at most 0), `iteration` and the rest.
    """
    settings: dict[str, Any] = {"queries": queries, "p_init": p_init, "rescale": rescale}
    machine = square_machine(norm=norm, epsilon=epsilon, loss=loss, **settings)
    state: SquareState = machine.init(
        images, labels, keys=inputs.image_keys(key, len(images)), start="random"
    )
    return until_done(machine, logits_fn, state, goal=goal_of_search(loss))


def goal_of_search(loss: str | Callable[..., t.Array] | Goal) -> Goal:
    """Make a goal from a loss like `goal_of`; "cw" is reached at a margin of 0."""
    goal = goal_of(loss)
    # The search ends at a margin of 0, even if the largest logits are equal.
    return goal._replace(score=lambda *pair: -cw_loss(*pair)) if loss == "cw" else goal


def until_done(machine: t.Machine, network: Any, state: State, *, goal: Goal) -> State:
    """Run a random search until each image is finished, or its `score_best` reaches the goal."""

    def over(state: Any) -> t.Mask:
        return machine.finished(state) | goal.reached(state.score_best, state.score_best)

    call = checked(machine, network, state)

    def step(state: Any) -> Any:
        after, stays = advance(machine, call, state).state, over(state)
        return jax.tree.map(functools.partial(where, stays), state, after)

    return jax.lax.while_loop(lambda state: ~jnp.all(over(state)), step, state)


def square_machine(
    *,
    norm: str,
    epsilon: float | t.Array,
    queries: int = 5000,
    loss: str | Callable[..., t.Array] | Goal = "cw",
    p_init: float = 0.8,
    rescale: bool = False,
) -> t.Machine:
    """Make a `types.Machine` for Square with up to `queries + 1` evaluations, none with a gradient.

    Arguments as in `square_run`; an array as `epsilon` is not checked, as it may be traced. `init`
    always needs threefry keys, and has one start, "random". An image is finished when its queries
    are used up. Whether its score means success is up to the driver, whose network may be less
    exact than the one that decides. `tell` leaves finished images unchanged. Evaluation n, where
    the start is 0, draws from `fold_in(key, n)`.
    """
    norm, goal = spelling.norm(norm), goal_of_search(loss)
    inputs.check_settings(norm=norm, epsilon=epsilon)
    inputs.check_no_targets(goal)
    check_schedule(queries, p_init)
    levels = window_levels(queries, rescale)
    geometry = square_proposals.PROPOSALS[norm]

    def init(
        images: Any, labels: Any, *, keys: Any = None, start: t.Start = "random", **_: Any
    ) -> SquareState:
        images, labels = inputs.check_inputs(images, labels, logits=goal.logits)
        inputs.check_search("Square", images, start)
        inputs.check_radii(epsilon, images)
        if goal.logits and labels.ndim != 1:
            raise ValueError(f"Square needs class labels i32[B], got shape {labels.shape}")
        if norm == "l1":
            images = jnp.clip(images, 0, 1)  # as the projection does
        keys = key_data(inputs.image_keys(keys, len(images)))
        one_each = images.reshape(len(images), -1)[:, 0]
        # A product, which copies shard_map's axes.
        radius = jnp.ones_like(one_each) * jnp.asarray(epsilon, one_each.dtype)
        points = geometry.start(images, radius, geometry.draw_start(keys, images))
        return SquareState(
            images=as_rows(images),
            labels=labels,
            epsilon=radius,
            keys=keys,
            iteration=jnp.zeros_like(one_each, jnp.int32),
            points=points,
            x_best=as_rows(points),
            margin_best=jnp.full_like(one_each, jnp.inf),
            score_best=jnp.full_like(one_each, jnp.nan),
        )

    def tell(
        state: SquareState, loss: t.PerImage, score: t.PerImage | None, gradient: Any = None
    ) -> SquareState:
        margin, score = -loss, state.score_best if score is None else score.astype(loss.dtype)
        searching = ~finished(state)
        better = searching & (margin < state.margin_best)  # NaN is never better
        state = state._replace(
            iteration=state.iteration + searching.astype(jnp.int32),
            x_best=jnp.where(better[:, None, None], as_rows(state.points), state.x_best),
            margin_best=jnp.where(better, margin, state.margin_best),
            score_best=jnp.where(better, score, state.score_best),
        )
        height, width = state.points.shape[1:3]
        windows = window_table(norm, levels, p_init, (height, width))
        level = jnp.asarray(levels)[jnp.clip(state.iteration - 1, 0, queries - 1)]
        draws = square_proposals.draw_query(state, jnp.asarray(windows.sides)[level])
        return state._replace(points=geometry.propose(state, draws, windows, level))

    def finished(state: SquareState) -> t.Mask:
        return state.iteration > queries

    return t.Machine(
        init=init,
        query=lambda state: state.points,
        loss=lambda state, outputs: goal.value(outputs, state.labels, state.epsilon.dtype),
        score=goal.state_score if goal.score else None,
        tell=tell,
        finished=finished,
        result=lambda state: GEOMETRIES[norm].settle(
            *(a.reshape(state.points.shape) for a in (state.x_best, state.images))
        ),
        gradient=False,
        logits=goal.logits,
    )


def key_data(keys: t.Keys) -> KeyData:
    """Return the data of threefry keys; `ValueError` for other keys."""
    data = jax.random.key_data(keys)
    if data.shape[1:] != (2,):
        raise ValueError(
            f"a random search does not support {jax.random.key_impl(keys)!r} keys; "
            "pass jax.random.key(seed, impl='threefry2x32')"
        )
    return data


def square(
    *,
    norm: str = "linf",
    epsilon: float,
    queries: int = 5000,
    loss: str | Callable[..., t.Array] | Goal = "cw",
    p_init: float = 0.8,
    rescale: bool = False,
    info: bool = False,
) -> t.Attack:
    """Make a Square attack: it returns the point of highest loss, misclassified or not.

    Arguments as in `square_run`.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda images: images.mean((1, 2)) @ jnp.array([[1.0, -1.0]])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> attack = square(norm="linf", epsilon=0.25, queries=20)
    >>> images_adv = attack(logits_fn, jax.random.key(0), images, labels)
    >>> bool(jnp.abs(images_adv - images).max() <= 0.25)
    True
    """
    settings: dict[str, Any] = {"queries": queries, "p_init": p_init, "rescale": rescale}
    machine = square_machine(norm=norm, epsilon=epsilon, loss=loss, **settings)
    drive = functools.partial(until_done, goal=goal_of_search(loss))
    return as_attack(machine, drive=drive, random_start=True, info=info)


_FACTS = MachineFacts(
    machine="square",
    make=lambda setting, epsilon, loss="cw": square_machine(
        norm=setting.norm, epsilon=epsilon, queries=setting.steps, loss=loss
    ),
    rule="random squares of a shrinking size",
    backward=0,
    least={"steps": 1, "restarts": 1},
)
add(
    _FACTS,
    NamedAttack("square", "Square, which needs no gradient", _FACTS, StandardSettings(5, 5000)),
)
