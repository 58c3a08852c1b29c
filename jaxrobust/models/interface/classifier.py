"""The only place where NNX modules become pure functions."""

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


def _single(flat: Params) -> Params:
    return {name: array.astype(jnp.float32) for name, array in flat.items()}


def _state(flat: Params, like):
    named = [(".".join(map(str, path)), path, leaf) for path, leaf in nnx.to_flat_state(like)]
    if missing := {name for name, *_ in named} ^ flat.keys():
        raise ValueError(f"these weights do not belong to this network: {sorted(missing)[:8]}")
    for name, _, leaf in named:
        if flat[name].shape != leaf.shape:
            raise ValueError(f"{name} has shape {flat[name].shape}, expected {leaf.shape}")
    return nnx.from_flat_state([(path, leaf.replace(flat[name])) for name, path, leaf in named])


class OfModule(Classifier):
    """A network that can give the module that it is made of: `make(rngs)`."""

    make: Callable[[Any], nnx.Module]
    dtype: Any  # compute type


def classifier(make: Callable[[Draws], nnx.Module], *, dtype: Any = jnp.float32) -> OfModule:
    """Return the network that `make` builds as a pair of pure functions.

    Args:
      make: called with the `Draws` of a key; its variables are Param or BatchStat, and it is
        called as `module(images, train, key)`.
      dtype: compute type. Params are cast on entry, which costs nothing if the caller did so
        already, once, outside an attack loop. Logits come back in float32 (float64 in x64).

    The layers have gradients of their own: reverse mode works, forward mode (`jax.jvp`) does not,
    and gradients inside of `shard_map` need `check_vma=False`.
    """
    dtype = jnp.dtype(dtype)
    abstract = nnx.eval_shape(lambda: make(Draws(jax.random.key(0))))
    graph, *states = nnx.split(abstract, nnx.Param, nnx.BatchStat)

    def init(key: Array) -> tuple[Params, Params]:
        _, *drawn = nnx.split(make(Draws(key)), nnx.Param, nnx.BatchStat)
        params, stats = map(_flat, drawn)
        return _single(params), _single(stats)

    def apply(params: Params, stats: Params, images: Array, *, train=False, key=None):
        _check_images(images, stats["normalize.mean"].shape[0])
        cast = {name: array.astype(dtype) for name, array in params.items()}
        known = {name: jnp.asarray(array) for name, array in stats.items()}
        module = nnx.merge(graph, _state(cast, states[0]), _state(known, states[1]))
        logits = module(images, train, key)
        moved = _flat(nnx.split(module, nnx.Param, nnx.BatchStat)[-1]) if train else stats
        return _wide(logits), moved

    network = OfModule(init, apply)
    network.make, network.dtype = make, dtype
    return network


def showing_batches(net: Classifier) -> Classifier | None:
    """Return the network whose statistics after a pass in training are those of its images alone,
    as batch norms of PyTorch's momentum 1 have them; None: it is not made of modules of ours.

    Norms that a pass does not call, and what is no batch norm's, return what they had.
    """
    if not isinstance(net, OfModule):
        return None

    def make(rngs: Any) -> nnx.Module:
        module = net.make(rngs)
        for _, part in nnx.iter_modules(module):
            if isinstance(part, BatchNorm):
                part.momentum = 1.0
        return module

    return classifier(make, dtype=net.dtype)


def _check_images(images: Array, channels: int) -> None:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; divide by 255 for floats in [0, 1]")
    if images.ndim != 4 or images.shape[3] != channels:
        raise ValueError(f"images have shape {images.shape}, expected [B, H, W, {channels}]")


def _wide(logits: Array) -> Array:
    return logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)


def loaded(module: nnx.Module, params: Params, stats: Params) -> nnx.Module:
    """Replace the weights of a module of ours, in place.

    Raises:
      ValueError: they do not belong to it.
    """
    groups: list[Any] = [*nnx.split(module, nnx.Param, nnx.BatchStat)][1:]
    nnx.update(module, *map(_state, (params, stats), groups))
    return module


def _split(module: nnx.Module) -> list[Any]:
    """Return a module's graph, parameters, random streams, other variables and plain arrays."""
    return [*nnx.split(module, nnx.Param, nnx.RngState, nnx.Variable, ...)]


