"""What every kernel declares: its blocks of images, and its cost."""

import json
import math
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.primitives import device_kind

Array = jax.Array
LANES, SUBLANES = 128, 8  # of a vector register, in values of 32 bits
_UNITS = 4  # matrix units of 128 x 128; also the vector operations per cycle
SCOPED = 16 * 2**20  # default fast memory of a kernel in bytes; all that a TPU v4 has
_MORE = 64 * 2**20  # what chips since v5e give a kernel on request
# Cycles in the compiler's final schedule over counted ones, by chip and kernel.
SCHEDULED = json.loads(resources.files("jaxrobust.models").joinpath("scheduled.json").read_text())
_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # chips without more


def fast_memory() -> int:
    """Count the bytes that a kernel may request on the chips that a program is traced for."""
    return SCOPED if device_kind() in _SMALL else _MORE


def widened_to(size: int, tile: int) -> int:
    """Round a size up to full tiles."""
    return -(-size // tile) * tile


def tiled(shape: Sequence[int], itemsize: int) -> int:
    """Count the bytes of an array in fast memory, stored in tiles of 8 rows of 128 values."""
    *outer, rows, columns = (1, *shape) if len(shape) == 1 else shape
    tile_rows, tile_columns = widened_to(rows, SUBLANES), widened_to(columns, LANES)
    return math.prod(outer) * tile_rows * tile_columns * itemsize


def lane_groups(channels: int, size: int = LANES) -> list[slice]:
    """List the channels of each register, or of each group of registers."""
    return [slice(c, min(c + size, channels)) for c in range(0, channels, size)]


def thirds(dim: int, lanes: slice) -> list[slice]:
    """Locate the queries, keys and values of a group of heads in f[..,3*D]."""
    return [slice(start + lanes.start, start + lanes.stop) for start in (0, dim, 2 * dim)]


def softmax(logits: Array, axis: int = -1) -> Array:
    """Compute the softmax."""
    powers = jnp.exp(logits - logits.max(axis, keepdims=True))
    return powers * (1 / powers.sum(axis, keepdims=True))


def softmax_gradient(p: Array, to_p: Array, axis: int = -1) -> Array:
    """Compute the gradient of `softmax` from its result `p` and that result's gradient."""
    return p * (to_p - (p * to_p).sum(axis, keepdims=True))


class KernelCost(NamedTuple):
    """Operations on one image, and their cycles by hand: see `SCHEDULED`."""

    flops: float = 0
    powers: float = 0
    cycles: float = 0

    def __add__(self, other: "KernelCost") -> "KernelCost":  # type: ignore[override]
        return KernelCost(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> "KernelCost":  # type: ignore[override]
        return KernelCost(*(times * a for a in self))


def product(rows: int, inner: int, columns: int) -> KernelCost:
    """Count a product f[rows,inner] @ f[inner,columns] of bfloat16.

    A matrix unit takes one row of 128 values per cycle, and all rows pass through each 128 x 128
    tile of the right operand.
    """
    tiles = math.ceil(inner / LANES) * math.ceil(columns / LANES)
    return KernelCost(2.0 * rows * inner * columns, 0, rows * tiles / _UNITS)


def elementwise(rows: int, columns: int, operations: float, powers: float = 0) -> KernelCost:
    """Count vector operations on f32[rows,columns]; `powers` of them are exponentials."""
    registers = math.ceil(rows / SUBLANES) * math.ceil(columns / LANES)
    flops = rows * columns * operations
    return KernelCost(flops, rows * columns * powers, registers * (operations / _UNITS + powers))


class Kernel(NamedTuple):
    """A kernel: its name in a program's text, its body and its resources."""

    name: str
    body: Callable[..., None]  # see `over_images`
    cost: KernelCost  # per image
    scratch: Sequence[tuple[int, ...]] = ()  # shapes of f32 arrays in fast memory
    value_bytes: int = 0  # taken by the body's values


def over_images(
    kernel: Kernel,
    arrays: Sequence[Array],
    outs: Sequence[tuple[int, ...] | jax.ShapeDtypeStruct],
    *,
    per: int = 1,
    repeated: Sequence[Array] = (),
    parameters: Sequence[Array] = (),
    sums: Sequence[tuple[int, ...]] = (),
) -> list[Array]:
    """Run a kernel on `per` images at a time.

    Args:
      kernel: its body receives references to blocks f[per,..] of `arrays` and of `repeated`, to
        `parameters`, to blocks of the results, to `sums`, and to `scratch`.
      arrays: f[B,..].
      outs: shapes of the results per image, of the first array's type; or shapes with types.
      per: divides B.
      repeated: f[P,..] with P one, or a multiple of `per` that divides B; image i uses row i mod P.
      sums: shapes of f32 results that all images update in turn and the first one clears; a chip
        with two cores then uses only one.
    """
    batch, dtype = arrays[0].shape[0], arrays[0].dtype
    typed = [jax.ShapeDtypeStruct(o, dtype) if isinstance(o, tuple) else o for o in outs]
    results = [jax.ShapeDtypeStruct((batch, *o.shape), o.dtype) for o in typed]
    totals = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums]

    def block(array: Any) -> Any:
        zeros = (0,) * (array.ndim - 1)
        if array.shape[0] == 1:  # one row shared by all images
            return pl.BlockSpec(array.shape, lambda i: (0, *zeros))
        turns = np.int32(array.shape[0] // per)
        return pl.BlockSpec((per, *array.shape[1:]), lambda i: (lax.rem(i, turns), *zeros))

    def once(array: Any) -> Any:  # a single buffer, since no next one follows
        return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))

    moving: list[Any] = [*arrays, *repeated, *results]
    fixed: list[Any] = [*parameters, *totals]
    # The next blocks arrive in the meantime.
    needed = sum(2 * min(per, a.shape[0]) * tiled(a.shape[1:], a.dtype.itemsize) for a in moving)
    needed += sum(tiled(a.shape, a.dtype.itemsize) for a in fixed) + kernel.value_bytes
    needed += sum(tiled(shape, 4) for shape in kernel.scratch)
    total = kernel.cost * batch
    share = SCHEDULED.get(device_kind(), {}).get(kernel.name, 1)
    run = pl.pallas_call(
        kernel.body,
        out_shape=[*results, *totals],
        grid=(batch // per,),
        in_specs=[*map(block, (*arrays, *repeated)), *map(once, parameters)],
        out_specs=[*map(block, results), *map(once, totals)],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in kernel.scratch],
        name=kernel.name,
        interpret=tpu.interpreted.value,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if sums else "parallel",),
            vmem_limit_bytes=None if needed < SCOPED else _MORE,
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(total.flops),
            transcendentals=int(total.powers),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*moving, *fixed)),
        ),
        metadata={"cycles": str(int(total.cycles * share))},
    )
    return [*run(*arrays, *repeated, *parameters)]


def clear_at_first(sums: Sequence[Any]) -> None:
    """Clear references to sums over images when the kernel processes the first one."""

    @pl.when(pl.program_id(0) == 0)
    def clear() -> None:
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)


def dot(a: Array, b: Array, axes: str) -> Array:
    """Multiply matrices into float32; `axes` names the summed axes: "nt" is `a @ b.T`.

    Products of bfloat16 are exact at any JAX precision, and their kernel accepts no other.
    """
    precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    summed = ((0,) if axes[0] == "t" else (1,), (1,) if axes[1] == "t" else (0,))
    return lax.dot_general(
        a, b, (summed, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
