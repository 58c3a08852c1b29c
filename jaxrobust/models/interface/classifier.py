"""Turns NNX modules into pure functions; nothing else does."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.modules.basic import BatchNorm
from jaxrobust.models.modules.draws import Draws, Drop, split
from jaxrobust.types import Array, Classifier, Params


def _flat(state) -> Params:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _in_float32(*states) -> tuple[Params, ...]:
    return tuple({k: a.astype(jnp.float32) for k, a in _flat(state).items()} for state in states)


def _state(flat: Params, template):
    leaves = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(template)}
    if differing := leaves.keys() ^ flat.keys():
        raise ValueError(f"these weights do not belong to this network: {sorted(differing)[:8]}")
    for name, (_, leaf) in leaves.items():
        if flat[name].shape != leaf.shape:
            raise ValueError(f"{name} has shape {flat[name].shape}, expected {leaf.shape}")
    return nnx.from_flat_state([(p, leaf.replace(flat[k])) for k, (p, leaf) in leaves.items()])


class OfModule(Classifier):
    """A network that keeps its module: `make(rngs)`."""

    make: Callable[[Any], nnx.Module]
    dtype: Any  # compute type


def classifier(make: Callable[[Draws], nnx.Module], *, dtype: Any = jnp.float32) -> OfModule:
    """Return the network that `make` builds as a pair of pure functions.

    Args:
      make: called with the `Draws` of a key; returns a module with only Param and BatchStat
        variables, called as `module(images, train, key)`.
      dtype: compute type. Params are cast on entry; this is free if the caller has cast them
        already, outside an attack loop. Logits are float32 (float64 in x64).

    The layers define their own gradients: reverse mode works, forward mode (`jax.jvp`) does not,
    and gradients inside `shard_map` need `check_vma=False`.
    """
    # Layers use Pallas, which defines contexts when imported; see `kernels.tpu.interpreted`.
    importlib.import_module("jax.experimental.pallas.fuser")
    dtype = jnp.dtype(dtype)
    abstract = nnx.eval_shape(lambda: make(Draws(jax.random.key(0))))
    graph, *states = nnx.split(abstract, nnx.Param, nnx.BatchStat)

    def init(key: Array) -> tuple[Params, Params]:
        _, *state = nnx.split(make(Draws(key)), nnx.Param, nnx.BatchStat)
        params, stats = _in_float32(*state)
        return params, stats

    def apply(params: Params, stats: Params, images: Array, *, train=False, key=None):
        check_images(images, stats["normalize.mean"].shape[0])
        params = {name: array.astype(dtype) for name, array in params.items()}
        arrays = {name: jnp.asarray(array) for name, array in stats.items()}
        module = nnx.merge(graph, _state(params, states[0]), _state(arrays, states[1]))
        logits = module(images, train, key)
        if train:
            stats = _flat(nnx.split(module, nnx.Param, nnx.BatchStat)[-1])
        return _wide(logits), stats

    network = OfModule(init, apply)
    network.make, network.dtype = make, dtype
    return network


def showing_batches(net: Classifier) -> Classifier | None:
    """Set the momentum of all batch norms to 1 (PyTorch's), so that a training pass returns the
    statistics of its images; None: the network is not an `OfModule`.
    """
    if not isinstance(net, OfModule):
        return None

    def make(rngs: Any) -> nnx.Module:
        module = net.make(rngs)
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, BatchNorm):
                layer.momentum = 1.0
        return module

    return classifier(make, dtype=net.dtype)


def check_images(images: Array, channels: int) -> None:
    """Raise `ValueError` if images are not floats [B,H,W,channels]."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; divide by 255 for floats in [0, 1]")
    if images.ndim != 4 or images.shape[3] != channels:
        raise ValueError(f"images have shape {images.shape}, expected [B, H, W, {channels}]")


def _wide(logits: Array) -> Array:
    return logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)


def loaded(module: nnx.Module, params: Params, stats: Params) -> nnx.Module:
    """Replace the weights in an `OfModule`'s module in place; `ValueError` if they do not fit."""
    _, *groups = nnx.split(module, nnx.Param, nnx.BatchStat)
    nnx.update(module, *map(_state, (params, stats), groups))
    return module


def _split(module: nnx.Module) -> list[Any]:
    """Return a module's graph, parameters, random streams, other variables and plain arrays."""
    return [*nnx.split(module, nnx.Param, nnx.RngState, nnx.Variable, ...)]