def of_foreign(make: Callable[[nnx.Rngs], nnx.Module], *, in_channels: int) -> Classifier:
    """Return any NNX module as a pair of pure functions.

    Its `nnx.Param`s are the parameters, its other variables, which must be floats, the statistics;
    arrays that are no variables are constants. The modes `use_running_average` and `deterministic`
    of its layers are those of evaluation or of training, whatever it was made with.

    Args:
      make: called with `nnx.Rngs`, here and in a trace. The module is called as `module(images)`,
        and is told `train` and `key` if its call has parameters of these names.
      in_channels: of the images.

    In training its random streams (dropout) are those of the key; of keys [B], of the first one:
    one draw for all images of a device.
    Raises:
      ValueError: a variable that is no float.
    """
    # Not in a trace, where NNX takes plain arrays for settings.
    module = make(nnx.Rngs(0))
    takes = {"train", "key"} & inspect.signature(type(module).__call__).parameters.keys()
    graph, *states, constants = _split(module)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), states)
    del module, states  # the arrays go
    for path, leaf in (*nnx.to_flat_state(like[0]), *nnx.to_flat_state(like[2])):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"the variable {'.'.join(map(str, path))} is {leaf.dtype}, and parameters and "
                "statistics are floats; make it one, or an array that is no variable"
            )

    def init(key: Array) -> tuple[Params, Params]:
        _, params, _, stats, _ = _split(make(nnx.Rngs(key)))
        return _single(_flat(params)), _single(_flat(stats))

    def apply(params: Params, stats: Params, images: Array, *, train=False, key=None):
        _check_images(images, in_channels)
        states = [_state(params, like[0]), _streams(like[1], key), _state(stats, like[2])]
        module = nnx.merge(graph, *states, constants)
        modes = {"use_running_average": not train, "deterministic": not train}
        module = nnx.view(module, raise_if_not_found=False, **modes)
        given = {"train": train, "key": key}
        logits = module(images, **{name: given[name] for name in takes})
        if not train:
            return _wide(logits), stats
        moved = _flat(_split(module)[3])
        return _wide(logits), {name: moved[name].astype(s.dtype) for name, s in stats.items()}

    return Classifier(init, apply)


def _streams(like: Any, key: Array | None) -> Any:
    """Return random streams of a key, the first of several; without one, of any."""
    key = jax.random.key(0) if key is None else key if key.ndim == 0 else key[0]
    made = []
    for number, (path, leaf) in enumerate(nnx.to_flat_state(like)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.random.fold_in(key, number)
            value = jax.random.split(own, leaf.shape) if leaf.shape else own
        else:
            value = jnp.zeros(leaf.shape, leaf.dtype)
        made.append((path, leaf.replace(value)))
    return nnx.from_flat_state(made)


def of_stages(v: Any, train: bool, key: Array | None) -> list[dict[str, Any]]:
    """List the arguments of `run_blocks` in each stage of a row's `depths`.

    Each has another key; the blocks' rates grow linearly from 0 at the network's first to
    `drop_path` at its last.
    """
    keys = [None] * len(v.depths) if key is None else split(key, len(v.depths))
    rates, ends = np.linspace(0, v.drop_path, sum(v.depths)).tolist(), np.cumsum(v.depths)
    return [
        {"train": train, "key": k, "rates": rates[end - depth : end], **stored(v)}
        for end, depth, k in zip(ends, v.depths, keys, strict=True)
    ]


def of_one_stage(v: Any, train: bool, key: Array | None) -> dict[str, Any]:
    """Choose the same for the blocks of a row with a `depth`."""
    rates = np.linspace(0, v.drop_path, v.depth).tolist()
    return {"train": train, "key": key, "rates": rates, **stored(v)}


def stored(v: Any) -> dict[str, bool]:
    """Return the settings of a row by which its blocks are compiled and stored."""
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
      x: an array, or several that each block takes and returns together.
      key: of the stochastic depth, or keys [B]; every block draws from its own.
      rates: the probability that a block's branches are left out, per block; empty: none is.
      draws: whether blocks draw in training beyond that, such as dropout.
      remat: recompute each block in the backward pass instead of storing it.
      scan: compile one block for all of them, which must differ in their arrays only.
    """
    drops: list[Drop | None] = [None] * len(blocks)
    if train and (draws or any(rates)):
        if key is None:
            what = "dropout" if draws else "drop_path"
            raise ValueError(f"{what} above 0 draws in training: call apply with a key")
        keys, rates = split(key, len(blocks)), rates or (0.0,) * len(blocks)
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
