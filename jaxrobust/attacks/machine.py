"""One step of any machine (`types.Machine`), and the plain loop around it.

The other loop is `jaxrobust.evaluation.engine.engine`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust import types as t
from jaxrobust.attacks.geometry.balls import per_image
from jaxrobust.attacks.inputs import Noise, check_array, check_classes, image_keys
from jaxrobust.attacks.refused_network import of_one_image, remedy


class MachineStep(NamedTuple):
    """What one step of a machine queried and was told."""

    state: Any  # after it
    queried: Any  # the state whose points may be adversarial examples
    points: t.Points  # those points
    logits: t.Logits  # theirs
    gradient: Any  # as `tell` was given it
    votes: Any = None  # the sum of `tally` over all draws


def _wrong(logits: t.Logits, labels: t.Labels) -> t.PerImage:
    right = (jnp.argmax(logits, axis=1) == labels) & jnp.isfinite(logits).all(axis=1)
    return 1 - right.astype(jnp.float32)


def _lead(probabilities: t.Logits, labels: t.Labels) -> t.PerImage:
    is_label = jax.nn.one_hot(labels, probabilities.shape[1], dtype=bool)
    others = jnp.where(is_label, -jnp.inf, probabilities).max(axis=1)
    lead = others - jnp.where(is_label, probabilities, 0).sum(axis=1)
    return jnp.where(jnp.isnan(lead), 0, lead)  # no answer counts as wrong, and no better than that


class Tally(NamedTuple):
    """What the draws of a randomised network say of a point."""

    of: Callable[[t.Logits, t.Labels], t.Array]  # of one draw, f[B, ...]
    excess: Callable[[t.Array, t.Labels], t.PerImage]  # of the mean over draws; 0 or more is wrong


# By the name of a rule, how the draws of a randomised network are judged together.
TALLIES = {
    "majority": Tally(_wrong, lambda share, labels: share - 0.5),
    "mean": Tally(lambda logits, labels: jax.nn.softmax(logits, axis=1), _lead),
}


def advance(
    machine: t.Machine,
    network: Callable[[t.Array, Any], t.Array],
    state: Any,
    *,
    draws: int = 1,
    gradient: bool = True,
    tally: Callable[[t.Logits], t.Array] | None = None,
) -> MachineStep:
    """Query, evaluate, tell and, if the machine has one, check.

    Args:
      network: (points, draw) -> f[B, C]; `draw` numbers the calls of a step, for a network that
        draws random numbers itself.
      draws: calls over which the gradient is averaged.
      gradient: False for an evaluation after which no step is made: the machine is told zeros.
      tally: a function of logits to sum up over all draws, of a machine with a gradient.
    """
    points, votes = machine.query(state), None
    if machine.loss is None:
        logits, slope = network(points, 0), None
    elif gradient:
        logits, slope, votes = _differentiated(machine, network, state, points, draws, tally)
    else:
        logits, slope = network(points, 0), jnp.zeros_like(points)
    after = machine.tell(state, logits, slope)
    if machine.check is None:
        return MachineStep(after, state, points, logits, slope, votes)
    points = machine.query(after)
    logits = network(points, draws)
    return MachineStep(machine.check(after, logits), after, points, logits, slope)


def _differentiated(
    machine: t.Machine, network: Any, state: Any, points: t.Points, draws: int, tally: Any
) -> tuple[t.Logits, Any, Any]:
    """Compute the logits of the last draw, the mean gradient for `tell`, and the votes."""
    loss_of = machine.loss
    assert loss_of is not None

    def once(draw: Any) -> tuple[t.Logits, Any]:
        def losses(points: t.Points) -> tuple[t.PerImage | t.Logits, t.Logits]:
            logits = network(points, draw)
            return loss_of(state, logits), logits

        values, pull, logits = jax.vjp(losses, points, has_aux=True)
        if values.ndim == 2:
            return logits, nearest(machine, state, values, pull)
        # That of the sum, not of the mean: an image must not know the batch size.
        return logits, pull(jnp.ones_like(values))[0]

    logits, total = once(0)
    votes = None if tally is None else tally(logits)
    if draws == 1:
        return logits, total, votes

    def add(draw: Any, carry: Any) -> Any:
        logits, gradient = once(draw)
        return logits, carry[1] + gradient, None if tally is None else carry[2] + tally(logits)

    logits, total, votes = jax.lax.fori_loop(1, draws, add, (logits, total, votes))
    return logits, total / draws, votes


def nearest(
    machine: t.Machine, state: Any, values: t.Logits, pull: Callable[[t.Array], tuple[t.Array]]
) -> tuple[t.Points, t.Labels]:
    """Choose the pair that `tell` of a machine with a `distance` takes, by the losses f[B, C].

    Class by class: neither the program nor what it keeps grows with their number. For 1,000 classes
    at 224 px their gradients would take 0.6 GB an image. `pull` is that of `jax.vjp`, from the
    values to the points.
    """
    distance_of = machine.distance
    assert distance_of is not None

    def closer(best: Any, class_: Any) -> Any:
        (gradient,) = pull(jnp.zeros_like(values).at[:, class_].set(1))
        distance = distance_of(state, values[:, class_], gradient, class_)
        # As of `argmin`: NaN is the least.
        wins = (distance < best[0]) | (jnp.isnan(distance) & ~jnp.isnan(best[0]))
        new = distance, gradient, jnp.full_like(best[2], class_)
        select = lambda a, b: jnp.where(per_image(wins, a), a, b)  # noqa: E731
        return jax.tree.map(select, new, best), None

    far = jnp.full_like(values[:, 0], jnp.inf), jnp.zeros_like(machine.query(state))
    classes = jnp.arange(values.shape[1], dtype=jnp.int32)
    none = jnp.zeros_like(values[:, 0], jnp.int32)
    (_, gradient, class_), _ = jax.lax.scan(closer, (*far, none), classes)
    return gradient, class_


def run(
    machine: t.Machine,
    logits_fn: t.LogitsFn,
    state: Any,
    *,
    gradient_steps: int,
    final_forward: bool = False,
) -> Any:
    """Drive a machine to its end and return its state.

    Args:
      logits_fn: f[B,H,W,C] -> f[B,C]; differentiated with respect to the images only.
      gradient_steps: steps with a gradient, one scan, compiled once whatever their number.
      final_forward: one more evaluation, without a gradient (the machine is told zeros).
    """
    network = checked(logits_fn, state)

    def step(state: Any, _: None) -> tuple[Any, None]:
        return advance(machine, network, state).state, None

    state, _ = jax.lax.scan(step, state, None, length=gradient_steps)
    if final_forward:
        state = advance(machine, network, state, gradient=False).state
    return state


def checked(logits_fn: t.LogitsFn, state: Any) -> Callable[[t.Array, Any], t.Array]:
    """Wrap a network for `advance`; `ValueError` where it cannot be called, or lacks a class."""

    def network(points: t.Images, draw: Any) -> t.Logits:
        image = jax.ShapeDtypeStruct(points.shape[1:], points.dtype)
        try:
            logits = logits_fn(points)
        except Exception as error:
            if words := remedy(error) or of_one_image(logits_fn, image):
                raise ValueError(f"logits_fn {words}") from error
            raise
        if jnp.ndim(logits) < 2 and (words := of_one_image(logits_fn, image)):
            raise ValueError(f"logits_fn {words}")
        for name in ("labels", "targets"):
            check_classes(name, getattr(state, name, None), logits.shape[1])
        return logits

    return network


def as_attack(
    machine: t.Machine,
    *,
    random_start: bool | Noise,
    drive: Callable[..., Any] = run,
    **settings: Any,
) -> t.Attack:
    """Make an attack of a machine and what drives it; an empty batch is returned unchanged."""

    def attack(
        logits_fn: t.LogitsFn, key: t.Array | None, images: t.GivenImages, labels: t.Array
    ) -> t.Images:
        check_array("images", images)
        images = jnp.asarray(images)
        if images.shape[0] == 0:
            return images
        keys = image_keys(key, images.shape[0]) if random_start else None
        start: Any = random_start
        if not isinstance(random_start, Noise):
            start = "random" if random_start else "image"
        state = machine.init(images, labels, keys=keys, start=start)
        return machine.result(drive(machine, logits_fn, state, **settings))

    return attack
