"""Arrays on the host, or the blocks of them that a process holds, for hashing."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def by_name(arrays: Any) -> dict[str, Any]:
    """Return the arrays of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def on_host(arrays: Any) -> dict[tuple[str, str], np.ndarray]:
    """Copy what this process must hash, by name and index.

    Arrays that a process holds in full are hashed by the first process, with the index "". If
    `fsdp` splits an array over several hosts, each process hashes its blocks.
    """
    leaves = by_name(arrays)
    copies: dict[tuple[str, str], np.ndarray] = {}
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array) and jax.process_index() == 0:
            leaf.copy_to_host_async()  # all at once
    for name, leaf in leaves.items():
        shards = {str(s.index): s for s in getattr(leaf, "addressable_shards", ())}
        if sum(s.data.size for s in shards.values()) < leaf.size and shards:
            written = [shard for shard in shards.values() if shard.replica_id == 0]
            copies |= {(name, _text(s.index, leaf.shape)): np.array(s.data) for s in written}
        elif jax.process_index() == 0:
            copies[name, ""] = np.array(block(leaf))
    return copies


def _text(index: Sequence[slice], shape: Sequence[int]) -> str:
    ends = (axis.indices(size) for axis, size in zip(index, shape, strict=True))
    return ",".join(f"{start}:{stop}" for start, stop, _ in ends)


def block(array: Any, index: str = "") -> np.ndarray | None:
    """Join a block of an array, such as "0:8,16:32", from this process's devices.

    Without an index it is the full array. None: a part of it is on another host.
    """
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array.addressable_data(0))  # equal on every device
    if not index and getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    axes = index.split(",") if index else [f"0:{size}" for size in array.shape]
    ends = [tuple(map(int, axis.split(":"))) for axis in axes]
    joined, filled = np.empty([stop - start for start, stop in ends], array.dtype), 0
    for shard in {str(shard.index): shard for shard in array.addressable_shards}.values():
        source, target = [], []
        for axis, size, (start, stop) in zip(shard.index, array.shape, ends, strict=True):
            first, last, _ = axis.indices(size)
            low = max(start, first)
            high = max(low, min(stop, last))
            source.append(slice(low - first, high - first))
            target.append(slice(low - start, high - start))
        joined[tuple(target)] = np.asarray(shard.data)[tuple(source)]
        filled += joined[tuple(target)].size
    return joined if filled == joined.size else None