def of_foreign(make: Callable[[nnx.Rngs], nnx.Module], *, in_channels: int) -> Classifier:
    """Turn any NNX module into a pair of pure functions.

    Its `nnx.Param`s are the parameters, its other variables the statistics; arrays outside of
    variables are constants. `use_running_average` and `deterministic` of its layers are set for
    evaluation or training, whatever their initial values.

    Args:
      make: called with `nnx.Rngs`, here and while tracing. The module is called as
        `module(images)`, plus `train` and `key` if its call has parameters of these names.
      in_channels: channels of the images.

    In training, its random streams (dropout) come from the key; with keys [B], from the first one,
    so all images of a device share one draw.
    Raises:
      ValueError: a variable that is not a float array.
    """
    module = make(nnx.Rngs(0))  # untraced: in a trace, NNX would take plain arrays for settings
    takes = {"train", "key"} & inspect.signature(type(module).__call__).parameters.keys()
    graph, *states, constants = _split(module)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), states)
    del module, states  # frees the arrays
    for path, leaf in (*nnx.to_flat_state(shapes[0]), *nnx.to_flat_state(shapes[2])):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"the variable {'.'.join(map(str, path))} is {leaf.dtype}, but parameters and "
                "statistics must be floats; make it a float, or an array that is not a variable"
            )

    def init(key: Array) -> tuple[Params, Params]:
        _, params, _, stats, _ = _split(make(nnx.Rngs(key)))
        params, stats = _in_float32(params, stats)
        return params, stats

    def apply(params: Params, stats: Params, images: Array, *, train=False, key=None):
        check_images(images, in_channels)
        states = [_state(params, shapes[0]), _streams(shapes[1], key), _state(stats, shapes[2])]
        module = nnx.merge(graph, *states, constants)
        modes = {"use_running_average": not train, "deterministic": not train}
        module = nnx.view(module, raise_if_not_found=False, **modes)
        mode = {"train": train, "key": key}
        logits = module(images, **{name: mode[name] for name in takes})
        if train:
            new = _flat(_split(module)[3])
            stats = {name: new[name].astype(old.dtype) for name, old in stats.items()}
        return _wide(logits), stats

    return Classifier(init, apply)


def _streams(shapes: Any, key: Array | None) -> Any:
    """Return random streams drawn from a key, the first of keys [B], or a fixed key."""
    key = jax.random.key(0) if key is None else key if key.ndim == 0 else key[0]
    leaves = []
    for number, (path, leaf) in enumerate(nnx.to_flat_state(shapes)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            value = jax.random.fold_in(key, number)
            value = jax.random.split(value, leaf.shape) if leaf.shape else value
        else:
            value = jnp.zeros(leaf.shape, leaf.dtype)
        leaves.append((path, leaf.replace(value)))
    return nnx.from_flat_state(leaves)


def of_stages(v: Any, train: bool, key: Array | None) -> list[dict[str, Any]]:
    """List the arguments of `run_blocks` for each stage in a row's `depths`.

    Each stage has its own key; drop rates grow linearly from 0 at the network's first block to
    `drop_path` at its last.
    """
    keys = [None] * len(v.depths) if key is None else split(key, len(v.depths))
    rates, ends = np.linspace(0, v.drop_path, sum(v.depths)).tolist(), np.cumsum(v.depths)
    return [
        {"train": train, "key": k, "rates": rates[end - depth : end], **_storage(v)}
        for end, depth, k in zip(ends, v.depths, keys, strict=True)
    ]


def of_one_stage(v: Any, train: bool, key: Array | None) -> dict[str, Any]:
    """Return the same for a row with a single `depth`."""
    rates = np.linspace(0, v.drop_path, v.depth).tolist()
    return {"train": train, "key": key, "rates": rates, **_storage(v)}


def _storage(v: Any) -> dict[str, bool]:
    return {name: getattr(v, name) for name in ("remat", "scan") if name in v._fields}


def run_blocks(
    blocks: Sequence[nnx.Module],
    x: Any,
    *,
    train: bool = False,
    key: Array | None = None,
    rates: Sequence[float] = (),
    draws: bool = False,
    remat: bool = False,
    scan: bool = False,
) -> Any:
    """Run `x` through the blocks, called as `block(x, drop, train)` with `drop` a `Drop` or None.

    Args:
      x: an array, or a pytree of arrays that each block takes and returns.
      key: for stochastic depth, or keys [B]; split between the blocks.
      rates: per block, the probability of dropping its branches; empty: 0.
      draws: whether blocks use randomness in training beyond that, such as dropout.
      remat: recompute each block in the backward pass instead of storing it.
      scan: compile one block for all; the blocks may differ only in their arrays.
    """
    drops: list[Drop | None] = [None] * len(blocks)
    if train and (draws or any(rates)):
        if key is None:
            name = "dropout" if draws else "drop_path"
            raise ValueError(f"{name} above 0 needs randomness in training: call apply with a key")
        keys, rates = split(key, len(blocks)), rates or (0.0,) * len(blocks)
        drops = [Drop(k, rate) for k, rate in zip(keys, rates, strict=True)]
    if not (remat or scan):
        for block, drop in zip(blocks, drops, strict=True):
            x = block(x, drop, train)
        return x

    parts: list[Any] = [nnx.split(block, nnx.Param, nnx.BatchStat) for block in blocks]

    def body(graph):
        def run(x, arrays):
            params, stats, drop = arrays
            block = nnx.merge(graph, params, stats)
            x = block(x, drop, train)
            return x, nnx.split(block, nnx.Param, nnx.BatchStat)[-1]

        return jax.checkpoint(run) if remat else run

    arrays = [(params, stats, drop) for (_, params, stats), drop in zip(parts, drops, strict=True)]
    if scan:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
        x, new = jax.lax.scan(body(parts[0][0]), x, stacked)
        stats = [jax.tree.map(lambda leaf, i=i: leaf[i], new) for i in range(len(blocks))]
    else:
        stats = []
        for (graph, *_), block_arrays in zip(parts, arrays, strict=True):
            x, new = body(graph)(x, block_arrays)
            stats.append(new)
    for block, new in zip(blocks, stats, strict=True):
        nnx.update(block, new)
    return x
