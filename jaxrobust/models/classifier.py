"""The only place where NNX modules become pure functions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.initializers import Draws
from jaxrobust.models.stochastic_depth import Drop, split
from jaxrobust.types import Array, Classifier, Params


def _flat(state) -> Params:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _single(flat: Params) -> Params:
    return {name: array.astype(jnp.float32) for name, array in flat.items()}


def _state(flat: Params, like):
    paths = [(path, leaf) for path, leaf in nnx.to_flat_state(like)]
    missing = {".".join(map(str, path)) for path, _ in paths} ^ flat.keys()
    if missing:
        raise ValueError(f"these weights do not belong to this network: {sorted(missing)[:8]}")
    for path, leaf in paths:
        name = ".".join(map(str, path))
        if flat[name].shape != leaf.shape:
            raise ValueError(f"{name} has shape {flat[name].shape}, expected {leaf.shape}")
    leaves = [leaf.replace(flat[".".join(map(str, path))]) for path, leaf in paths]
    return nnx.from_flat_state([(p, leaf) for (p, _), leaf in zip(paths, leaves, strict=True)])


def classifier(
    make: Callable[[Draws], nnx.Module], *, dtype: jnp.dtype | type = jnp.float32
) -> Classifier:
    """Return the network that `make` builds as a pair of pure functions.

    Args:
      make: called with the `Draws` of a key; its variables are Param or BatchStat, and it is
        called as `module(images, train, key)`.
      dtype: compute type. Params are cast on entry, which costs nothing if the caller did so
        already, once, outside an attack loop. Logits come back in float32 (float64 in x64).

    The layers have gradients of their own: reverse mode works, forward mode (`jax.jvp`) does not,
    and gradients inside of `shard_map` need `check_vma=False`.
    """
    abstract = nnx.eval_shape(lambda: make(Draws(jax.random.key(0))))
    graph, *states = nnx.split(abstract, nnx.Param, nnx.BatchStat)

    def init(key: Array) -> tuple[Params, Params]:
        _, *drawn = nnx.split(make(Draws(key)), nnx.Param, nnx.BatchStat)
        params, stats = map(_flat, drawn)
        return _single(params), _single(stats)

    def apply(params: Params, stats: Params, images: Array, *, train=False, key=None):
        channels = stats["normalize.mean"].shape[0]
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}; divide by 255 for floats in [0, 1]")
        if images.ndim != 4 or images.shape[3] != channels:
            raise ValueError(f"images have shape {images.shape}, expected [B, H, W, {channels}]")
        cast = {name: array.astype(dtype) for name, array in params.items()}
        known = {name: jnp.asarray(array) for name, array in stats.items()}
        module = nnx.merge(graph, _state(cast, states[0]), _state(known, states[1]))
        logits = module(images, train, key)
        wide = logits.dtype if logits.dtype == jnp.float64 else jnp.float32
        moved = _flat(nnx.split(module, nnx.Param, nnx.BatchStat)[-1]) if train else stats
        return logits.astype(wide), moved

    return Classifier(init, apply)


def run_blocks(
    blocks: Sequence[nnx.Module],
    x: Array,
    *,
    train: bool = False,
    key: Array | None = None,
    rates: Sequence[float] = (),
    remat: bool = False,
    scan: bool = False,
) -> Array:
    """Run `x` through the blocks, called as `block(x, drop, train)` with `drop` a `Drop` or None.

    Args:
      key: of the stochastic depth, or keys [B]; every block draws from its own.
      rates: the probability that a block's branches are left out, per block; empty: none is.
      remat: recompute each block in the backward pass instead of storing it.
      scan: compile one block for all of them, which must differ in their arrays only.
    """
    drops: list[Drop | None] = [None] * len(blocks)
    if train and any(rates):
        if key is None:
            raise ValueError("drop_path above 0 draws in training: call apply with a key")
        keys = split(key, len(blocks))
        drops = [Drop(k, rate) for k, rate in zip(keys, rates, strict=True)]
    if not (remat or scan):
        for block, drop in zip(blocks, drops, strict=True):
            x = block(x, drop, train)
        return x

    parts: list[Any] = [nnx.split(block, nnx.Param, nnx.BatchStat) for block in blocks]

    def run(graph):
        def one(x, part):
            params, stats, drop = part
            block = nnx.merge(graph, params, stats)
            x = block(x, drop, train)
            return x, nnx.split(block, nnx.Param, nnx.BatchStat)[-1]

        return jax.checkpoint(one) if remat else one

    arrays = [(params, stats, drop) for (_, params, stats), drop in zip(parts, drops, strict=True)]
    if scan:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
        x, moved = jax.lax.scan(run(parts[0][0]), x, stacked)
        stats = [jax.tree.map(lambda leaf, i=i: leaf[i], moved) for i in range(len(blocks))]
    else:
        stats = []
        for (graph, *_), part in zip(parts, arrays, strict=True):
            x, new = run(graph)(x, part)
            stats.append(new)
    for block, new in zip(blocks, stats, strict=True):
        nnx.update(block, new)
    return x
