"""The fused step: augmentation, attack, loss, gradients, update, average: one program."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrobust import optim
from jaxrobust.augment import BatchAugmentation
from jaxrobust.objectives import Objective
from jaxrobust.types import Array, Attack, Batch, Classifier, Params


class TrainState(NamedTuple):
    """All that changes from step to step; `key` is the root of every draw and never changes."""

    step: Array  # i32[], updates done
    params: Params  # float32
    stats: Params
    ema: Params  # of the parameters and of the statistics of batch norms
    opt_state: optax.OptState
    key: Array


def init_state(net: Classifier, tx: optax.GradientTransformation, key: Array) -> TrainState:
    """A fresh state; the average starts from the initial weights."""
    init_key, root = jax.random.split(key)
    params, stats = net.init(init_key)
    ema = started_average(params, stats)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, ema, tx.init(params), root)


def started_average(params: Params, stats: Params) -> Params:
    """The average of these weights alone, in buffers of its own: a step donates both."""
    return jax.tree.map(jnp.copy, _averages(params, stats))


def _averages(params: Params, stats: Params) -> Params:
    """What is averaged: all but the normalisation of the images, which never changes."""
    return params | {name: s for name, s in stats.items() if not name.startswith("normalize.")}


def averaged(state: TrainState) -> tuple[Params, Params]:
    """Params and stats of the averaged network."""
    params = {name: state.ema[name] for name in state.params}
    return params, {name: state.ema.get(name, s) for name, s in state.stats.items()}


def unit_range(images: Array) -> Array:
    """uint8 as f32 in [0, 1], the division that ToTensor does; floats as they are."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """The parameters in the compute type: once, outside of an attack's loop."""
    return {name: array.astype(dtype) for name, array in params.items()}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    net: Classifier,
    augment: BatchAugmentation,
    attack: Attack,
    objective: Objective,
    tx: optax.GradientTransformation,
    ema_decay: float,
    dtype: jnp.dtype,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one update, and its metrics (means over the global batch)."""
    step_key = jax.random.fold_in(state.key, state.step)
    attack_key, net_key, augment_key = jax.random.split(step_key, 3)
    batch = augment(augment_key, Batch(unit_range(batch.images), batch.labels))
    frozen_params = cast(state.params, dtype)

    def frozen(images):
        return net.apply(frozen_params, state.stats, images)[0]

    targets = objective.attack_targets(frozen, batch)
    images_adv = jax.lax.stop_gradient(attack(frozen, attack_key, batch.images, targets))

    def loss(params):
        return objective.loss(net, params, state.stats, batch, images_adv, net_key)

    (value, (stats, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = optim.ema(state.ema, _averages(params, stats), ema_decay)
    metrics |= {"loss": value, "gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, stats, average, opt_state, state.key), metrics


def eval_step(
    params: Params,
    stats: Params,
    images: Array,
    labels: Array,
    mask: Array,
    ids: Array,
    key: Array,
    *,
    net: Classifier,
    attack: Attack,
    dtype: jnp.dtype,
) -> dict[str, Array]:
    """How many images of a padded batch are right clean, and still right after the attack.

    Args:
      images: uint8 or f32[B,H,W,C]; labels, ids: i32[B]; mask: bool[B], False for padding.
      key: every image draws from `fold_in(key, id)`, so a verdict does not depend on its batch.
    """

    frozen_params = cast(params, dtype)

    def logits_fn(x):
        return net.apply(frozen_params, stats, x)[0]

    images = unit_range(images)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    clean = (logits_fn(images).argmax(-1) == labels) & mask
    images_adv = attack(logits_fn, keys, images, labels)
    robust = (logits_fn(images_adv).argmax(-1) == labels) & clean
    return {"count": mask.sum(), "clean": clean.sum(), "robust": robust.sum()}
