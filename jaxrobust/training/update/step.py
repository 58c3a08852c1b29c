"""The fused step: augmentation, attack, loss, gradients, update and average in one program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrobust.attacks import image_keys
from jaxrobust.models.interface.network_inputs import cast, unit_range
from jaxrobust.runtime.devices.sharding import Spread
from jaxrobust.training.update import averages, objectives
from jaxrobust.training.update.memory import NO_MEMORY, Memory, Optimiser
from jaxrobust.training.update.mixing import BatchAugmentation
from jaxrobust.types import Array, Batch, Classifier, Keys, LogitsFn, Params

Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that changes from step to step; `key`, the root of all draws, never changes."""

    step: Array  # i32[], number of updates done
    params: Params  # float32
    stats: Params
    ema: Params  # of the parameters and the batch norms' statistics
    opt_state: optax.OptState
    key: Array


class Control(NamedTuple):
    """What the hosts pass to a step; plain numbers, so nothing is recompiled."""

    stop: Array  # i32[devices]; unless all are 0, no device takes the step: see `metrics["stop"]`
    lr_scale: Array  # f32[], factor of the schedule's learning rate
    epsilon_share: Array | float = 1.0  # f32[], share of the attack's radius, if that grows


class ImageKeys(NamedTuple):
    """Per image, a key for its attack and one for the network's draws: both [B]."""

    attack: Keys
    net: Keys


class GradientParts(NamedTuple):
    """What the gradients of a phase are computed from; `build.phase` fills it."""

    net: Classifier
    # An `Attack`; it also takes `epsilon_share` or `turn` if `attack_options` has them.
    attack: Callable[..., Array]
    objective: objectives.Objective
    # Whether the attack sees the network in training mode (these images' statistics, stochastic
    # depth with the update's draws) instead of evaluation mode.
    attack_in_train_mode: bool = False
    dtype: jnp.dtype = jnp.dtype("float32")  # of the passes
    mean_over_devices: Callable[[Any], Any] = lambda tree: tree
    # Prepares a network for the many passes of an attack on images of this shape.
    prepare_for_attack: Callable[[LogitsFn, Array], LogitsFn] = lambda logits_fn, images: logits_fn


class StepParts(NamedTuple):
    """What a phase's step is made of; `build.phase` fills it."""

    augment: BatchAugmentation
    # (state, control) -> the attack's arguments besides keys, images and labels, shared by all
    # images.
    attack_options: Callable[[TrainState, Control], dict[str, Array]]
    device_gradients: Callable[..., Any]  # `device_gradients` for all devices
    optimizer: Optimiser
    update_ema: averages.Averaging
    update_batch_stats: averages.Statistics = lambda old, new, step: new
    memory: Memory = NO_MEMORY
    # (arrays, params) -> the arrays in the layout for the optimizer.
    to_rows: Callable[[Any, Params], Any] = lambda arrays, params: arrays
    global_norm: Callable[[Params], Array] = optax.tree.norm  # of the result of `device_gradients`


def train_step(
    state: TrainState, batch: Batch, control: Control, *, parts: StepParts
) -> tuple[TrainState, Metrics]:
    """Augment, attack, differentiate, update; return the new state and means over the batch.

    A step with a non-finite loss or gradient counts but updates nothing, not even the counter of
    the learning-rate schedule. A step that a host stops leaves the state unchanged.
    """
    step_key = jax.random.fold_in(state.key, state.step)
    attack_key, net_key, augment_key = jax.random.split(step_key, 3)
    with jax.named_scope("augmentation"):
        batch = parts.augment(augment_key, Batch(unit_range(batch.images), batch.labels))
    keys = ImageKeys(*(image_keys(key, batch.images.shape[0]) for key in (attack_key, net_key)))
    options = parts.attack_options(state, control)
    stats, batch = parts.memory.recall(state, batch)
    grads, (stats, metrics) = parts.device_gradients(state.params, stats, options, batch, keys)
    stats = {name: stats[name] for name in state.stats}
    stats = parts.update_batch_stats(state.stats, stats, state.step)

    norm = parts.global_norm(grads)
    grads = parts.to_rows(grads, state.params)
    old = (state.params, state.stats, state.ema, state.opt_state)
    old_params, *old_others = parts.to_rows(old, state.params)
    # `norm < 0` is never true: it makes the devices' first collective wait for the gradients. An
    # earlier one would occupy one of XLA's few CPU threads, and the devices would work in turn.
    stop = (control.stop + (norm < 0).astype(jnp.int32)).max()
    goes_on = stop == 0
    updates_state = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & goes_on

    with jax.named_scope("optimiser"):
        updates, opt_state = parts.optimizer.update(grads, old_others[2], old_params, norm=norm)
        opt_state, metrics = parts.memory.learn(state, opt_state, metrics)
        # Adding -0 changes no number (a subnormal may become 0, as in any update). Choosing between
        # old and new parameters would be one more pass over them.
        scale = control.lr_scale
        updates = jax.tree.map(lambda u: jnp.where(updates_state, scale * u, -0.0), updates)
        params = optax.apply_updates(old_params, updates)
        ema = parts.update_ema(old_others[1], params, without_normalisation(stats), state.step)

    others = jax.tree.map(
        lambda new, old: jnp.where(updates_state, new, old), [stats, ema, opt_state], old_others
    )
    params, stats, ema, opt_state = jax.tree.map(
        lambda new, old: new.reshape(old.shape), (params, *others), old
    )
    step = state.step + goes_on.astype(jnp.int32)
    skipped = (goes_on & ~updates_state).astype(jnp.float32)
    metrics |= {"gradient_norm": norm, "skipped": skipped, "stop": stop}
    return TrainState(step, params, stats, ema, opt_state, state.key), metrics


