"""FAB: find the nearest misclassified point by projecting onto linearized decision boundaries.

Unlike the other attacks it does not stay in a ball: it minimizes the norm of an adversarial
example, and uses the radius only for its random start and in `counts`.

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

from jaxrobust import types as t
from jaxrobust.attacks import inputs
from jaxrobust.attacks.geometry import balls
from jaxrobust.attacks.geometry.balls import per_image, where
from jaxrobust.attacks.geometry.hyperplanes import displacement
from jaxrobust.attacks.losses import is_right
from jaxrobust.attacks.machine import as_attack, run
from jaxrobust.attacks.registry import MachineFacts, NamedAttack, StandardSettings, add
from jaxrobust.runtime.text import spelling

_SIZE = {"linf": balls.linf_norm, "l2": balls.l2_norm, "l1": balls.l1_norm}
_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
_RANGES = {"alpha_max": (0, 1), "eta": (1, math.inf), "beta": (0, 1)}


class FabState(NamedTuple):
    """The state of FAB, including settings, like `ApgdState`; the first axis is the image."""

    images: t.Points  # in [0, 1]
    labels: t.Labels
    targets: t.Labels  # used only by the targeted attack
    epsilon: t.PerImage  # used only by `counts`
    steps: t.Counts
    points: t.Points  # to evaluate next: with gradient for `tell`, then without for `check`
    iteration: t.Counts  # checks told so far
    adv: t.Points  # the misclassified point of smallest norm so far, or the image
    norm_best: t.PerImage  # its distance to the image; infinite if there is none


def fab_run(
    logits_fn: t.LogitsFn,
    images: t.GivenImages,
    labels: t.Array,
    *,
    norm: str,
    epsilon: float,
    steps: int = 100,
    targets: t.Array | None = None,
    key: t.Array | None = None,
    start: t.Start = "image",
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> FabState:
    """Run FAB once; return the full final state.

    Args:
      images: f[B,H,W,C], clipped to [0, 1]; intended for correctly classified images.
      norm: "linf", "l2" or "l1".
      epsilon: radius of the random start, in units of pixels in [0, 1].
      steps: K >= 1; costs 2K forward and K backward passes; untargeted, K times C backward passes.
      targets: i32[B], for each image the class whose boundary with the label is approached; None:
        the class with the nearest boundary.
      key: one key or keys [B], used only by the random start.
      start: "image", "random", or points f[B,H,W,C].
      alpha_max: maximum weight of the image's own projection, which pulls back towards the image.
      eta: factor by which each projection overshoots the boundary.
      beta: share of its distance that an adversarial point keeps in the backward step.
    Returns:
      `FabState`: `adv`, `norm_best` and the rest.
    """
    ranges = {"alpha_max": alpha_max, "eta": eta, "beta": beta}
    aims = targets is not None
    machine = fab_machine(norm=norm, epsilon=epsilon, steps=steps, targeted=aims, **ranges)
    keys = None if key is None else inputs.image_keys(key, len(images))
    state: FabState = machine.init(images, labels, keys=keys, targets=targets, start=start)
    return run(machine, logits_fn, state, gradient_steps=steps)


def fab_machine(
    *,
    norm: str,
    epsilon: float | t.Array,
    steps: int = 100,
    targeted: bool = True,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> t.Machine:
    """Make a `types.Machine` for FAB: `steps` pairs of gradient and check; `result` is `adv`.

    Arguments as in `fab_run`. If targeted, `loss` is f[B], otherwise f[B, C], for the boundary with
    each class. A driver must not `tell` a finished image; this is not checked.
    """
    norm = spelling.norm(norm)
    inputs.check_settings(norm=norm, epsilon=epsilon, steps=steps)
    _check_ranges(alpha_max=alpha_max, eta=eta, beta=beta)
    ball = balls.GEOMETRIES[norm]._replace(sample=partial(_sample, norm=norm))
    size = _SIZE[norm]

    def init(
        images: Any, labels: Any, *, keys: Any = None, targets: Any = None, start: t.Start = "image"
    ) -> FabState:
        images, labels = inputs.check_inputs(images, labels)
        inputs.check_radii(epsilon, images)
        if labels.ndim != 1:
            raise ValueError(
                f"FAB needs class labels i32[B], got shape {labels.shape}; pass labels.argmax(1)"
            )
        if targeted and targets is None:
            raise ValueError("targeted FAB needs targets i32[B]; pass targets=...")
        targets = jnp.zeros_like(labels) if targets is None else targets
        images = jnp.clip(images, 0, 1)
        floats, integers = inputs.fillers(images)
        return FabState(
            images=images,
            labels=labels,
            targets=inputs.target_classes(targets, len(images)),
            epsilon=floats(epsilon),
            steps=integers(steps),
            points=jnp.clip(inputs.start_points(ball, start, images, floats(epsilon), keys), 0, 1),
            iteration=integers(0),
            adv=images,
            norm_best=floats(jnp.inf),
        )

    def loss_of(state: FabState, logits: t.Logits) -> t.PerImage | t.Logits:
        logits = logits.astype(state.epsilon.dtype)
        label_logit = jnp.take_along_axis(logits, state.labels[:, None], axis=1)
        if targeted:
            return (jnp.take_along_axis(logits, state.targets[:, None], axis=1) - label_logit)[:, 0]
        return logits - label_logit

    def tell(state: FabState, value: t.PerImage, score: Any, gradient: t.Points) -> FabState:
        x, x1, w = _rows(state.images), _rows(state.points), _rows(gradient)
        # The linearized boundary is {z | value + <w, z - x1> = 0}; how far beyond it is the image?
        excess = value + jnp.sum(w * (x - x1), axis=1)
        moves = jnp.isfinite(excess)  # otherwise the gradient is not finite
        value, excess = jnp.where(moves, value, 0), jnp.where(moves, excess, 0)
        w = jnp.where(moves[:, None], w, 0)
        # Project both onto it, and choose a point in between: the closer the image's own projection
        # is, the closer to that.
        d1, d2 = displacement(x1, w, value, norm), displacement(x, w, excess, norm)
        a1, a2 = jnp.maximum(size(d1), 1e-8), jnp.maximum(size(d2), 1e-8)
        alpha = jnp.clip(a1 / (a1 + a2), 0, alpha_max)[:, None]
        moved = jnp.clip((x1 + eta * d1) * (1 - alpha) + (x + eta * d2) * alpha, 0, 1)
        moved = jnp.where(moves[:, None], moved, x1)
        return state._replace(points=moved.reshape(state.points.shape))

    def distance(
        state: FabState, value: t.PerImage, gradient: t.Points, class_: t.Array
    ) -> t.PerImage:
        steepness = _SIZE[_DUAL[norm]](_rows(gradient))
        away = jnp.abs(value) / (1e-12 + steepness)
        return jnp.where(state.labels == class_.astype(state.labels.dtype), jnp.inf, away)

    def check(state: FabState, score: t.PerImage) -> FabState:
        x, x1, adversarial = _rows(state.images), _rows(state.points), score <= 0
        distance = size(x1 - x)
        better = adversarial & (distance < state.norm_best)
        back = jnp.where(adversarial[:, None], x + (x1 - x) * beta, x1)
        return state._replace(
            points=back.reshape(state.points.shape),
            iteration=state.iteration + 1,
            adv=jnp.where(better[:, None], x1, _rows(state.adv)).reshape(state.adv.shape),
            norm_best=jnp.where(better, distance, state.norm_best),
        )

    return t.Machine(
        init=init,
        query=lambda state: state.points,
        loss=loss_of,
        tell=tell,
        finished=lambda state: state.iteration >= state.steps,
        result=lambda state: state.adv,
        score=lambda state, logits: is_right(logits, state.labels),
        check=check,
        counts=lambda state: size(_rows(state.points) - _rows(state.images)) <= state.epsilon,
        distance=None if targeted else distance,
    )


def _rows(images: t.Points) -> Float[t.Array, "B d"]:
    """Reshape to [B, d]: XLA's CPU loops over a last axis of 3 channels are 20 times slower."""
    return images.reshape(images.shape[0], -1)


