"""Sparse-PGD: ascent on a perturbation of all pixels and on a mask that selects some of them.

Each step moves the perturbation along the sign of its gradient, and the mask, a number per pixel,
along its normalized gradient. The pixels with the largest numbers change. After three steps that
left these pixels unchanged, the mask is redrawn.

Source: Zhong et al. 2024 (arXiv 2405.05075), algorithm 1. Details follow the authors' code
(CityU-MLO/sPGD a356d0c), with three differences. The three steps need not be consecutive, as in the
paper; the code restarts the count whenever no image of a batch keeps its pixels, which hardly ever
happens. The start may already fool the network. Pixels are ranked by the mask, not by its sigmoid,
which is 1 for large numbers.
Parity: tests/attacks/test_sparse_pgd.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxrobust import types as t
from jaxrobust.attacks import inputs
from jaxrobust.attacks.geometry.balls import l2_norm, largest_pixels, per_image, usable, where
from jaxrobust.attacks.geometry.square_proposals import KeyData
from jaxrobust.attacks.losses import Goal, goal_of
from jaxrobust.attacks.machine import as_attack
from jaxrobust.attacks.registry import MachineFacts, NamedAttack, StandardSettings, add
from jaxrobust.attacks.square import key_data, until_done

Numbers = Float[t.Array, "B H W 1"]  # of pixels
_STEP = 0.25  # of the perturbation; alpha in the paper
_MASK_STEP = 0.25  # of the mask, times the root of its size; beta
_PATIENCE = 3  # steps that leave the pixels unchanged before the mask is redrawn


class SparsePgdState(NamedTuple):
    """The state of Sparse-PGD; the first axis of every array is the image.

    States of two machines that differ only in `pixels` or `steps` may share a batch and `tell`.
    """

    images: t.Images  # in [0, 1]
    labels: Any  # i32[B], or the targets of a loss function
    pixels: t.Counts
    steps: t.Counts
    keys: KeyData
    iteration: t.Counts  # evaluations told so far; the first is that of the start
    delta: t.Images  # the perturbation of all pixels, inside the box
    mask: Numbers
    changed: Bool[t.Array, "B H W 1"]  # the `pixels` largest numbers of `mask`
    unchanged: t.Counts  # steps since the mask was last drawn that left `changed` as it was
    x_best: t.Images  # the point of highest loss, or the latest success
    loss_best: t.PerImage  # -inf at first
    score_best: t.PerImage  # the score of `x_best`; NaN at first


def sparse_pgd_machine(
    *,
    pixels: int | t.Array,
    steps: int,
    loss: str | Callable[..., t.Array] | Goal = "ce-cw",
    projected: bool = False,
) -> t.Machine:
    """Make a `types.Machine` for Sparse-PGD with up to `steps + 1` evaluations.

    Arguments as in `sparse_pgd`. `init` needs threefry keys; the mask after evaluation n is drawn
    with `fold_in(key, n)`.
    """
    goal = goal_of(loss)
    inputs.check_no_targets(goal)
    inputs.check_pixels(pixels)
    inputs.check_settings(norm="linf", epsilon=1, steps=steps)

    def init(
        images: Any, labels: Any, *, keys: Any = None, start: t.Start = "random", **_: Any
    ) -> SparsePgdState:
        images, labels = inputs.check_inputs(images, labels, logits=goal.logits)
        inputs.check_search("Sparse-PGD", images, start)
        inputs.check_pixels(pixels, of=images[0, ..., 0].size)
        inputs.check_radii(pixels, images)
        images = jnp.clip(images, 0, 1)
        keys = key_data(inputs.image_keys(keys, len(images)))
        floats, integers = inputs.fillers(images)
        count = integers(0) + jnp.asarray(pixels).astype(jnp.int32)
        delta, mask = _draw(keys, integers(0), images)
        delta = jnp.clip(delta, -images, 1 - images)
        return SparsePgdState(
            images=images,
            labels=labels,
            pixels=count,
            steps=integers(steps),
            keys=keys,
            iteration=integers(0),
            delta=delta,
            mask=mask,
            changed=largest_pixels(mask, count),
            unchanged=integers(0),
            x_best=images,
            loss_best=floats(-jnp.inf),
            score_best=floats(jnp.nan),
        )

    return t.Machine(
        init=init,
        query=_points,
        loss=lambda state, outputs: goal.value(outputs, state.labels, state.loss_best.dtype),
        score=goal.state_score if goal.score else None,
        tell=functools.partial(_tell, goal=goal, projected=projected),
        finished=lambda state: state.iteration > state.steps,
        result=lambda state: state.x_best,
        logits=goal.logits,
    )


def _points(state: SparsePgdState) -> t.Images:
    return state.images + jnp.where(state.changed, state.delta, 0)


def _tell(
    state: SparsePgdState,
    loss: t.PerImage,
    score: t.PerImage | None,
    gradient: t.Images,
    *,
    goal: Goal,
    projected: bool,
) -> SparsePgdState:
    better = (loss > state.loss_best) | goal.reached(score, loss)
    score = state.score_best if score is None else score.astype(loss.dtype)
    state = state._replace(
        iteration=state.iteration + 1,
        x_best=where(better, _points(state), state.x_best),
        loss_best=jnp.where(better, loss, state.loss_best),
        score_best=jnp.where(better, score, state.score_best),
    )
    # Differentiate as if the points were images + delta * sigmoid(mask).
    gradient, sigmoid = usable(gradient), jax.nn.sigmoid(state.mask)
    slope = (gradient * state.delta).sum(axis=3, keepdims=True) * sigmoid * (1 - sigmoid)
    length = l2_norm(slope)
    step = jnp.where(length < 2e-10, 0, _MASK_STEP * state.mask[0].size ** 0.5 / (length + 1e-10))
    mask = state.mask + per_image(step, slope) * slope
    gradient = jnp.where(state.changed, gradient, 0) if projected else gradient * sigmoid
    delta = state.delta + _STEP * jnp.sign(gradient)
    delta = jnp.clip(delta, -state.images, 1 - state.images)
    # If the mask is redrawn, nothing else happens.
    again = state.unchanged >= _PATIENCE
    mask = where(again, _draw(state.keys, state.iteration, state.images)[1], mask)
    delta = where(again, state.delta, delta)
    changed = largest_pixels(mask, state.pixels)
    same = jnp.all(changed == state.changed, axis=(1, 2, 3))
    unchanged = jnp.where(again, 1, state.unchanged + same.astype(jnp.int32))
    return state._replace(delta=delta, mask=mask, changed=changed, unchanged=unchanged)


def _draw(keys: KeyData, number: t.Counts, images: t.Images) -> tuple[t.Images, Numbers]:
    """Draw a perturbation from U[-1, 1) and a mask from N(0, 1)."""

    def of_one(data: t.Array, number: t.Array, image: t.Array) -> tuple[t.Array, t.Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), number)
        first, second = jax.random.split(key)
        delta = jax.random.uniform(first, image.shape, image.dtype, -1, 1)
        return delta, jax.random.normal(second, (*image.shape[:2], 1), image.dtype)

    return jax.vmap(of_one)(keys, number, images)


def sparse_pgd(
    *,
    pixels: int | t.Array,
    steps: int = 300,
    loss: str | Callable[..., t.Array] | Goal = "ce-cw",
    projected: bool = False,
    info: bool = False,
) -> t.Attack:
    """Make a Sparse-PGD attack, which changes at most `pixels` pixels.

    It returns the first point that succeeds, or else the point of highest loss.

    Args:
      pixels: maximum number of changed pixels, each in all channels; fewer than the image has.
        Inside `jit`, it may be an array i32[B].
      steps: K >= 1; costs at most K + 1 forward and backward passes. A misclassified image is left
        unchanged.
      loss: what the steps maximize, as in `apgd`; "ce-cw" is the authors' choice.
      projected: move the perturbation of the changed pixels only; the authors run both variants.
      info: return `(images_adv, AttackInfo)`, at the cost of one more forward pass.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda images: images.mean((1, 2)) @ jnp.array([[1.0, -1.0]])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> images_adv = sparse_pgd(pixels=3, steps=20)(logits_fn, jax.random.key(0), images, labels)
    >>> int((images_adv != images).sum()), float(logits_fn(images_adv)[0, 0])
    (3, 0.40625)
    """
    machine = sparse_pgd_machine(pixels=pixels, steps=steps, loss=loss, projected=projected)
    drive = functools.partial(until_done, goal=goal_of(loss))
    return as_attack(machine, drive=drive, random_start=True, info=info)


_FACTS = MachineFacts(
    machine="sparse-pgd",
    make=lambda setting, epsilon, loss="ce-cw": sparse_pgd_machine(
        pixels=epsilon,
        steps=setting.steps,
        loss=loss,
        projected=setting.machine.startswith("sparse-pgd-p"),
    ),
    rule="a quarter of the pixel range",
    norms=("l0",),
    least={"steps": 1, "restarts": 1},
    flat=True,
)
for number, name, words in ((7, "sparse-pgd", "unprojected"), (8, "sparse-pgd-p", "projected")):
    facts, standard = _FACTS._replace(machine=name), StandardSettings(number, 10_000)
    add(facts, NamedAttack(name, f"Sparse-PGD in L0 with the {words} gradient", facts, standard))
