"""Moving averages of the weights, and the running statistics of batch norms."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxrobust.config import PhaseSection
from jaxrobust.training.update import objectives
from jaxrobust.training.update.value_checks import must_be, one_of
from jaxrobust.types import Array, Params

# (average, parameters, running statistics, number of earlier updates) -> the new average
Averaging = Callable[[Params, Params, Params, Any], Params]
# (running statistics before and after an update, earlier updates) -> the ones to keep
Statistics = Callable[[Params, Params, Any], Params]


def ema(average: Params, new: Params, decay: float | Array) -> Params:
    """Update the average by one step, without bias correction."""

    def step(mean: Array, new: Array) -> Array:
        share = decay if isinstance(decay, float) else decay.astype(new.dtype)
        return share * mean + (1 - share) * new

    return {name: step(average[name], new[name]) for name in new}


def averaging(p: PhaseSection, name: str, *, steps_per_epoch: int) -> Averaging:
    """Choose the averaging of a phase's weights and running statistics.

    For `ema_warmup_epochs`, the average is a copy. From the last of these updates on, numbered d =
    0, 1, ..., its decay is min(ema_decay, (1 + d) / (10 + d)), as in TensorFlow's
    ExponentialMovingAverage. `name`: of the phase, for messages.
    """
    epochs = p.ema_warmup_epochs
    must_be(f"{name}.ema_decay", p.ema_decay, 0 <= p.ema_decay < 1, "at least 0 and below 1")
    inside = epochs is None or 0 <= epochs < p.epochs
    wanted = f"at least 0 and below {name}.epochs={p.epochs}, or None for a constant decay"
    must_be(f"{name}.ema_warmup_epochs", epochs, inside, wanted)
    one_of(f"{name}.ema_statistics", p.ema_statistics, ("averaged", "copied"))

    def decay(step: Any) -> float | Array:
        if epochs is None:
            return p.ema_decay
        d = jnp.asarray(step + 1 - epochs * steps_per_epoch, jnp.result_type(float))
        return jnp.where(d < 0, 0, jnp.minimum(p.ema_decay, (1 + d) / (10 + jnp.abs(d))))

    def average(old: Params, params: Params, stats: Params, step: Any) -> Params:
        mean = ema(old, params | stats, decay(step))
        return mean | stats if p.ema_statistics == "copied" else mean

    return average


def running_statistics(p: PhaseSection, name: str) -> Statistics:
    """Choose the update of a phase's running statistics: the network's own, or PyTorch's momentum
    for the first update and for all others, given by `bn_momentum`.

    The statistics "after an update" must then be those of its images alone: see
    `classifier.showing_batches`.
    Parity: tests/training/update/test_averages.py, against PyTorch's BatchNorm2d.
    """
    if not p.bn_momentum:
        return lambda old, new, step: new
    values = tuple(p.bn_momentum)
    setting = f"{name}.bn_momentum={values}"
    if len(values) != 2 or not all(0 < value <= 1 for value in values):
        raise ValueError(
            f"{setting} must be two numbers above 0 and at most 1, for the first and for later "
            "updates, such as (1.0, 0.01), or () to use the network's own momentum"
        )
    if objectives.named(p.objective).both and p.bn_statistics != "adversarial":
        raise ValueError(
            f"{setting} needs statistics that change once per update, but "
            f"objective={p.objective!r} changes them twice; set {name}.bn_statistics='adversarial'"
        )
    first, later = values

    def moved(old: Params, batch: Params, step: Any) -> Params:
        is_first = jnp.asarray(step) == 0
        momentum = jnp.where(is_first, first, later)
        retained = jnp.where(is_first, 1 - first, 1 - later)

        def mixed(old: Array, new: Array) -> Array:
            dtype = old.dtype
            mean = retained.astype(dtype) * old + momentum.astype(dtype) * new.astype(dtype)
            # What did not change, such as the normalization of images, keeps its bits.
            return jnp.where(new == old, old, mean)

        return {key: mixed(old[key], new) for key, new in batch.items()}

    return moved
