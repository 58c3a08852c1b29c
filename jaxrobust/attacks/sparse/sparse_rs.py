"""Sparse-RS: gradient-free random search among images that differ in a number of pixels.

Each query restores some of the changed pixels and changes as many others, each to a random corner
of the color cube. Changes that raise the loss stay. The number of exchanges falls over time.

Source: Croce et al. 2022 (arXiv 2006.12834), algorithm 1, for L0. Details follow the authors' code
(fra31/sparse-rs 055efff), with two differences. Each image exchanges its own pixels instead of
those of the whole batch. A single exchanged pixel that draws its current color takes the opposite
color, where the code draws again.
Parity: tests/attacks/test_sparse_rs.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxrobust import types as t
from jaxrobust.attacks import inputs
from jaxrobust.attacks.geometry.balls import order_statistic, per_image, where
from jaxrobust.attacks.geometry.square_proposals import KeyData
from jaxrobust.attacks.losses import Goal
from jaxrobust.attacks.machine import as_attack
from jaxrobust.attacks.registry import MachineFacts, NamedAttack, StandardSettings, add
from jaxrobust.attacks.square import goal_of_search, key_data, until_done

# Out of 10,000 queries, those up to which `alpha_init` is divided by each number.
_UNTIL = (0, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_DIVISORS = (1, 2, 4, 5, 6, 8, 10, 12, 15, 20)

Pixels = Bool[t.Array, "B H W 1"]
Order = Integer[t.Array, "B H W 1"]


class SparseRsState(NamedTuple):
    """The state of Sparse-RS; the first axis of every array is the image."""

    images: t.Images  # in [0, 1]
    labels: Any  # i32[B], or the targets of a loss function
    pixels: t.Counts
    exchanges: Integer[t.Array, "B levels"]  # number of pixels to exchange at each level
    keys: KeyData
    iteration: t.Counts  # evaluations told so far
    points: t.Images  # to evaluate next
    changed: Pixels  # the pixels that `points` change
    x_best: t.Images  # the point of highest loss; at first the start
    changed_best: Pixels
    loss_best: t.PerImage  # -inf at first
    score_best: t.PerImage  # the score of `x_best`; NaN at first


def sparse_rs_machine(
    *,
    pixels: int | t.Array,
    queries: int = 5000,
    loss: str | Callable[..., t.Array] | Goal = "cw",
    alpha_init: float = 0.3,
) -> t.Machine:
    """Make a `types.Machine` for Sparse-RS with up to `queries` evaluations, none with a gradient.

    Arguments as in `sparse_rs`. `init` needs threefry keys; evaluation n draws from `fold_in(key,
    n)`.
    """
    goal = goal_of_search(loss)
    inputs.check_no_targets(goal)
    inputs.check_pixels(pixels)
    if not t.is_count(queries):
        raise ValueError(f"queries={queries!r} must be an int >= 1")
    if not 0 < t.check_number("alpha_init", alpha_init) <= 1:
        raise ValueError(f"alpha_init={alpha_init} must be above 0 and at most 1, such as 0.3")
    levels = search_levels(queries)

    def init(
        images: Any, labels: Any, *, keys: Any = None, start: t.Start = "random", **_: Any
    ) -> SparseRsState:
        images, labels = inputs.check_inputs(images, labels, logits=goal.logits)
        inputs.check_search("Sparse-RS", images, start)
        size = images[0, ..., 0].size
        inputs.check_pixels(pixels, of=size)
        inputs.check_radii(pixels, images)
        images = jnp.clip(images, 0, 1)
        keys = key_data(inputs.image_keys(keys, len(images)))
        floats, integers = inputs.fillers(images)
        order, corners = _draw(keys, integers(0), images)
        count = integers(0) + jnp.asarray(pixels).astype(jnp.int32)
        changed = order < per_image(count.astype(order.dtype), order)
        points = jnp.where(changed, corners, images)
        return SparseRsState(
            images=images,
            labels=labels,
            pixels=count,
            exchanges=jnp.asarray(exchanged_pixels(size, alpha_init))[count],
            keys=keys,
            iteration=integers(0),
            points=points,
            changed=changed,
            x_best=points,
            changed_best=changed,
            loss_best=floats(-jnp.inf),
            score_best=floats(jnp.nan),
        )

    def tell(
        state: SparseRsState, loss: t.PerImage, score: t.PerImage | None, gradient: Any = None
    ) -> SparseRsState:
        searching = state.iteration < queries
        better = searching & ((loss > state.loss_best) | goal.reached(score, loss))
        score = state.score_best if score is None else score.astype(loss.dtype)
        state = state._replace(
            iteration=state.iteration + searching.astype(jnp.int32),
            x_best=where(better, state.points, state.x_best),
            changed_best=where(better, state.changed, state.changed_best),
            loss_best=jnp.where(better, loss, state.loss_best),
            score_best=jnp.where(better, score, state.score_best),
        )
        level = jnp.asarray(levels)[jnp.minimum(state.iteration, queries - 1)]
        count = jnp.take_along_axis(state.exchanges, level[:, None], axis=1)[:, 0]
        count = jnp.minimum(count, state.images[0, ..., 0].size - state.pixels)
        return exchange(state, *_draw(state.keys, state.iteration, state.images), count)

    return t.Machine(
        init=init,
        query=lambda state: state.points,
        loss=lambda state, outputs: goal.value(outputs, state.labels, state.loss_best.dtype),
        score=goal.state_score if goal.score else None,
        tell=tell,
        finished=lambda state: state.iteration >= queries,
        result=lambda state: state.x_best,
        gradient=False,
        logits=goal.logits,
    )


def search_levels(queries: int) -> np.ndarray:
    """Return the index into `_DIVISORS` for each query, i32[queries]."""
    of_10000 = (np.arange(queries) / queries * 10_000).astype(int)
    return np.searchsorted(_UNTIL, of_10000).astype(np.int32)


def exchanged_pixels(size: int, alpha_init: float) -> np.ndarray:
    """Count the exchanged pixels, of 0 to `size` - 1, at each level, i32[size, levels]."""
    shares = alpha_init / np.array(_DIVISORS)
    return np.maximum((shares * np.arange(size)[:, None]).astype(np.int32), 1)


def exchange(
    state: SparseRsState, order: Order, corners: t.Images, count: t.Counts
) -> SparseRsState:
    """Restore the first `count` changed pixels in `order`, and change the first others."""
    same = (corners == state.x_best).all(axis=3, keepdims=True) & (per_image(count, corners) == 1)
    corners = jnp.where(same, 1 - corners, corners)
    leave = _first(count, order, state.changed_best)
    join = _first(count, order, ~state.changed_best)
    points = jnp.where(leave, state.images, state.x_best)
    return state._replace(
        points=jnp.where(join, corners, points), changed=(state.changed_best & ~leave) | join
    )


def _first(count: t.Counts, order: Order, among: Pixels) -> Pixels:
    size = order[0].size
    places = jnp.where(among, order, size).astype(jnp.float32)  # exact below 2^24 pixels
    last = order_statistic(places, count - 1)
    return among & (places <= last[:, None, None, None])


def _draw(
    keys: KeyData, number: t.Counts, images: t.Images
) -> tuple[Order, Float[t.Array, "B H W channels"]]:
    """Draw an order of the pixels, and for each a corner of the color cube."""
    _, height, width, _ = images.shape

    def of_one(data: t.Array, number: t.Array, image: t.Array) -> tuple[t.Array, t.Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), number)
        first, second = jax.random.split(key)
        order = jax.random.permutation(first, height * width).reshape(height, width, 1)
        order += jnp.zeros_like(image[..., :1], order.dtype)  # copies shard_map's axes
        return order, jax.random.bernoulli(second, shape=image.shape).astype(image.dtype)

    return jax.vmap(of_one)(keys, number, images)


def sparse_rs(
    *,
    pixels: int | t.Array,
    queries: int = 5000,
    loss: str | Callable[..., t.Array] | Goal = "cw",
    alpha_init: float = 0.3,
    info: bool = False,
) -> t.Attack:
    """Make a Sparse-RS attack: the point of highest loss with at most `pixels` changed pixels.

    Args:
      pixels: maximum number of changed pixels, each in all channels; fewer than the image has.
        Inside `jit`, it may be an array i32[B].
      queries: maximum number, including the start; a misclassified image is left unchanged.
      loss: what the search maximizes, as in `square`.
      alpha_init: the share of changed pixels that the first queries exchange.
      info: return `(images_adv, AttackInfo)`, at the cost of one more forward pass.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda images: images.mean((1, 2)) @ jnp.array([[1.0, -1.0]])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> images_adv = sparse_rs(pixels=3, queries=20)(logits_fn, jax.random.key(0), images, labels)
    >>> int((images_adv != images).sum()), float(logits_fn(images_adv)[0, 0])
    (3, 0.40625)
    """
    machine = sparse_rs_machine(pixels=pixels, queries=queries, loss=loss, alpha_init=alpha_init)
    drive = functools.partial(until_done, goal=goal_of_search(loss))
    return as_attack(machine, drive=drive, random_start=True, info=info)


_FACTS = MachineFacts(
    machine="sparse-rs",
    # As in Sparse-AutoAttack by the authors of Sparse-PGD.
    make=lambda setting, epsilon, loss="ce": sparse_rs_machine(
        pixels=epsilon, queries=setting.steps, loss=loss, alpha_init=0.8
    ),
    rule="random exchanges of a falling number of pixels",
    norms=("l0",),
    backward=0,
    extra=0,
    least={"steps": 1, "restarts": 1},
)
add(
    _FACTS,
    NamedAttack(
        "sparse-rs", "Sparse-RS in L0, which needs no gradient", _FACTS, StandardSettings(9, 10_000)
    ),
)
