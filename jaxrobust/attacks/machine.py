"""One step of any machine (`types.Machine`), and the plain loop that repeats it.

The other loop is `jaxrobust.evaluation.engine.engine`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxrobust import types as t
from jaxrobust.attacks.geometry.balls import per_image
from jaxrobust.attacks.inputs import Noise, check_array, check_classes, image_keys
from jaxrobust.attacks.refused_network import as_function, called, of_one_image

State = TypeVar("State")  # of a machine


class MachineStep(NamedTuple):
    """What one step of a machine queried, and what it was told."""

    state: Any  # after it
    queried: Any  # the state whose points may be adversarial examples
    points: t.Points  # the points
    outputs: Any  # the network's outputs for them
    gradient: Any  # as passed to `tell`
    votes: Any = None  # the sum of `tally` over all draws


class AttackInfo(NamedTuple):
    """The outcome of an attack; the first axis of every array is the image."""

    loss: t.PerImage  # of the returned points
    score: t.PerImage | None  # of the returned points; None: the loss is a function without a score
    steps: t.Counts  # evaluations of each image


def _wrong(logits: t.Logits, labels: t.Labels) -> t.PerImage:
    right = (jnp.argmax(logits, axis=1) == labels) & jnp.isfinite(logits).all(axis=1)
    return 1 - right.astype(jnp.float32)


def _lead(probabilities: t.Logits, labels: t.Labels) -> t.PerImage:
    is_label = jax.nn.one_hot(labels, probabilities.shape[1], dtype=bool)
    others = jnp.where(is_label, -jnp.inf, probabilities).max(axis=1)
    lead = others - jnp.where(is_label, probabilities, 0).sum(axis=1)
    return jnp.where(jnp.isnan(lead), 0, lead)  # NaN counts as wrong, and no better than that


class Tally(NamedTuple):
    """How to judge a point from several draws of a randomized network."""

    of: Callable[[t.Logits, t.Labels], t.Array]  # per draw, f[B, ...]
    excess: Callable[[t.Array, t.Labels], t.PerImage]  # of the mean over draws; 0 or more is wrong


# How the draws of a randomized network are judged together, by rule name.
TALLIES = {
    "majority": Tally(_wrong, lambda share, labels: share - 0.5),
    "mean": Tally(lambda logits, labels: jax.nn.softmax(logits, axis=1), _lead),
}


def advance(
    machine: t.Machine,
    network: Callable[[t.Array, Any], Any],
    state: Any,
    *,
    draws: int = 1,
    gradient: bool = True,
    tally: Callable[[Any], t.Array] | None = None,
) -> MachineStep:
    """Query, evaluate, tell and, if the machine has a check, check.

    Args:
      network: (points, draw) -> outputs; `draw` numbers the calls in a step, for a network that
        draws random numbers itself.
      draws: number of calls over which the gradient is averaged.
      gradient: False for an evaluation without a step; the machine is told zeros.
      tally: a function of outputs to sum over all draws, for a machine with a gradient.
    """
    points, votes = machine.query(state), None
    if machine.gradient and gradient:
        loss, outputs, slope, votes = _differentiated(machine, network, state, points, draws, tally)
    else:
        outputs = network(points, 0)
        loss = machine.loss(state, outputs)
        slope = jnp.zeros_like(points) if machine.gradient else None
    score = None if machine.score is None else machine.score(state, outputs)
    after = machine.tell(state, loss, score, slope)
    if machine.check is None:
        return MachineStep(after, state, points, outputs, slope, votes)
    assert machine.score is not None
    points = machine.query(after)
    outputs = network(points, draws)
    checked_state = machine.check(after, machine.score(after, outputs))
    return MachineStep(checked_state, after, points, outputs, slope)


def _differentiated(
    machine: t.Machine, network: Any, state: Any, points: t.Points, draws: int, tally: Any
) -> tuple[t.PerImage, Any, Any, Any]:
    """Compute the last draw's loss and outputs, the mean gradient for `tell`, and the votes."""

    def once(draw: Any) -> tuple[t.PerImage, Any, t.Points]:
        def losses(points: t.Points) -> tuple[t.PerImage | t.Logits, Any]:
            outputs = network(points, draw)
            return machine.loss(state, outputs), outputs

        values, pull, outputs = jax.vjp(losses, points, has_aux=True)
        if values.ndim == 2:
            loss, gradient = nearest(machine, state, values, pull)
        else:
            # The gradient of the sum, not the mean: an image must not depend on the batch size.
            loss, gradient = values, pull(jnp.ones_like(values))[0]
        return loss, outputs, gradient

    loss, outputs, total = once(0)
    votes = None if tally is None else tally(outputs)
    if draws == 1:
        return loss, outputs, total, votes

    def add(draw: Any, carry: Any) -> Any:
        loss, outputs, gradient = once(draw)
        votes = None if tally is None else carry[3] + tally(outputs)
        return loss, outputs, carry[2] + gradient, votes

    loss, outputs, total, votes = jax.lax.fori_loop(1, draws, add, (loss, outputs, total, votes))
    return loss, outputs, total / draws, votes