def device_gradients(
    params: Params,
    stats: Params,
    attack_options: dict[str, Array],
    batch: Batch,
    keys: ImageKeys,
    *,
    parts: GradientParts,
    spread: Spread,
    microbatches: int,
) -> tuple[Params, tuple[Params, Metrics]]:
    """Compute one device's part of a step: the gradients of its images, per microbatch.

    Collectives run only before and after, whatever the attack. Parameters, of which the device has
    a part, f32 (f64 if the compute type is f64 in x64 mode), are gathered once, in the compute
    type. Gradients, in the parameters' type, are averaged once, after the last microbatch.
    """
    dtypes = {name: array.dtype for name, array in params.items()}
    params = spread.gather(cast(params, parts.dtype))

    def of_microbatch(images: tuple[Batch, ImageKeys]) -> tuple[Params, Params, Metrics]:
        grads, stats_after, metrics = adversarial_gradients(
            params, stats, *images, attack_options, parts=parts
        )
        grads = {name: grad.astype(dtypes[name]) for name, grad in grads.items()}
        return grads, without_normalisation(stats_after), metrics

    images = (batch, keys)
    if microbatches == 1:
        grads, new_stats, metrics = of_microbatch(images)
    else:
        split = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), images)
        first = jax.tree.map(lambda x: x[0], split)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_microbatch, first))

        def add(sums: Any, images: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, of_microbatch(images)), None

        total, _ = jax.lax.scan(add, zeros, split)
        grads, new_stats, metrics = jax.tree.map(lambda x: x / microbatches, total)
    return spread.reduce(grads), (stats | spread.mean(new_stats), spread.mean(metrics))


def adversarial_gradients(
    params: Params,
    stats: Params,
    batch: Batch,
    keys: ImageKeys,
    attack_options: dict[str, Array],
    *,
    parts: GradientParts,
) -> tuple[Params, Params, Metrics]:
    """Find adversarial images, then differentiate the objective there in the parameters.

    Args:
      params: not split over devices, in the compute type, like `stats`.
      batch: images f32[B,H,W,C] and labels; keys: [B] each.
      attack_options: `epsilon_share` f32[] for a growing radius, `turn` i32[] for several norms.
    Returns: gradients of the parameters, the new statistics, and metrics.
    Source: Madry et al. 2018 (arXiv 1706.06083), eq. 2.1; with APGD of 2 steps that of Singh,
      Croce, Hein 2023 (arXiv 2303.01870).
    """
    net, objective = parts.net, parts.objective

    def network(key: Array | None) -> LogitsFn:
        mode = {"train": True, "key": key} if parts.attack_in_train_mode else {}
        return lambda images: net.apply(params, stats, images, **mode)[0]

    with jax.named_scope("attack"):
        target_network, attack_network = map(network, objective.draws(keys.net))
        targets = objective.attack_targets(target_network, batch)
        attack_network = parts.prepare_for_attack(attack_network, batch.images)
        images_adv = jax.lax.stop_gradient(
            parts.attack(attack_network, keys.attack, batch.images, targets, **attack_options)
        )

    def loss(params: Params) -> objectives.Value:
        return objective.loss(net, params, stats, batch, images_adv, keys.net)

    if objective.displaced is not None:  # differentiate where the weights are worst
        with jax.named_scope("displacement"):
            ascent = jax.grad(lambda params: loss(params)[0])(params)
            params = objective.displaced(params, parts.mean_over_devices(ascent))
    (value, (new_stats, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, new_stats, metrics | {"loss": value}


_SHORT = 16  # float32 numbers in an AVX-512 vector


def in_rows(arrays: Any, params: Params) -> Any:
    """Return arrays with long last axes, reshaping those with a parameter's shape and a short one.

    XLA's CPU loops run along the last axis only: AdamW on f[512,512,3,3] takes 5.7 ms, 1 in rows.
    """
    short = {p.shape for p in params.values() if p.ndim > 2 and p.shape[-1] < _SHORT}

    def row(array: Array) -> Array:
        if array.shape not in short:
            return array
        ones = [1] * (array.ndim - 2)  # keep the number of axes, on which weight decay depends
        return array.reshape(*ones, array.shape[0], -1)

    return jax.tree.map(row, arrays)


def norm_in_rows(grads: Params) -> Array:
    """Compute the norm of gradients that are equal on all devices."""
    return optax.tree.norm(in_rows(grads, grads))


def init_state(net: Classifier, optimizer: Optimiser, key: Array) -> TrainState:
    """Draw a fresh state; the average starts at the initial weights."""
    init_key, _ = jax.random.split(key)
    return state_of(optimizer, key, *net.init(init_key))


def state_of(optimizer: Optimiser, key: Array, params: Params, stats: Params) -> TrainState:
    """Build a state from existing weights, with the keys that `init_state` would use."""
    _, root = jax.random.split(key)
    ema = jax.tree.map(jnp.copy, params | without_normalisation(stats))  # a step donates both
    opt_state = optimizer.init(params, stats)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, ema, opt_state, root)


def without_normalisation(stats: Params) -> Params:
    """Drop the normalization of images, which never changes."""
    return {name: s for name, s in stats.items() if not name.startswith("normalize.")}


def averaged(state: TrainState) -> tuple[Params, Params]:
    """Return params and stats of the averaged network."""
    params = {name: state.ema[name] for name in state.params}
    return params, {name: state.ema.get(name, s) for name, s in state.stats.items()}
