"""The fused step: augmentation, attack, loss, gradients, update, average: one program."""

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
    """All that changes from step to step; `key` is the root of every draw and never changes."""

    step: Array  # i32[], updates done
    params: Params  # float32
    stats: Params
    ema: Params  # of the parameters and of the statistics of batch norms
    opt_state: optax.OptState
    key: Array


class Control(NamedTuple):
    """What the hosts tell a step; plain numbers, so that nothing compiles again."""

    stop: Array  # i32[devices]; where one is not 0, no device takes the step: see `metrics["stop"]`
    lr_scale: Array  # f32[], times the schedule's learning rate
    epsilon_share: Array | float = 1.0  # f32[], of the attack's radius, where that grows


class ImageKeys(NamedTuple):
    """A key of each image for its attack, and one for the network's draws: both [B]."""

    attack: Keys
    net: Keys


class GradientParts(NamedTuple):
    """What the gradients of a phase are made of; `build.phase` fills it."""

    net: Classifier
    # An `Attack`, which reads `epsilon_share` or `turn` too, where `attack_options` has them.
    attack: Callable[..., Array]
    objective: objectives.Objective
    # The attack sees the network as it trains (statistics of these images, stochastic depth with
    # the update's draws) instead of as it evaluates.
    attack_in_train_mode: bool = False
    dtype: jnp.dtype = jnp.dtype("float32")  # of the passes
    mean_over_devices: Callable[[Any], Any] = lambda tree: tree
    # Makes a network of images of this shape ready for the many passes of an attack.
    prepare_for_attack: Callable[[LogitsFn, Array], LogitsFn] = lambda logits_fn, images: logits_fn


class StepParts(NamedTuple):
    """What the step of a phase is made of; `build.phase` fills it."""

    augment: BatchAugmentation
    # (state, control) -> what the attack reads in addition to keys, images and labels; of all
    # images.
    attack_options: Callable[[TrainState, Control], dict[str, Array]]
    device_gradients: Callable[..., Any]  # the function of that name, for all devices
    optimizer: Optimiser
    update_ema: averages.Averaging
    update_batch_stats: averages.Statistics = lambda old, new, step: new
    memory: Memory = NO_MEMORY
    # (arrays, params) -> the arrays as they lie while the optimiser works.
    to_rows: Callable[[Any, Params], Any] = lambda arrays, params: arrays
    global_norm: Callable[[Params], Array] = optax.tree.norm  # of what `device_gradients` returns


def train_step(
    state: TrainState, batch: Batch, control: Control, *, parts: StepParts
) -> tuple[TrainState, Metrics]:
    """Augment, attack, differentiate, update; return the new state and means over the batch.

    A step whose loss or gradient is not finite counts, but updates nothing, not even the counter
    of the learning-rate schedule; one that a host stops leaves the state as it is.
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
    # `norm < 0` is never true: it makes the devices' first meeting wait for the gradients. One that
    # is ready at once holds one of the few threads of XLA's CPU, and they would work in turn.
    stop = (control.stop + (norm < 0).astype(jnp.int32)).max()
    goes_on = stop == 0
    updates_state = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & goes_on

    with jax.named_scope("optimiser"):
        updates, opt_state = parts.optimizer.update(grads, old_others[2], old_params, norm=norm)
        opt_state, metrics = parts.memory.learn(state, opt_state, metrics)
        # To add -0 is to change no number (a subnormal one may become 0, as in any update). To
        # choose between old and new parameters would be one more pass over them.
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
    """Compute one device's part of a step: the gradients of its images, one microbatch at a time.

    Collectives come before and after, whatever the attack: parameters, of which it has a part, f32
    (f64 where JAX computes so and the compute type is that too), are gathered once, in the compute
    type; gradients, in the type of the parameters, are averaged once, after the last microbatch.
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
    """Find adversarial images, then differentiate the objective in the parameters there.

    Args:
      params: not split over devices, in the compute type; neither are `stats`.
      batch: images f32[B,H,W,C] and labels; keys: [B] each.
      attack_options: `epsilon_share` f32[] of a radius that grows, `turn` i32[] of several norms.
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

    if objective.displaced is not None:  # the gradient is taken where the weights are worst
        with jax.named_scope("displacement"):
            ascent = jax.grad(lambda params: loss(params)[0])(params)
            params = objective.displaced(params, parts.mean_over_devices(ascent))
    (value, (new_stats, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, new_stats, metrics | {"loss": value}


_SHORT = 16  # numbers in a vector of AVX-512


def in_rows(arrays: Any, params: Params) -> Any:
    """Return arrays with long last axes: those with the shape of a parameter whose own is short.

    XLA's loops on CPU are along that axis alone: of f[512,512,3,3] AdamW's takes 5.7 ms, in rows 1.
    """
    short = {p.shape for p in params.values() if p.ndim > 2 and p.shape[-1] < _SHORT}

    def row(array: Array) -> Array:
        if array.shape not in short:
            return array
        ones = [1] * (array.ndim - 2)  # as many axes as before, so that it is decayed if it was
        return array.reshape(*ones, array.shape[0], -1)

    return jax.tree.map(row, arrays)


def norm_in_rows(grads: Params) -> Array:
    """Take the norm of gradients that are the same on all devices."""
    return optax.tree.norm(in_rows(grads, grads))


def init_state(net: Classifier, optimizer: Optimiser, key: Array) -> TrainState:
    """Draw a fresh state; the average starts from the initial weights."""
    init_key, _ = jax.random.split(key)
    return state_of(optimizer, key, *net.init(init_key))


def state_of(optimizer: Optimiser, key: Array, params: Params, stats: Params) -> TrainState:
    """Begin with existing weights, and the keys that `init_state` would have."""
    _, root = jax.random.split(key)
    ema = jax.tree.map(jnp.copy, params | without_normalisation(stats))  # a step donates both
    opt_state = optimizer.init(params, stats)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, ema, opt_state, root)


def without_normalisation(stats: Params) -> Params:
    """Leave out the normalisation of images, which never changes."""
    return {name: s for name, s in stats.items() if not name.startswith("normalize.")}


def averaged(state: TrainState) -> tuple[Params, Params]:
    """Select params and stats of the averaged network."""
    params = {name: state.ema[name] for name in state.params}
    return params, {name: state.ema.get(name, s) for name, s in state.stats.items()}
