"""FAB: the nearest misclassified point, found by projecting onto linearised decision boundaries.

Unlike the other attacks it does not stay in a ball: it shrinks the norm of an adversarial example,
and the radius is read only by its random start and by `counts`.

Source: Croce & Hein 2020 (arXiv 1907.02044), algorithm 1; FAB-T is section 4 of Croce & Hein 2020
(arXiv 2003.01690). Details that the papers leave open follow auto-attack a392200, which has no
final line search; parity: tests/test_fab.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust.attacks import balls
from jaxrobust.attacks.balls import per_image
from jaxrobust.attacks.machine import (
    _check_classes,
    _number,
    check_inputs,
    check_settings,
    image_keys,
    start_points,
)
from jaxrobust.types import Array, LogitsFn, Machine

_FAR = 1e12  # a level at which every entry has reached the box


class FabState(NamedTuple):
    """The state of FAB; the first axis of every array is the image, so slots can be refilled.

    All settings that users may vary from image to image live here, as in `ApgdState`.
    """

    images: Array  # in [0, 1]
    labels: Array  # i32[B]
    targets: Array  # i32[B], read by the targeted attack only
    epsilon: Array  # f[B], read by `counts` only
    steps: Array  # i32[B]
    points: Array  # to be evaluated next: with gradient for `tell`, then without for `check`
    iteration: Array  # i32[B], checks told so far
    adv: Array  # the misclassified point of smallest norm so far, the image if there is none
    norm_best: Array  # f[B], its distance to the image; infinite if there is none


def fab_run(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    norm: str,
    epsilon: float,
    steps: int = 100,
    targets: Array | None = None,
    key: Array | None = None,
    start: str | Array = "image",
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> FabState:
    """One run of FAB; returns the whole final state.

    Args:
      logits_fn: f[B,H,W,C] -> f[B,C].
      images: f[B,H,W,C], clipped to [0, 1]; the attack is meant for those classified correctly.
      labels: i32[B].
      norm: "linf", "l2" or "l1".
      epsilon: radius of the random start, in units of pixels in [0, 1].
      steps: K >= 1; costs 2K forward and K backward passes, untargeted K times C backward.
      targets: i32[B], another class each, whose boundary with the label is approached; None: the
        nearest boundary of any class.
      key: one key or keys [B], read by the random start only.
      start: "image", "random", or points f[B,H,W,C].
      alpha_max: the largest weight of the image's own projection, which pulls back towards it.
      eta: how far each projection overshoots its boundary.
      beta: the share of its distance that an adversarial point keeps in the backward step.
    Returns:
      `FabState`: `adv`, `norm_best` and the rest.
    Raises:
      ValueError: see `fab_machine`; labels or targets outside the classes (outside `jit`).
    """
    machine = fab_machine(
        norm=norm,
        epsilon=epsilon,
        steps=steps,
        targeted=targets is not None,
        alpha_max=alpha_max,
        eta=eta,
        beta=beta,
    )
    keys = None if key is None else image_keys(key, len(images))
    state = given = machine.init(images, labels, keys, start, targets=targets)

    def body(state, _):
        def loss(points):
            logits = logits_fn(points)
            for name in ("labels", "targets"):
                _check_classes(name, getattr(given, name), logits.shape[1])
            return machine.loss(state, logits), logits

        values, pull, logits = jax.vjp(loss, machine.query(state), has_aux=True)
        if values.ndim == 1:
            (gradient,) = pull(jnp.ones_like(values))
        else:
            gradient = nearest(machine, state, values, pull)
        state = machine.tell(state, logits, gradient)
        return machine.check(state, logits_fn(machine.query(state))), None

    return jax.lax.scan(body, state, length=steps)[0]


def fab_machine(
    *,
    norm: str,
    epsilon: float | Array,
    steps: int = 100,
    targeted: bool = True,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Machine:
    """FAB as a `types.Machine` of `steps` pairs of a gradient and a check.

    Arguments as in `fab_run`. `init` takes one argument more than a machine must, `targets`
    i32[B]. Targeted, `loss` is f[B]; otherwise f[B, C], the boundary with each class.
    `result` is `adv`. A driver must not `tell` a finished image: nothing here stops it.

    Raises:
      ValueError: settings outside their range, labels that are not classes, no targets where
        they are needed.
    """
    check_settings(norm=norm, epsilon=epsilon, loss="ce", steps=steps)
    _check_own_settings(alpha_max, eta, beta)
    ball = balls.BALLS[norm]._replace(sample=partial(_sample, norm=norm))
    size = _SIZE[norm]

    def init(images, labels, keys=None, start="image", targets=None):
        images, labels = check_inputs(images, labels)
        if labels.ndim != 1:
            raise ValueError(
                f"FAB needs class labels i32[B], got shape {labels.shape}; pass their argmax"
            )
        if targeted and targets is None:
            raise ValueError("targeted FAB needs targets i32[B]; pass targets=...")
        targets = jnp.zeros_like(labels) if targets is None else jnp.asarray(targets)
        if targets.shape != labels.shape or not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                f"targets are {targets.dtype} of shape {targets.shape}; pass one class per image"
            )
        images = jnp.clip(images, 0, 1)
        one_each = images.reshape(images.shape[0], -1)[:, 0]
        floats = partial(jnp.full_like, one_each)  # `_like` also takes over shard_map's axes
        integers = partial(jnp.full_like, one_each, dtype=jnp.int32)
        return FabState(
            images=images,
            labels=labels,
            targets=targets,
            epsilon=floats(epsilon),
            steps=integers(steps),
            points=jnp.clip(start_points(ball, start, images, floats(epsilon), keys), 0, 1),
            iteration=integers(0),
            adv=images,
            norm_best=floats(jnp.inf),
        )

    def loss_of(state, logits):
        logits = logits.astype(state.epsilon.dtype)
        own = jnp.take_along_axis(logits, state.labels[:, None], axis=1)
        if targeted:
            return (jnp.take_along_axis(logits, state.targets[:, None], axis=1) - own)[:, 0]
        return logits - own

    def tell(state, logits, gradient):
        x, x1, value = _rows(state.images), _rows(state.points), loss_of(state, logits)
        if not targeted:
            gradient, which = gradient
            value = jnp.take_along_axis(value, which[:, None], axis=1)[:, 0]
        w = _rows(gradient)
        # The boundary, linearised, is {z | value + <w, z - x1> = 0}; how far is the image beyond?
        excess = value + jnp.sum(w * (x - x1), axis=1)
        moves = jnp.isfinite(excess)  # or else the gradient is not
        value, excess = jnp.where(moves, value, 0), jnp.where(moves, excess, 0)
        w = jnp.where(moves[:, None], w, 0)
        # Project both onto it, and go between the two: the more towards the image's own
        # projection, the nearer that one is.
        d1, d2 = _displacement(x1, w, value, norm), _displacement(x, w, excess, norm)
        a1, a2 = jnp.maximum(size(d1), 1e-8), jnp.maximum(size(d2), 1e-8)
        alpha = jnp.clip(a1 / (a1 + a2), 0, alpha_max)[:, None]
        moved = jnp.clip((x1 + eta * d1) * (1 - alpha) + (x + eta * d2) * alpha, 0, 1)
        moved = jnp.where(moves[:, None], moved, x1)
        return state._replace(points=moved.reshape(state.points.shape))

    def distance(state, value, gradient, which):
        steepness = _SIZE[_DUAL[norm]](_rows(gradient))
        away = jnp.abs(value) / (1e-12 + steepness)
        return jnp.where(state.labels == which.astype(state.labels.dtype), jnp.inf, away)

    def check(state, logits):
        x, x1 = _rows(state.images), _rows(state.points)
        adversarial = jnp.argmax(logits, axis=1).astype(state.labels.dtype) != state.labels
        distance = size(x1 - x)
        better = adversarial & (distance < state.norm_best)
        back = jnp.where(adversarial[:, None], x + (x1 - x) * beta, x1)
        return state._replace(
            points=back.reshape(state.points.shape),
            iteration=state.iteration + 1,
            adv=jnp.where(better[:, None], x1, _rows(state.adv)).reshape(state.adv.shape),
            norm_best=jnp.where(better, distance, state.norm_best),
        )

    return Machine(
        init=init,
        query=lambda state: state.points,
        loss=loss_of,
        tell=tell,
        finished=lambda state: state.iteration >= state.steps,
        result=lambda state: state.adv,
        check=check,
        counts=lambda state: size(_rows(state.points) - _rows(state.images)) <= state.epsilon,
        distance=None if targeted else distance,
    )


def nearest(
    machine: Machine, state: Any, values: Array, pull: Callable[[Array], tuple[Array]]
) -> tuple[Array, Array]:
    """What `tell` of a machine with a `distance` is given, from the values f[B, C] of its loss.

    Class by class: neither the program nor what it keeps grows with their number. For 1,000 classes
    at 224 px their gradients would take 0.6 GB an image.

    Args:
      pull: of `jax.vjp`, from the values to the points.
    Returns:
      f[B, ...] and i32[B].
    """

    def closer(best, which):
        (gradient,) = pull(jnp.zeros_like(values).at[:, which].set(1))
        distance = machine.distance(state, values[:, which], gradient, which)
        # As of `argmin`: NaN is the least.
        wins = (distance < best[0]) | (jnp.isnan(distance) & ~jnp.isnan(best[0]))
        new = distance, gradient, jnp.full_like(best[2], which)
        select = lambda a, b: jnp.where(per_image(wins, a), a, b)  # noqa: E731
        return jax.tree.map(select, new, best), None

    far = jnp.full_like(values[:, 0], jnp.inf), jnp.zeros_like(machine.query(state))
    classes = jnp.arange(values.shape[1], dtype=jnp.int32)
    none = jnp.zeros_like(values[:, 0], jnp.int32)
    (_, gradient, which), _ = jax.lax.scan(closer, (*far, none), classes)
    return gradient, which


def project_onto_hyperplane(points: Array, normals: Array, offsets: Array, *, norm: str) -> Array:
    """The shortest way from points in the box [0, 1] to a hyperplane, inside the box.

    Args:
      points: f[B, d] in [0, 1].
      normals: f[B, d]; entries of size up to 1e-8 count as 0 on L2 and L1.
      offsets: f[B]; the hyperplane is {z | <normal, z> = offset}.
      norm: "linf", "l2" or "l1", in which the way is measured.
    Returns:
      f[B, d], to be added to the points. Where the box does not reach the hyperplane: the way to
      its nearest corner.
    Raises:
      ValueError: an unknown norm.
    Source: Croce & Hein 2020 (arXiv 1907.02044), section 2.2; parity: tests/test_fab.py.
    """
    if norm not in _MOVES:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(_MOVES)}")
    return _displacement(points, normals, jnp.sum(normals * points, axis=1) - offsets, norm)


def _displacement(points: Array, normals: Array, excess: Array, norm: str) -> Array:
    """As above, from `excess` f[B] = <normal, point> - offset, better known than the offset."""
    # Every entry can only move down along the normal, as far as its room to the box.
    normals = jnp.where((excess >= 0)[:, None], normals, -normals)
    room = jnp.where(normals > 0, points, 1 - points)
    moves = _MOVES[norm](jnp.abs(normals), room, jnp.abs(excess))
    return jnp.where(normals > 0, -moves, jnp.where(normals < 0, moves, 0))


def _moves_linf(sizes, room, excess):
    level = _level(1.0, sizes, room, excess)
    return jnp.minimum(level[:, None], room)


def _moves_l2(sizes, room, excess):
    sizes = jnp.where(sizes > 1e-8, sizes, 0)
    level = _level(sizes, sizes, room, excess)
    return jnp.minimum(level[:, None] * sizes, room)


def _level(speed, sizes, room, excess):
    """The level f[B] at which sum(sizes * min(level * speed, room)) is the excess.

    The sum is concave and piecewise linear in the level, so Newton's method climbs to the root
    from below and has reached it when no further entry runs out of room: few passes, no sort.
    """

    def body(carry):
        passes, level, _ = carry
        free = level[:, None] * speed < room
        # Selected first, multiplied then: XLA would store products that no loop changes.
        slope = jnp.sum(jnp.where(free, sizes, 0) * speed, axis=1)
        held = jnp.sum(jnp.where(free, 0, room) * sizes, axis=1)
        higher = jnp.where(slope > 0, jnp.minimum((excess - held) / slope, _FAR), _FAR)
        return passes + 1, jnp.maximum(level, higher), higher > level

    def unfinished(carry):
        passes, _, climbs = carry
        return jnp.any(climbs) & (passes < 64)

    # As if all entries had room for ever.
    level = jnp.minimum(excess / jnp.maximum(jnp.sum(sizes * speed, axis=1), 1e-30), _FAR)
    start = 0, level, jnp.ones_like(excess, bool)
    return jax.lax.while_loop(unfinished, body, start)[1]


class _Cut(NamedTuple):
    """The entries larger than `size` f[B], by how much they can move to the plane, their number."""

    size: Array
    gain: Array
    number: Array


def _moves_l1(sizes, room, excess):
    """Entries move into their corner in order of size; the last one as far as needed.

    Bisects the sizes, instead of a sort, until a single entry, or equal ones, are left between
    the cut `upper`, whose entries move fully, and `lower`, whose entries are more than enough.
    """
    sizes = jnp.where(sizes > 1e-8, sizes, 0)
    gains = sizes * room

    def cut(size):
        chosen = (sizes > size[:, None]).astype(sizes.dtype)
        return _Cut(size, jnp.sum(chosen * gains, axis=1), jnp.sum(chosen, axis=1))

    def middle(lower, upper):
        return lower.size + (upper.size - lower.size) / 2

    def body(carry):
        lower, upper = carry
        new = cut(middle(lower, upper))
        select = partial(jnp.where, new.gain > excess)
        return jax.tree.map(select, new, lower), jax.tree.map(select, upper, new)

    def unfinished(carry):
        lower, upper = carry
        between = middle(lower, upper)
        several = lower.number > upper.number + 1
        return jnp.any(several & (between > lower.size) & (between < upper.size))

    lower, upper = cut(jnp.zeros_like(excess)), cut(jnp.max(sizes, axis=1))
    in_reach = lower.gain > excess  # or else all move fully
    upper = jax.tree.map(partial(jnp.where, in_reach), upper, lower)
    lower, upper = jax.lax.while_loop(unfinished, body, (lower, upper))
    mass = lower.gain - upper.gain
    share = jnp.clip((excess - upper.gain) / jnp.where(mass > 0, mass, 1), 0, 1)
    last = jnp.where(sizes > lower.size[:, None], share[:, None] * room, 0)
    return jnp.where(sizes > upper.size[:, None], room, last)


_MOVES = {"linf": _moves_linf, "l2": _moves_l2, "l1": _moves_l1}
_SIZE = {
    "linf": lambda rows: jnp.max(jnp.abs(rows), axis=1),
    "l2": balls.l2_norm,
    "l1": balls.l1_norm,
}
_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


def _rows(images):
    """Flat rows [B, d]: XLA's CPU loops over a last axis of 3 channels are 20 times slower."""
    return images.reshape(images.shape[0], -1)


def _sample(keys, images, epsilon, *, norm):
    draw = jax.random.uniform if norm == "linf" else jax.random.normal
    return place_start(balls._draw(draw, keys, images), images, epsilon, norm=norm)


def place_start(draw: Array, images: Array, epsilon: Array, *, norm: str) -> Array:
    """The start that AutoAttack's FAB makes of a draw: at half the radius.

    Args:
      draw: f[B, ...], from U[0, 1) on Linf, else from N(0, 1).
      images: f[B, ...].
      epsilon: f[B].
      norm: "linf", "l2" or "l1".
    """
    direction = 2 * draw - 1 if norm == "linf" else draw
    length = per_image(_SIZE[norm](_rows(direction)), draw)
    return jnp.clip(images + per_image(epsilon, draw) * direction / length * 0.5, 0, 1)


def _check_own_settings(alpha_max, eta, beta):
    for name, value, least, most in (
        ("alpha_max", alpha_max, 0, 1),
        ("eta", eta, 1, math.inf),
        ("beta", beta, 0, 1),
    ):
        if not least <= _number(name, value) <= most:
            raise ValueError(f"{name}={value} is outside [{least}, {most}]; pass a number in it")
