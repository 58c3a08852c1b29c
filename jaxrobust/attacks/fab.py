"""FAB: the nearest misclassified point, found by projecting onto linearised decision boundaries.

Unlike the other attacks it does not stay in a ball: it shrinks the norm of an adversarial example,
and the radius is read only by its random start and by `counts`.

Source: Croce & Hein 2020 (arXiv 1907.02044), algorithm 1; FAB-T is section 4 of Croce & Hein 2020
(arXiv 2003.01690). Details that the papers leave open follow auto-attack a392200, which has no
final line search; parity: tests/attacks/test_fab.py.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxrobust.attacks.geometry import balls
from jaxrobust.attacks.geometry.balls import per_image, where
from jaxrobust.attacks.geometry.hyperplanes import displacement
from jaxrobust.attacks.inputs import (
    check_inputs,
    check_settings,
    image_keys,
    start_points,
)
from jaxrobust.attacks.machine import as_attack, run
from jaxrobust.attacks.registry import Facts, Named, Row, add
from jaxrobust.types import (
    Array,
    Attack,
    Counts,
    GivenImages,
    Keys,
    Labels,
    Logits,
    LogitsFn,
    Machine,
    PerImage,
    Points,
    Start,
    check_number,
)

_SIZE = {
    "linf": lambda rows: jnp.max(jnp.abs(rows), axis=1),
    "l2": balls.l2_norm,
    "l1": balls.l1_norm,
}
_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


class FabState(NamedTuple):
    """The state of FAB; the first axis of every array is the image, so slots can be refilled.

    All settings that users may vary from image to image live here, as in `ApgdState`.
    """

    images: Points  # in [0, 1]
    labels: Labels
    targets: Labels  # read by the targeted attack only
    epsilon: PerImage  # read by `counts` only
    steps: Counts
    points: Points  # to be evaluated next: with gradient for `tell`, then without for `check`
    iteration: Counts  # checks told so far
    adv: Points  # the misclassified point of smallest norm so far, the image if there is none
    norm_best: PerImage  # its distance to the image; infinite if there is none


def fab_run(
    logits_fn: LogitsFn,
    images: GivenImages,
    labels: Array,
    *,
    norm: str,
    epsilon: float,
    steps: int = 100,
    targets: Array | None = None,
    key: Array | None = None,
    start: Start = "image",
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> FabState:
    """Run FAB once; return the whole final state.

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
    state = machine.init(images, labels, keys=keys, targets=targets, start=start)
    return run(machine, logits_fn, state, gradient_steps=steps, final_forward=False)


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
    """Return FAB as a `types.Machine` of `steps` pairs of a gradient and a check.

    Arguments as in `fab_run`. Targeted, `loss` is f[B]; otherwise f[B, C], the boundary with each
    class.
    `result` is `adv`. A driver must not `tell` a finished image: nothing here stops it.

    Raises:
      ValueError: settings outside their range, labels that are not classes, no targets where
        they are needed.
    """
    check_settings(norm=norm, epsilon=epsilon, loss="ce", steps=steps)
    _check_own_settings(alpha_max, eta, beta)
    ball = balls.GEOMETRIES[norm]._replace(sample=partial(_sample, norm=norm))
    size = _SIZE[norm]

    def init(
        images: Any, labels: Any, *, keys: Any = None, targets: Any = None, start: Start = "image"
    ) -> FabState:
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

    def loss_of(state: FabState, logits: Logits) -> PerImage | Logits:
        logits = logits.astype(state.epsilon.dtype)
        own = jnp.take_along_axis(logits, state.labels[:, None], axis=1)
        if targeted:
            return (jnp.take_along_axis(logits, state.targets[:, None], axis=1) - own)[:, 0]
        return logits - own

    def tell(state: FabState, logits: Logits, gradient: Any) -> FabState:
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
        d1, d2 = displacement(x1, w, value, norm), displacement(x, w, excess, norm)
        a1, a2 = jnp.maximum(size(d1), 1e-8), jnp.maximum(size(d2), 1e-8)
        alpha = jnp.clip(a1 / (a1 + a2), 0, alpha_max)[:, None]
        moved = jnp.clip((x1 + eta * d1) * (1 - alpha) + (x + eta * d2) * alpha, 0, 1)
        moved = jnp.where(moves[:, None], moved, x1)
        return state._replace(points=moved.reshape(state.points.shape))

    def distance(state: FabState, value: PerImage, gradient: Points, which: Array) -> PerImage:
        steepness = _SIZE[_DUAL[norm]](_rows(gradient))
        away = jnp.abs(value) / (1e-12 + steepness)
        return jnp.where(state.labels == which.astype(state.labels.dtype), jnp.inf, away)

    def check(state: FabState, logits: Logits) -> FabState:
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


def _rows(images: Points) -> Float[Array, "B d"]:
    """Return rows [B, d]: XLA's CPU loops over a last axis of 3 channels are 20 times slower."""
    return images.reshape(images.shape[0], -1)


def _sample(keys: Keys, images: Points, epsilon: PerImage, *, norm: str) -> Points:
    draw = jax.random.uniform if norm == "linf" else jax.random.normal
    return place_start(balls.draw(draw, keys, images), images, epsilon, norm=norm)


def place_start(draw: Points, images: Points, epsilon: PerImage, *, norm: str) -> Points:
    """Return the start that AutoAttack's FAB makes of a draw: at half the radius.

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
        if not least <= check_number(name, value) <= most:
            raise ValueError(f"{name}={value} is outside [{least}, {most}]; pass a number in it")


def fab(
    *,
    norm: str = "linf",
    epsilon: float,
    steps: int = 100,
    random_start: bool = False,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Attack:
    """Return untargeted FAB as an attack: the nearest misclassified point, if the ball holds it.

    An image for which nothing was found inside the ball comes back as it is, clipped to [0, 1].
    Arguments as in `fab_run`.
    Returns:
      attack(logits_fn, key, images, labels i32[B]) -> images_adv. `key` is one key, or keys [B];
      without a random start it is not read and may be None.
    Raises:
      ValueError: see `fab_machine`.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda x: x.mean((1, 2)) @ jnp.array([[1.0, 0.0]]) + jnp.array([0, 0.4])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> attack = fab(norm="linf", epsilon=0.25, steps=5)
    >>> images_adv = attack(logits_fn, jax.random.key(0), images, labels)
    >>> int(logits_fn(images_adv).argmax())
    1
    """
    own = {"alpha_max": alpha_max, "eta": eta, "beta": beta}
    machine = fab_machine(norm=norm, epsilon=epsilon, steps=steps, targeted=False, **own)

    def result(state: FabState) -> Points:
        return where(state.norm_best <= state.epsilon, state.adv, state.images)

    return as_attack(
        machine._replace(result=result),
        random_start=random_start,
        gradient_steps=steps,
        final_forward=False,
    )


_FACTS = Facts(
    machine="fab",
    make=lambda setting, epsilon: fab_machine(
        norm=setting.norm, epsilon=epsilon, steps=setting.steps, targeted=setting.targets > 0
    ),
    rule="to the nearest linearised boundary",
    starts=("image", "random"),
    aims=True,
    forward=2,
    each_class=True,
    extra=0,
    least={"steps": 1, "restarts": 1, "targets": 1},
)
add(
    _FACTS,
    Row("fab", "FAB, which looks for the nearest point", _FACTS, Named(3, 100, restarts=5)),
    Row("fab-t", "FAB towards one class after the other", _FACTS, Named(4, 100, targets=9)),
)