def _sample(keys: t.Keys, images: t.Points, epsilon: t.PerImage, *, norm: str) -> t.Points:
    draw = jax.random.uniform if norm == "linf" else jax.random.normal
    return place_start(balls.draw(draw, keys, images), images, epsilon, norm=norm)


def place_start(draw: t.Points, images: t.Points, epsilon: t.PerImage, *, norm: str) -> t.Points:
    """Turn draws from U[0, 1) (Linf) or N(0, 1) into AutoAttack's start, at half the radius."""
    direction = 2 * draw - 1 if norm == "linf" else draw
    length = per_image(_SIZE[norm](_rows(direction)), draw)
    return jnp.clip(images + per_image(epsilon, draw) * direction / length * 0.5, 0, 1)


def _check_ranges(**settings: float) -> None:
    for name, value in settings.items():
        least, most = _RANGES[name]
        if not least <= t.check_number(name, value) <= most:
            raise ValueError(
                f"{name}={value} is outside [{least}, {most}]; pass a number in this range"
            )


def fab(
    *,
    norm: str = "linf",
    epsilon: float,
    steps: int = 100,
    random_start: bool = False,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    loss: None = None,
) -> t.Attack:
    """Make an untargeted FAB attack: it returns the nearest misclassified point inside the ball.

    Without such a point, the image is returned unchanged, clipped to [0, 1]. Arguments as in
    `fab_run`; `key` may be None without a random start. FAB does not accept a `loss`.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda x: x.mean((1, 2)) @ jnp.array([[1.0, 0.0]]) + jnp.array([0, 0.4])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> attack = fab(norm="linf", epsilon=0.25, steps=5)
    >>> images_adv = attack(logits_fn, jax.random.key(0), images, labels)
    >>> int(logits_fn(images_adv).argmax())
    1
    """
    if loss is not None:
        raise ValueError(
            "FAB does not accept a loss, because it follows the boundaries between classes; for "
            "another loss or task, use attacks.apgd(loss=...)"
        )
    ranges = {"alpha_max": alpha_max, "eta": eta, "beta": beta}
    machine = fab_machine(norm=norm, epsilon=epsilon, steps=steps, targeted=False, **ranges)

    def result(state: FabState) -> t.Points:
        return where(state.norm_best <= state.epsilon, state.adv, state.images)

    machine = machine._replace(result=result)
    return as_attack(machine, random_start=random_start, gradient_steps=steps)


_FACTS = MachineFacts(
    machine="fab",
    make=lambda setting, epsilon: fab_machine(
        norm=setting.norm, epsilon=epsilon, steps=setting.steps, targeted=setting.targets > 0
    ),
    rule="to the nearest linearized boundary",
    starts=("image", "random"),
    aims=True,
    forward=2,
    each_class=True,
    extra=0,
    least={"steps": 1, "restarts": 1, "targets": 1},
)
add(
    _FACTS,
    NamedAttack(
        "fab",
        "FAB, which looks for the nearest adversarial point",
        _FACTS,
        StandardSettings(3, 100, restarts=5),
    ),
    NamedAttack(
        "fab-t",
        "targeted FAB, one class after another",
        _FACTS,
        StandardSettings(4, 100, targets=9),
    ),
)
