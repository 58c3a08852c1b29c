"""The loss around a network's weights, in a plane of two random directions.

Source: Li et al. 2018 (arXiv 1712.09913), filter normalisation: a direction has the norm of the
weights filter by filter, and does not move biases, norms and statistics.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxrobust.runtime.devices import sharding
from jaxrobust.types import Array, Classifier, Params

_TINY = 1e-10


def direction(params: dict[str, Any], seed: int, number: int) -> dict[str, np.ndarray]:
    """Return direction `number` of a seed: normal entries, each filter scaled to the norm it has.

    A filter gives one output of a kernel; other arrays of several axes count as one, and those of
    one axis stay where they are. An array's draws depend on its name.
    """
    scaled = {}
    for name, value in params.items():
        weights = np.asarray(value, np.float32)
        if weights.ndim < 2:
            scaled[name] = np.zeros_like(weights)
            continue
        key = [seed, (number << 32) + zlib.crc32(name.encode())]
        drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(weights.shape)
        axes = tuple(range(weights.ndim - 1)) if name.endswith(".kernel") else None
        have, want = (
            np.sqrt(np.sum(np.square(array, dtype=np.float64), axes, keepdims=True))
            for array in (drawn, weights)
        )
        scaled[name] = (drawn * (want / (have + _TINY))).astype(np.float32)
    return scaled


def losses(
    net: Classifier,
    params: Params,
    stats: Params,
    directions: Sequence[dict[str, np.ndarray]],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return a function of points f32[P,2] to mean cross-entropy and accuracy there, f64[P] each.

    The devices of `mesh` share the points; `batch` changes the sum's rounding only.
    """
    steps = -(-len(images) // batch)
    short = steps * batch - len(images)
    padded = np.concatenate([images, np.zeros((short, *images.shape[1:]), np.float32)])
    grouped = (
        padded.reshape(steps, batch, *images.shape[1:]),
        np.concatenate([labels, np.zeros(short, np.int32)]).astype(np.int32).reshape(steps, batch),
        (np.arange(steps * batch) < len(images)).reshape(steps, batch),
    )
    split = PartitionSpec((sharding.DATA, sharding.FSDP))
    specs = (*[PartitionSpec()] * 5, split)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    def of_points(
        params: Params, stats: Params, first: Params, second: Params, data: Any, points: Array
    ) -> Any:
        def at(point: Array) -> tuple[Array, Array]:
            a, b = point
            moved = {n: value + a * first[n] + b * second[n] for n, value in params.items()}

            def add(totals: Any, group: Any) -> tuple[Any, None]:
                x, y, mask = group
                logits = net.apply(moved, stats, x)[0].astype(jnp.float32)
                of_label = jnp.take_along_axis(logits, y[:, None], -1)[:, 0]
                each = jax.nn.logsumexp(logits, -1) - of_label
                right = (logits.argmax(-1) == y) & mask & jnp.isfinite(each)
                return (totals[0] + jnp.where(mask, each, 0).sum(), totals[1] + right.sum()), None

            zero = (jnp.float32(0), jnp.int32(0))
            return jax.lax.scan(add, zero, data)[0]

        return jax.lax.map(at, points)

    held = jax.device_put((params, stats, *directions, grouped), sharding.replicated(mesh))

    def call(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        short = -len(points) % mesh.size
        padded_points = np.concatenate([points, np.zeros((short, 2))]).astype(np.float32)
        sums = jax.device_get(of_points(*held, padded_points))
        loss, right = (of[: len(points)].astype(np.float64) / len(images) for of in sums)
        return loss, right

    return call
