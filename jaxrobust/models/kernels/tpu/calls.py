"""What every kernel declares: its blocks of images, and what it costs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
LANES, SUBLANES = 128, 8  # of a vector register, in values of 32 bits
_UNITS = 4  # matrix units of 128 x 128, and as many vector operations in a cycle
_SCOPED = 16 * 2**20  # bytes of fast memory that a kernel may take without asking
_FAST = 64 * 2**20  # bytes of fast memory that every chip since v5e has for one kernel


class Cost(NamedTuple):
    """Operations of one image, and the cycles that they take one after another."""

    flops: float = 0
    powers: float = 0
    cycles: float = 0

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> "Cost":  # type: ignore[override]
        return Cost(*(times * a for a in self))


def product(rows: int, inner: int, columns: int) -> Cost:
    """Count a product f[rows,inner] @ f[inner,columns] of bfloat16.

    A matrix unit takes a row of 128 values in a cycle, and each tile of 128 x 128 of the right
    operand takes all rows.
    """
    tiles = math.ceil(inner / LANES) * math.ceil(columns / LANES)
    return Cost(2.0 * rows * inner * columns, 0, rows * tiles / _UNITS)


def elementwise(rows: int, columns: int, operations: float, powers: float = 0) -> Cost:
    """Count vector operations on f32[rows,columns], of which `powers` are exponentials."""
    registers = math.ceil(rows / SUBLANES) * math.ceil(columns / LANES)
    flops = rows * columns * operations
    return Cost(flops, rows * columns * powers, registers * (operations / _UNITS + powers))


def over_images(
    body: Callable[..., None],
    name: str,
    arrays: Sequence[Array],
    widths: Sequence[int],
    *,
    per: int,
    cost: Cost,
    shared: Sequence[Array] = (),
    scratch: int = 0,
    interpret: bool,
) -> list[Array]:
    """Run a kernel on `per` images of f[B,N,..] at a time.

    Args:
      body: gets references to blocks f[per,N,..] of `arrays`, then of `shared`, then of results.
      name: of the kernel in a program's text.
      arrays: f[B,N,..], whose first and second axes are those of the results.
      widths: of the results f[B,N,width], which have the type of the first array.
      per: divides B.
      cost: of one image.
      shared: f[P,..] with P one, or a multiple of `per` that divides B; image i sees row i modulo P.
      scratch: bytes that the body takes beside the blocks.
      interpret: whether to run it by JAX's interpreter, on any platform.
    """
    from jax.experimental import pallas as pl  # 0.2 s, which nothing but a trace needs
    from jax.experimental.pallas import tpu as pltpu

    batch, tokens, _ = arrays[0].shape
    outs = [jax.ShapeDtypeStruct((batch, tokens, w), arrays[0].dtype) for w in widths]

    def block(width: int) -> Any:
        return pl.BlockSpec((per, tokens, width), lambda i: (i, 0, 0))

    def repeated(array: Array) -> Any:
        rest = array.shape[1:]
        if array.shape[0] == 1:
            return pl.BlockSpec((1, *rest), lambda i: (0,) * array.ndim)
        turns = array.shape[0] // per
        return pl.BlockSpec((per, *rest), lambda i: (lax.rem(i, turns), *(0,) * len(rest)))

    moved = sum(a.size * a.dtype.itemsize for a in (*arrays, *shared, *outs))
    held = sum(per * a.size // a.shape[0] * a.dtype.itemsize for a in (*arrays, *shared, *outs))
    needed = 2 * held + scratch  # the next blocks arrive while these are computed
    cost = cost * batch
    return pl.pallas_call(
        body,
        out_shape=outs,
        grid=(batch // per,),
        in_specs=[*(block(a.shape[2]) for a in arrays), *map(repeated, shared)],
        out_specs=[block(w) for w in widths],
        name=name,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=None if needed < _SCOPED else min(2 * needed, _FAST),
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(cost.flops), transcendentals=int(cost.powers), bytes_accessed=int(moved)
        ),
        metadata={"cycles": str(int(cost.cycles))},
    )(*arrays, *shared)


def dot(a: Array, b: Array, axes: str) -> Array:
    """Multiply matrices into float32; `axes` names what is summed: "nt" is `a @ b.T`."""
    summed = ((0,) if axes[0] == "t" else (1,), (1,) if axes[1] == "t" else (0,))
    return lax.dot_general(a, b, (summed, ((), ())), preferred_element_type=jnp.float32)


def columns(ref: Any, image: Any, start: int, width: int) -> Array:
    """Read f[N,width] of one image's block."""
    return ref[image, :, start : start + width]
