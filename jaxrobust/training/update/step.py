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
from jaxrobust.training.update.memory import NO_MEMORY, Memory, Optimiser, begun
from jaxrobust.training.update.mixing import BatchAugmentation
from jaxrobust.types import Array, Attack, Batch, Classifier, Keys, LogitsFn, Params


def as_it_is(network: LogitsFn, images: Array) -> LogitsFn:
    """Return a network for the passes of an attack unchanged."""
    del images
    return network


def gradients(
    params: Params,
    stats: Params,
    batch: Batch,
    attack_keys: Array,
    net_keys: Array,
    *,
    net: Classifier,
    attack: Attack,
    objective: objectives.Objective,
    attack_train: bool,
    ready: Callable[[LogitsFn, Array], LogitsFn] = as_it_is,
    mean: Callable[[Params], Params] = lambda grads: grads,
) -> tuple[Params, Params, dict[str, Array]]:
    """Maximise over the images, then differentiate the loss that the parameters minimise there.

    Args:
      params: whole, in the compute type; stats: of all.
      batch: images f32[B,H,W,C] and labels; keys: [B], theirs.
      attack_train: whether the attack sees the network as it trains (statistics of these images,
        stochastic depth with the update's draws), instead of as it evaluates; what it aims at, as
        the update sees the images themselves.
      mean: of all devices, of an objective that looks at gradients before the update does.
      ready: makes a network of images of this shape ready for the many passes of an attack.
    Returns: gradients of the parameters, the statistics after, and metrics.
    Source: Madry et al. 2018 (arXiv 1706.06083), eq. 2.1; with APGD of 2 steps that of Singh,
      Croce, Hein 2023 (arXiv 2303.01870).
    """

    def frozen(key: Array | None) -> LogitsFn:
        mode = {"train": True, "key": key} if attack_train else {}
        return lambda images: net.apply(params, stats, images, **mode)[0]

    with jax.named_scope("attack"):
        plain, attacked = map(frozen, objective.draws(net_keys))
        targets = objective.attack_targets(plain, batch)
        attacked = ready(attacked, batch.images)
        images_adv = jax.lax.stop_gradient(attack(attacked, attack_keys, batch.images, targets))

    def loss(params: Params) -> objectives.Value:
        return objective.loss(net, params, stats, batch, images_adv, net_keys)

    if objective.displaced is not None:
        with jax.named_scope("displacement"):
            slopes = jax.grad(lambda params: loss(params)[0])(params)
            params = objective.displaced(params, mean(slopes))
    (value, (after, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, after, metrics | {"loss": value}


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


def keys_alone(keys: Keys, epsilon_share: Any) -> Any:
    """Collect the arguments, beside images and labels, of an attack whose radius never changes."""
    del epsilon_share
    return keys


_SHORT = 16  # numbers in a vector of AVX-512


def as_given(arrays: Any, params: Params) -> Any:
    """Return arrays as they are."""
    del params
    return arrays


def in_rows(arrays: Any, params: Params) -> Any:
    """Return arrays with long last axes: those with the shape of a parameter whose own is short.

    XLA's loops on CPU are along that axis alone: of f[512,512,3,3] AdamW's takes 5.7 ms, in rows 1.
    """
    short = {p.shape for p in params.values() if p.ndim > 2 and p.shape[-1] < _SHORT}

    def of(array: Array) -> Array:
        shape = array.shape
        if shape not in short:
            return array
        return array.reshape(*[1] * (len(shape) - 2), shape[0], -1)  # decayed if it was

    return jax.tree.map(of, arrays)


def norm_in_rows(grads: Params) -> Array:
    """Take the norm of gradients that are the same on all devices."""
    return optax.tree.norm(in_rows(grads, grads))


def train_step(
    state: TrainState,
    batch: Batch,
    control: Control,
    *,
    augment: BatchAugmentation,
    gradients: Callable[..., tuple[Params, tuple[Params, dict[str, Array]]]],
    tx: Optimiser,
    average: averages.Averaging,
    statistics: averages.Statistics = averages.as_moved,
    given: Callable[[Keys, Any], Any] = keys_alone,
    memory: Memory = NO_MEMORY,
    seen: Callable[[Any, Params], Any] = as_given,
    norm_of: Callable[[Params], Array] = optax.tree.norm,
) -> tuple[TrainState, dict[str, Array]]:
    """Do one update; return the state after it, and metrics (means over the global batch).

    A step whose loss or gradient is not finite counts, but updates nothing, not even the counter
    of the learning-rate schedule; one that a host stops leaves the state as it is. `gradients` is
    `of_device` for all devices (`Spread.each`), `norm_of` takes the norm of what it gives; `seen`
    gives arrays of the parameters' shapes, here alone, others.
    """
    step_key = jax.random.fold_in(state.key, state.step)
    attack_key, net_key, augment_key = jax.random.split(step_key, 3)
    with jax.named_scope("augmentation"):
        batch = augment(augment_key, Batch(unit_range(batch.images), batch.labels))
    keys, net_keys = (image_keys(key, batch.images.shape[0]) for key in (attack_key, net_key))
    recalled, batch, keys = memory.recall(state, batch, given(keys, control.epsilon_share))
    grads, (stats, metrics) = gradients(state.params, recalled, batch, keys, net_keys)
    stats = statistics(state.stats, {name: stats[name] for name in state.stats}, state.step)

    norm = norm_of(grads)
    known = (state.params, state.stats, state.ema, state.opt_state)
    grads, before = seen(grads, state.params), seen(known, state.params)
    params, _, mean, opt_state = before

    # `norm < 0` is never true: it makes the devices' first meeting wait for the gradients. One that
    # is ready at once holds one of the few threads of XLA's CPU, and they would work in turn.
    stop = (control.stop + (norm < 0).astype(jnp.int32)).max()
    goes = stop == 0
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & goes

    with jax.named_scope("optimiser"):
        updates, opt_state = tx.update(grads, opt_state, params, norm=norm)
        opt_state, metrics = memory.learn(state, opt_state, metrics)
        # To add -0 is to change no number (a subnormal one may become 0, as in any update). To
        # choose between the parameters of before and after would be one more pass over them.
        updates = jax.tree.map(lambda u: jnp.where(good, control.lr_scale * u, -0.0), updates)
        params = optax.apply_updates(params, updates)
        mean = average(mean, params, _moving(stats), state.step)

    def kept(new: Array, old: Array) -> Array:
        return jnp.where(good, new, old)

    stats, mean, opt_state = jax.tree.map(kept, (stats, mean, opt_state), before[1:])
    params, stats, mean, opt_state = jax.tree.map(
        lambda new, like: new.reshape(like.shape), (params, stats, mean, opt_state), known
    )
    step = state.step + goes.astype(jnp.int32)
    metrics |= {"gradient_norm": norm, "skipped": (goes & ~good).astype(jnp.float32), "stop": stop}
    return TrainState(step, params, stats, mean, opt_state, state.key), metrics


def of_device(
    params: Params,
    stats: Params,
    batch: Batch,
    attack_keys: Array,
    net_keys: Array,
    *,
    gradients: Callable[..., tuple[Params, Params, dict[str, Array]]],
    dtype: jnp.dtype,
    spread: Spread,
    microbatches: int,
) -> tuple[Params, tuple[Params, dict[str, Array]]]:
    """Compute one device's part of a step: `gradients` of its images, in so many parts of them.

    Collectives come before and after, whatever the attack: parameters, of which it has a part, f32
    (f64 where JAX computes so and the compute type is that too), are gathered once, in the compute
    type; gradients, in the type of the parameters, are averaged once, after the last part.
    """
    kinds = {name: array.dtype for name, array in params.items()}
    params = spread.gather(cast(params, dtype))

    def of_part(part: Any) -> tuple[Params, Params, dict[str, Array]]:
        grads, after, metrics = gradients(params, stats, *part)
        grads = {name: grad.astype(kinds[name]) for name, grad in grads.items()}
        return grads, _moving(after), metrics

    images = (batch, attack_keys, net_keys)
    if microbatches == 1:
        grads, moved, metrics = of_part(images)
    else:
        parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), images)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, first))

        def add(sums: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, of_part(part)), None

        total, _ = jax.lax.scan(add, zeros, parts)
        grads, moved, metrics = jax.tree.map(lambda x: x / microbatches, total)
    return spread.reduce(grads), (stats | spread.mean(moved), spread.mean(metrics))


def init_state(net: Classifier, tx: Optimiser, key: Array) -> TrainState:
    """Draw a fresh state; the average starts from the initial weights."""
    init_key, _ = jax.random.split(key)
    return state_of(tx, key, *net.init(init_key))


def state_of(tx: Optimiser, key: Array, params: Params, stats: Params) -> TrainState:
    """Begin with known weights, and the keys that `init_state` would have."""
    _, root = jax.random.split(key)
    ema = started_average(params, stats)
    opt_state = begun(tx, params, stats)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, ema, opt_state, root)


def started_average(params: Params, stats: Params) -> Params:
    """Start the average with these weights alone, in new buffers: a step donates both."""
    return jax.tree.map(jnp.copy, params | _moving(stats))


def _moving(stats: Params) -> Params:
    """Leave out the normalisation of images, which never changes."""
    return {name: s for name, s in stats.items() if not name.startswith("normalize.")}


def averaged(state: TrainState) -> tuple[Params, Params]:
    """Select params and stats of the averaged network."""
    params = {name: state.ema[name] for name in state.params}
    return params, {name: state.ema.get(name, s) for name, s in state.stats.items()}
