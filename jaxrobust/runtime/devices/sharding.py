"""Where arrays live: a `data` x `fsdp` mesh, batches over both, large arrays over `fsdp`."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Params = dict[str, Array]
DATA, FSDP = "data", "fsdp"
# Number of values below which copying costs less than a collective. A part must have a 16th of
# this: a tile of a TPU's memory, to which smaller ones are padded.
SMALL = 2**14


def slice_of(device: jax.Device) -> int:
    """Return the number of a TPU's slice; anything else has one."""
    # Chips described without a machine may lack it.
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def slices_of(mesh: Mesh) -> int:
    """Count the slices of a mesh, between which only a data center network connects chips."""
    return len({slice_of(device) for device in mesh.devices.flat})


def make_mesh(
    devices: Sequence[jax.Device] | None = None,
    *,
    fsdp: int = 1,
    slice_of: Callable[[jax.Device], int] = slice_of,
) -> Mesh:
    """Make a mesh of devices in host order, so that each host holds consecutive rows of a batch.

    Groups of `fsdp` neighbors (0: the devices of a slice) share one copy of the state. No group
    spans slices: only gradients cross the network between them, once per step. Axes are Auto: with
    JAX's default, Explicit, network code would have to specify shardings.
    """
    devices = sorted(
        jax.devices() if devices is None else devices,
        key=lambda d: (slice_of(d), d.process_index, d.id),
    )
    sizes = list(Counter(map(slice_of, devices)).values())
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the slices have {', '.join(map(str, sizes))} devices; start slices of equal size"
        )
    fsdp = fsdp or sizes[0]
    check_groups(fsdp, sizes[0], "devices" if len(sizes) == 1 else "devices of a slice")
    grid = np.array(devices).reshape(-1, fsdp)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def check_groups(fsdp: int, count: int, noun: str = "devices") -> None:
    """Reject groups that do not divide this many devices, and name those that do."""
    if fsdp < 1 or count % fsdp:
        fits = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ValueError(f"mesh.fsdp={fsdp} does not divide the {count} {noun}; use one of {fits}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding with a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_image(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def global_arrays(mesh: Mesh, local: Any) -> Any:
    """Join a tree of this process's np.ndarrays with the other processes' to arrays on the mesh."""
    sharding = by_image(mesh)
    return jax.tree.map(
        lambda part: jax.make_array_from_process_local_data(sharding, np.asarray(part)), local
    )


def split_axis(name: str, shape: tuple[int, ...], parts: int) -> int | None:
    """Return the largest axis that `parts` divides, the last among equals; None: do not split."""
    if parts == 1 or math.prod(shape) < _small(parts) or name.startswith("normalize."):
        return None
    fits = [(size, axis) for axis, size in enumerate(shape) if size % parts == 0]
    return max(fits)[1] if fits else None


def _small(parts: int) -> float:
    """Return the number of values below which an array is not split."""
    return SMALL * max(1, parts / 16)


def of_state(mesh: Mesh, abstract: Any) -> Any:
    """Apply `split_axis` to each leaf by its name, which averages and moments share."""

    def sharding(path, leaf) -> NamedSharding:
        name = getattr(path[-1], "key", "") if path else ""
        return NamedSharding(mesh, _spec(str(name), leaf.shape, mesh.shape[FSDP]))

    return jax.tree.map_with_path(sharding, abstract)


def _spec(name: str, shape: tuple[int, ...], parts: int) -> PartitionSpec:
    axis = split_axis(name, shape, parts)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP)


def _gathered(array: Array, axis: int, platform: str) -> Array:
    """Gather an array in its type, whatever it was rounded from."""
    if platform == "tpu":  # bitcasts are copies there
        return lax.all_gather(lax.optimization_barrier(array), FSDP, axis=axis, tiled=True)
    # As bits: XLA's CPU compiler sends bfloat16 as float32, and any may gather before rounding.
    bits = lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    bits = lax.all_gather(bits, FSDP, axis=axis, tiled=True)
    return lax.bitcast_convert_type(bits, array.dtype)


