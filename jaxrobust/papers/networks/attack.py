"""PGD for the analyses: its points, and its loss after each step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import attacks
from jaxrobust.papers.networks.network_sample import NetworkSample, keys
from jaxrobust.types import Array, LogitsFn, Machine


def batches(count: int, size: int) -> list[slice]:
    """List slices of this many images at a time."""
    return [slice(first, first + size) for first in range(0, count, size)]


@partial(jax.jit, static_argnames=("steps", "threat", "step_size"))
def _ended(logits_fn, drawn, images, labels, *, steps, threat, step_size):
    attack = attacks.pgd(**threat.settings(), steps=steps, step_size=step_size, random_start=True)
    points = attack(logits_fn, drawn, images, labels)
    return points, logits_fn(points)


def pgd(
    sample: NetworkSample, *, steps: int, seed: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the end of PGD with steps of 1.5 epsilon / steps, f32[N,H,W,C], and its logits."""
    step_size = 1.5 * sample.threat.epsilon / steps
    settings = {"threat": sample.threat, "steps": steps, "step_size": step_size}
    data = keys(sample, seed), sample.images, sample.labels
    ends = [
        _ended(sample.logits_fn, *(array[part] for array in data), **settings)
        for part in batches(len(sample.images), batch)
    ]
    return tuple(np.concatenate(arrays) for arrays in zip(*ends, strict=True))  # type: ignore


def climb(
    machine: Machine, logits_fn: LogitsFn, state: Any, steps: int, value: Callable[..., Array]
) -> tuple[Any, Array]:
    """Return the state after `steps` steps, and the values of all states, f32[steps + 1, B]."""

    def step(state: Any, _: None) -> tuple[Any, Array]:
        advanced = attacks.advance(machine, lambda points, draw: logits_fn(points), state)
        return advanced.state, value(advanced.queried, advanced.outputs)

    state, values = jax.lax.scan(step, state, None, length=steps)
    last = value(state, logits_fn(machine.query(state)))
    return state, jnp.concatenate([values, last[None]])


def logits(sample: NetworkSample, images: np.ndarray, batch: int) -> np.ndarray:
    """Return f32[N,C]."""
    forward = jax.jit(lambda logits_fn, x: logits_fn(x))
    parts = [forward(sample.logits_fn, images[part]) for part in batches(len(images), batch)]
    return np.concatenate(parts)


def cross_entropy(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return f32[N]."""
    return np.asarray(attacks.ce_loss(jnp.asarray(values), jnp.asarray(labels)))
