"""What a training step stores for later ones: in the optimizer's state, saved with it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax

from jaxrobust.types import Array, Params


class Memory(NamedTuple):
    """What a step stores in addition to the optimizer's state; by default, nothing.

    `recall(state, batch) -> (stats, batch)`, for the gradients; `learn(state, opt_state, metrics)
    -> (opt_state, metrics)`, from this step's metrics; `init(params, stats)`: the arrays to store
    at the start of a phase; `turn(state) -> i32[]`: which of several norms attacks in this step.
    """

    recall: Callable[[Any, Any], tuple[Any, Any]] = lambda state, batch: (state.stats, batch)
    learn: Callable[[Any, Any, Any], tuple[Any, Any]] = lambda state, opt_state, metrics: (
        opt_state,
        metrics,
    )
    init: Callable[[Params, Params], dict[str, Array]] | None = None
    turn: Callable[[Any], Array] | None = None


NO_MEMORY = Memory()


def joined(memories: Sequence[Memory]) -> Memory:
    """Join memories with distinct array names, at most one of which has turns."""

    def recall(state: Any, batch: Any) -> tuple[Any, Any]:
        stats = state.stats
        for memory in memories:
            more_stats, batch = memory.recall(state, batch)
            stats = stats | more_stats
        return stats, batch

    def learn(state: Any, opt_state: Any, metrics: Any) -> tuple[Any, Any]:
        for memory in memories:
            opt_state, metrics = memory.learn(state, opt_state, metrics)
        return opt_state, metrics

    inits = [memory.init for memory in memories if memory.init is not None]

    def init(params: Params, stats: Params) -> dict[str, Array]:
        return {name: a for init in inits for name, a in init(params, stats).items()}

    turns = [memory.turn for memory in memories if memory.turn is not None]
    return Memory(recall, learn, init if inits else None, turns[0] if turns else None)


class Remembering(NamedTuple):
    """An optimizer's state, and the arrays of a memory."""

    own: Any
    memory: dict[str, Array]


class Optimiser(NamedTuple):
    """An optax optimizer, but with `init(params, stats)`."""

    init: Callable[[Params, Params], optax.OptState]
    update: Callable[..., tuple[Any, optax.OptState]]


def remembering(tx: optax.GradientTransformationExtraArgs, memory: Memory = NO_MEMORY) -> Optimiser:
    """Store a memory's arrays, if any, in the optimizer's state."""
    first_arrays = memory.init
    if first_arrays is None:
        return Optimiser(lambda params, stats: tx.init(params), tx.update)

    def init(params: Params, stats: Params) -> Remembering:
        return Remembering(tx.init(params), first_arrays(params, stats))

    def update(
        grads: Any, state: Remembering, params: Any = None, **extra: Any
    ) -> tuple[Any, Remembering]:
        updates, tx_state = tx.update(grads, state.own, params, **extra)
        return updates, Remembering(tx_state, state.memory)

    return Optimiser(init, update)