def _over_all(collective: Callable[..., Array], tree: Any, *, below: float) -> Any:
    """Run a collective over all devices; arrays with fewer values than `below` share one."""
    arrays, structure = jax.tree.flatten(tree)
    row, arrays_of = ravel_pytree({i: a for i, a in enumerate(arrays) if a.size < below})
    done = arrays_of(collective(row, (DATA, FSDP)))
    done |= {i: collective(a, (DATA, FSDP)) for i, a in enumerate(arrays) if i not in done}
    return jax.tree.unflatten(structure, [done[i] for i in range(len(arrays))])


class Spread(NamedTuple):
    """Collectives that turn one device's computation into that of all; use them inside `each`.

    `each(f, copies=n, split=m)` maps f on one device to f on the mesh. Its arguments are
    parameters, `n` trees copied to every device, then `m` trees split by image. Its result must be
    equal on all devices; with `gradients=True`, a tree like the parameters precedes it.
    """

    each: Callable[..., Callable[..., Any]]
    gather: Callable[[Params], Params]  # one device's part of the parameters -> all of them
    reduce: Callable[[Params], Params]  # all gradients -> one device's part of their mean
    mean: Callable[[Any], Any]  # over the devices
    norm: Callable[[Params], Array]  # of `reduce`'s output; outside of `each`, with one collective


def spread(mesh: Mesh, params: Params) -> Spread:
    """Return the collectives for parameters of these shapes, sharded by `of_state`.

    The collectives are explicit. The partitioner would gather parameters wherever they are used, in
    each step of the attack, and reduce gradients in the compute type (730 gathers instead of 50 for
    a ViT-S on 16 chips).
    """
    parts, platform = mesh.shape[FSDP], mesh.devices.flat[0].platform
    axes = {name: split_axis(name, p.shape, parts) for name, p in params.items()}
    specs = {name: _spec(name, p.shape, parts) for name, p in params.items()}

    def gather(params: Params) -> Params:
        return {
            name: array if (axis := axes[name]) is None else _gathered(array, axis, platform)
            for name, array in params.items()
        }

    def reduce(grads: Params) -> Params:
        wide = {name: jnp.promote_types(g.dtype, jnp.float32) for name, g in grads.items()}
        grads = {name: g.astype(wide[name]) / mesh.size for name, g in grads.items()}
        copied = {name: g for name, g in grads.items() if axes[name] is None}
        copied = _over_all(lax.psum, copied, below=_small(parts))
        split = {
            name: lax.psum_scatter(g, FSDP, scatter_dimension=axis, tiled=True)
            for name, g in grads.items()
            if (axis := axes[name]) is not None
        }
        return copied | (lax.psum(split, DATA) if mesh.shape[DATA] > 1 else split)

    def norm(grads: Params) -> Array:
        squares = {name: jnp.sum(jnp.square(g)) for name, g in grads.items()}
        split = sum(square for name, square in squares.items() if axes[name] is not None)
        copied = sum(square for name, square in squares.items() if axes[name] is None)
        return jnp.sqrt(lax.psum(split, FSDP) + copied)

    norm_of_all = jax.shard_map(
        norm, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False
    )

    def each(
        function: Callable[..., Any], *, copies: int, split: int, gradients: bool = False
    ) -> Callable[..., Any]:
        of_arguments = (PartitionSpec(),) * copies + (PartitionSpec((DATA, FSDP)),) * split
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(specs, *of_arguments),
            out_specs=(specs, PartitionSpec()) if gradients else PartitionSpec(),
            check_vma=False,  # the layers define their own gradients
        )

    return Spread(
        each, gather, reduce, partial(_over_all, lax.pmean, below=_small(parts)), norm_of_all
    )