def nearest(
    machine: t.Machine, state: Any, values: t.Logits, pull: Callable[[t.Array], tuple[t.Array]]
) -> tuple[t.PerImage, t.Points]:
    """Choose from the losses f[B, C] the loss and gradient for `tell` of a `distance` machine.

    It works class by class, so neither the program nor its memory grows with their number: for
    1,000 classes at 224 px, the gradients would take 0.6 GB an image. `pull` is that of `jax.vjp`,
    from the values to the points.
    """
    distance_of = machine.distance
    assert distance_of is not None

    def closer(best: Any, class_: Any) -> Any:
        (gradient,) = pull(jnp.zeros_like(values).at[:, class_].set(1))
        loss = values[:, class_]
        distance = distance_of(state, loss, gradient, class_)
        # Like `argmin`, NaN counts as smallest.
        wins = (distance < best[0]) | (jnp.isnan(distance) & ~jnp.isnan(best[0]))
        select = lambda a, b: jnp.where(per_image(wins, a), a, b)  # noqa: E731
        return jax.tree.map(select, (distance, loss, gradient), best), None

    far = jnp.full_like(values[:, 0], jnp.inf), values[:, 0], jnp.zeros_like(machine.query(state))
    classes = jnp.arange(values.shape[1], dtype=jnp.int32)
    (_, loss, gradient), _ = jax.lax.scan(closer, far, classes)
    return loss, gradient


def run(
    machine: t.Machine,
    network: Any,
    state: State,
    *,
    gradient_steps: int,
    final_forward: bool = False,
) -> State:
    """Run a machine to its end and return its state.

    Args:
      network: f[B,H,W,C] -> outputs; differentiated with respect to the images only.
      gradient_steps: steps with a gradient, in one scan, compiled once for any number.
      final_forward: one more evaluation without a gradient (the machine is told zeros).
    """
    call = checked(machine, network, state)

    def step(state: Any, _: None) -> tuple[Any, None]:
        return advance(machine, call, state).state, None

    state, _ = jax.lax.scan(step, state, None, length=gradient_steps)
    if final_forward:
        state = advance(machine, call, state, gradient=False).state
    return state


def checked(machine: t.Machine, network: Any, state: Any) -> Callable[[t.Array, Any], Any]:
    """Wrap a network for `advance`; `ValueError` if it cannot be called, or does not fit."""
    function = as_function(network)

    def call(points: t.Images, draw: Any) -> Any:
        outputs = called(function, points, logits=machine.logits)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(outputs)]
        listed = ", ".join(map(str, shapes)) or "nothing"
        if machine.logits and len(getattr(outputs, "shape", ())) != 2:
            image = jax.ShapeDtypeStruct(points.shape[1:], points.dtype)
            if hasattr(outputs, "ndim") and (words := of_one_image(function, image)):
                raise ValueError(f"logits_fn {words}")
            is_tree = isinstance(outputs, dict | list | tuple)
            container = f" in a {type(outputs).__name__}" if is_tree else ""
            raise ValueError(
                f"logits_fn returns {listed}{container}, but this attack needs logits "
                "[B, C]; for another task, pass apgd a function (outputs, targets) -> f[B] as loss"
            )
        if not shapes or any(shape[:1] != points.shape[:1] for shape in shapes):
            raise ValueError(
                f"the network returns {listed} for {len(points)} images; return arrays whose first "
                "axis is the image"
            )
        if machine.logits:
            for name in ("labels", "targets"):
                check_classes(name, getattr(state, name, None), outputs.shape[1])
        return outputs

    return call


def as_attack(
    machine: t.Machine,
    *,
    random_start: bool | Noise,
    info: bool = False,
    drive: Callable[..., Any] = run,
    **settings: Any,
) -> t.Attack:
    """Turn a machine and its driver into an attack; an empty batch is returned unchanged.

    With `info` it returns `(images_adv, AttackInfo)`, which takes one more evaluation.
    """
    if not isinstance(random_start, bool | Noise):
        raise ValueError(f"random_start={random_start!r} must be True, False or attacks.Noise(...)")

    def attack(network: Any, key: t.Array | None, images: t.GivenImages, labels: Any) -> Any:
        check_array("images", images)
        images = jnp.asarray(images)
        if images.shape[0] == 0:
            none = jnp.zeros(0)
            return (images, AttackInfo(none, none, none.astype(int))) if info else images
        keys = image_keys(key, images.shape[0]) if random_start else None
        start: Any = random_start
        if not isinstance(random_start, Noise):
            start = "random" if random_start else "image"
        state = machine.init(images, labels, keys=keys, start=start)
        state = drive(machine, network, state, **settings)
        points = machine.result(state)
        if not info:
            return points
        outputs = checked(machine, network, state)(points, 0)
        score = None if machine.score is None else machine.score(state, outputs)
        return points, AttackInfo(machine.loss(state, outputs), score, state.iteration)

    return attack
