"""What every kernel declares: its blocks of images, and what it costs."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrobust.runtime.text.progress import say

Array = jax.Array
LANES, SUBLANES = 128, 8  # of a vector register, in values of 32 bits
_UNITS = 4  # matrix units of 128 x 128, and as many vector operations in a cycle
SCOPED = 16 * 2**20  # bytes of fast memory for a kernel, which a TPU v4 has and others give unasked
_MORE = 64 * 2**20  # what chips since v5e give to a kernel that asks for it
_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # chips without that
# Whether JAX's interpreter runs the kernels that are traced here, on any platform.
interpreted = jax.make_user_context(default_value=False)


def plain(layer: str, reason: str | None) -> bool:
    """Decide for XLA's path where no kernel takes `layer`, and say so once on a TPU."""
    if reason:
        _say_once(f"{layer} takes XLA's path: {reason}")
    return reason is not None


@functools.cache
def _say_once(sentence: str) -> None:
    if jax.default_backend() == "tpu":
        say(sentence)


def fast_memory() -> int:
    """Count the bytes that a kernel may ask for on the chips that a program is traced for."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    kind = described.device_kind if described else jax.devices()[0].device_kind
    return SCOPED if kind in _SMALL else _MORE


def widened_to(size: int, tile: int) -> int:
    """Round a size up to whole tiles."""
    return -(-size // tile) * tile


def tiled(shape: Sequence[int], itemsize: int) -> int:
    """Count the bytes of an array in fast memory, in tiles of 8 rows of 128 values."""
    *outer, rows, columns = (1, *shape) if len(shape) == 1 else shape
    tile_rows, tile_columns = widened_to(rows, SUBLANES), widened_to(columns, LANES)
    return math.prod(outer) * tile_rows * tile_columns * itemsize


def lane_groups(channels: int) -> list[slice]:
    """List the channels of each register."""
    return [slice(c, min(c + LANES, channels)) for c in range(0, channels, LANES)]


def softmax(logits: Array, axis: int = -1) -> Array:
    """Compute the softmax."""
    powers = jnp.exp(logits - logits.max(axis, keepdims=True))
    return powers * (1 / powers.sum(axis, keepdims=True))


def softmax_gradient(p: Array, to_p: Array, axis: int = -1) -> Array:
    """Compute the gradient of `softmax` from its result `p` and the gradient of that."""
    return p * (to_p - (p * to_p).sum(axis, keepdims=True))


class KernelCost(NamedTuple):
    """Operations of one image, and the cycles that they take one after another."""

    flops: float = 0
    powers: float = 0
    cycles: float = 0

    def __add__(self, other: "KernelCost") -> "KernelCost":  # type: ignore[override]
        return KernelCost(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> "KernelCost":  # type: ignore[override]
        return KernelCost(*(times * a for a in self))


def product(rows: int, inner: int, columns: int) -> KernelCost:
    """Count a product f[rows,inner] @ f[inner,columns] of bfloat16.

    A matrix unit takes a row of 128 values in a cycle, and each tile of 128 x 128 of the right
    operand takes all rows.
    """
    tiles = math.ceil(inner / LANES) * math.ceil(columns / LANES)
    return KernelCost(2.0 * rows * inner * columns, 0, rows * tiles / _UNITS)


def elementwise(rows: int, columns: int, operations: float, powers: float = 0) -> KernelCost:
    """Count vector operations on f32[rows,columns], of which `powers` are exponentials."""
    registers = math.ceil(rows / SUBLANES) * math.ceil(columns / LANES)
    flops = rows * columns * operations
    return KernelCost(flops, rows * columns * powers, registers * (operations / _UNITS + powers))


class Kernel(NamedTuple):
    """A kernel's name in a program's text, its body and what it needs."""

    name: str
    body: Callable[..., None]  # see `over_images`
    cost: KernelCost  # of one image
    scratch: Sequence[tuple[int, ...]] = ()  # shapes of f32 arrays in fast memory
    value_bytes: int = 0  # that the body's values take


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
      kernel: whose body gets references to blocks f[per,..] of `arrays` and of `repeated`, to
        `parameters`, to blocks of the results, to `sums`, and to `scratch`.
      arrays: f[B,..].
      outs: shapes of the results of one image, of the type of the first array; or with their types.
      per: divides B.
      repeated: f[P,..] with P one, or a multiple of `per` that divides B; image i sees row i mod P.
      sums: shapes of f32 results that all images see, one after another, and the first one clears;
        a chip with two cores then uses one.
    """
    batch, dtype = arrays[0].shape[0], arrays[0].dtype
    typed = [jax.ShapeDtypeStruct(o, dtype) if isinstance(o, tuple) else o for o in outs]
    results = [jax.ShapeDtypeStruct((batch, *o.shape), o.dtype) for o in typed]
    totals = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums]

    def block(array: Any) -> Any:
        zeros = (0,) * (array.ndim - 1)
        if array.shape[0] == 1:  # one row for all images
            return pl.BlockSpec(array.shape, lambda i: (0, *zeros))
        turns = np.int32(array.shape[0] // per)
        return pl.BlockSpec((per, *array.shape[1:]), lambda i: (lax.rem(i, turns), *zeros))

    def once(array: Any) -> Any:  # in one buffer, since there is no next one
        return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))

    moving: list[Any] = [*arrays, *repeated, *results]
    fixed: list[Any] = [*parameters, *totals]
    # The next blocks arrive meanwhile.
    needed = sum(2 * min(per, a.shape[0]) * tiled(a.shape[1:], a.dtype.itemsize) for a in moving)
    needed += sum(tiled(a.shape, a.dtype.itemsize) for a in fixed) + kernel.value_bytes
    needed += sum(tiled(shape, 4) for shape in kernel.scratch)
    total = kernel.cost * batch
    run = pl.pallas_call(
        kernel.body,
        out_shape=[*results, *totals],
        grid=(batch // per,),
        in_specs=[*map(block, (*arrays, *repeated)), *map(once, parameters)],
        out_specs=[*map(block, results), *map(once, totals)],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in kernel.scratch],
        name=kernel.name,
        interpret=interpreted.value,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if sums else "parallel",),
            vmem_limit_bytes=None if needed < SCOPED else _MORE,
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(total.flops),
            transcendentals=int(total.powers),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*moving, *fixed)),
        ),
        metadata={"cycles": str(int(total.cycles))},
    )
    return [*run(*arrays, *repeated, *parameters)]


def clear_at_first(sums: Sequence[Any]) -> None:
    """Clear references to sums over images, in the kernel of the first one."""

    @pl.when(pl.program_id(0) == 0)
    def clear() -> None:
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)


def dot(a: Array, b: Array, axes: str) -> Array:
    """Multiply matrices into float32; `axes` names what is summed: "nt" is `a @ b.T`.

    Products of bfloat16 are exact whatever JAX's precision is, and their kernel knows no other.
    """
    precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    summed = ((0,) if axes[0] == "t" else (1,), (1,) if axes[1] == "t" else (0,))
    return lax.dot_general(
        a, b, (summed, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
