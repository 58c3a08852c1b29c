"""What a training step remembers of those before it: in the optimiser's state, saved with it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import optax

from jaxrobust.types import Array, Params


class Memory(NamedTuple):
    """What a step knows of those before it, beside the optimiser's own state.

    `recall(state, batch, keys) -> (stats, batch, keys)`, which gradients are given, the attack's
    among them;
    `learn(state, opt_state, metrics) -> (opt_state, metrics)`, of this step's metrics;
    `first(params, stats)`: arrays that are kept beside the optimiser's state, as a phase begins;
    None: it keeps none.
    """

    recall: Callable[[Any, Any, Any], tuple[Any, Any, Any]]
    learn: Callable[[Any, Any, Any], tuple[Any, Any]]
    first: Callable[[Params, Params], dict[str, Array]] | None = None


NO_MEMORY = Memory(
    lambda state, batch, keys: (state.stats, batch, keys),
    lambda state, opt_state, metrics: (opt_state, metrics),
)


def joined(memories: Sequence[Memory]) -> Memory:
    """Join memories whose arrays have different names."""
    if not memories:
        return NO_MEMORY

    def recall(state: Any, batch: Any, keys: Any) -> tuple[Any, Any, Any]:
        stats = state.stats
        for one in memories:
            own, batch, keys = one.recall(state, batch, keys)
            stats = stats | own
        return stats, batch, keys

    def learn(state: Any, opt_state: Any, metrics: Any) -> tuple[Any, Any]:
        for one in memories:
            opt_state, metrics = one.learn(state, opt_state, metrics)
        return opt_state, metrics

    kept = [one.first for one in memories if one.first is not None]

    def first(params: Params, stats: Params) -> dict[str, Array]:
        return {k: a for own in kept for k, a in own(params, stats).items()}

    return Memory(recall, learn, first if kept else None)


class Remembering(NamedTuple):
    """An optimiser's state, and beside it what the steps so far have shown."""

    own: Any
    memory: dict[str, Array]


class MemorySetup(NamedTuple):
    """An optimiser whose state holds what a memory keeps; as optax's, but that `begin` makes it."""

    begin: Callable[[Params, Params], Remembering]
    update: Callable[..., tuple[Any, Remembering]]


Optimiser: TypeAlias = optax.GradientTransformationExtraArgs | MemorySetup


def remembering(tx: optax.GradientTransformationExtraArgs, memory: Memory) -> Optimiser:
    """Keep a memory's arrays in the optimiser's state, if there are any; a step changes them."""
    first = memory.first
    if first is None:
        return tx

    def begin(params: Params, stats: Params) -> Remembering:
        return Remembering(tx.init(params), first(params, stats))

    def update(
        grads: Any, state: Remembering, params: Any = None, **given: Any
    ) -> tuple[Any, Remembering]:
        updates, own = tx.update(grads, state.own, params, **given)
        return updates, Remembering(own, state.memory)

    return MemorySetup(begin, update)


def begun(tx: Optimiser, params: Params, stats: Params) -> optax.OptState:
    """Make the optimiser's first state."""
    return tx.begin(params, stats) if isinstance(tx, MemorySetup) else tx.init(params)
