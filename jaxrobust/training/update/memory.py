"""What a training step remembers of those before it: in the optimiser's state, saved with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxrobust.types import Array


class Memory(NamedTuple):
    """What a step knows of those before it, beside the optimiser's own state.

    `recall(state, batch, keys) -> (batch, keys)`, which the objective and the attack are given;
    `learn(state, opt_state, metrics) -> (opt_state, metrics)`, of this step's metrics;
    `first`: arrays that are kept beside the optimiser's state, as a phase begins.
    """

    recall: Callable[[Any, Any, Any], tuple[Any, Any]]
    learn: Callable[[Any, Any, Any], tuple[Any, Any]]
    first: dict[str, Array]


NO_MEMORY = Memory(
    lambda state, batch, keys: (batch, keys),
    lambda state, opt_state, metrics: (opt_state, metrics),
    {},
)


class Remembering(NamedTuple):
    """An optimiser's state, and beside it what the steps so far have shown."""

    own: Any
    memory: dict[str, Array]


def remembering(
    tx: optax.GradientTransformation, first: dict[str, Any]
) -> optax.GradientTransformation:
    """Keep arrays in the optimiser's state, which begin as `first`; a step changes them itself."""

    def update(grads: Any, state: Remembering, params: Any = None) -> tuple[Any, Remembering]:
        updates, own = tx.update(grads, state.own, params)
        return updates, Remembering(own, state.memory)

    def init(params: Any) -> Remembering:
        return Remembering(tx.init(params), {key: jnp.copy(a) for key, a in first.items()})

    return optax.GradientTransformation(init, update)
