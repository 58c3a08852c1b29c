"""The only place where NNX modules become pure functions."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from jaxrobust.types import Array, Classifier, Params


def _flat(state) -> Params:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _state(flat: Params, like):
    paths = [(path, leaf) for path, leaf in nnx.to_flat_state(like)]
    missing = {".".join(map(str, path)) for path, _ in paths} ^ flat.keys()
    if missing:
        raise ValueError(f"these weights do not belong to this network: {sorted(missing)[:8]}")
    leaves = [leaf.replace(flat[".".join(map(str, path))]) for path, leaf in paths]
    return nnx.from_flat_state([(p, leaf) for (p, _), leaf in zip(paths, leaves, strict=True)])


def classifier(make: Callable[[nnx.Rngs], nnx.Module], *, dtype=jnp.float32) -> Classifier:
    """The network that `make` builds as a pair of pure functions.

    Args:
      make: called with `nnx.Rngs(params=key)`; its variables are Param or BatchStat.
      dtype: compute type. Params are cast on entry, which costs nothing if the caller did so
        already, once, outside an attack loop. Logits come back in float32 (float64 in x64).

    The layers have gradients of their own: reverse mode works, forward mode (`jax.jvp`) does not.
    """
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))
    graph, *states = nnx.split(abstract, nnx.Param, nnx.BatchStat)

    def init(key: Array) -> tuple[Params, Params]:
        _, *drawn = nnx.split(make(nnx.Rngs(params=key)), nnx.Param, nnx.BatchStat)
        return _flat(drawn[0]), _flat(drawn[1])

    def apply(params: Params, stats: Params, images: Array, *, train=False, key=None):
        del train, key  # no dropout, no batch statistics in this family: both modes are one
        channels = stats["normalize.mean"].shape[0]
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}; divide by 255 for floats in [0, 1]")
        if images.ndim != 4 or images.shape[3] != channels:
            raise ValueError(f"images have shape {images.shape}, expected [B, H, W, {channels}]")
        cast = {name: array.astype(dtype) for name, array in params.items()}
        module = nnx.merge(graph, _state(cast, states[0]), _state(stats, states[1]))
        logits = module(images)
        wide = logits.dtype if logits.dtype == jnp.float64 else jnp.float32
        return logits.astype(wide), stats

    return Classifier(init, apply)
