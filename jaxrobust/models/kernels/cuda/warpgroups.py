"""Building blocks of Pallas Mosaic kernels for Hopper: warpgroups, rings of tiles, products.

Every kernel has three warpgroups of 128 threads. One copies tiles to shared memory; two compute on
64 rows each, the fewest of a tensor-core product, whose sums stay in registers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from jaxrobust.models.kernels.tpu import interpreted

Array = jax.Array
gpu: Any = mosaic_gpu  # older versions of JAX, which take no kernel, have other signatures
GROUPS = 2  # warpgroups that compute
ROWS = 64  # of a warpgroup
PROCESSORS = 132  # of an H100 SXM and an H200
SHARED = 226 * 2**10  # bytes of shared memory for a kernel's tiles
_REGISTERS = {"memory": 24, "compute": 240}  # of a thread; 65,536 in all


def tile(*shape: int, columns: int, dtype: Any) -> Any:
    """Allocate matrices in shared memory, swizzled as tensor cores and bulk copies read them.

    Both operands of a product have the same swizzle, which divides their `columns`.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if columns * size % s == 0)
    transforms = gpu.TilingTransform((8, swizzle // size)), gpu.SwizzleTransform(swizzle)
    return gpu.SMEM(shape, dtype, transforms=transforms)


def vector(*shape: int) -> Any:
    """Allocate f32 vectors in shared memory."""
    return gpu.SMEM(shape, jnp.float32)


class Ring(NamedTuple):
    """Slots of tiles that one warpgroup fills, and others read and release, in turns."""

    ready: Any
    free: Any
    tiles: Sequence[Any]  # [slots,..] each

    def _slot(self, turn: Any) -> Any:
        return lax.rem(turn, self.tiles[0].shape[0])

    def fill(self, turn: Any, *sources: Any) -> None:
        """Copy the tiles of a turn as soon as their slot is free."""
        slot = self._slot(turn)

        @pl.when(turn >= self.tiles[0].shape[0])
        def wait() -> None:
            gpu.barrier_wait(self.free.at[slot])

        for source, tiles in zip(sources, self.tiles, strict=True):
            gpu.copy_gmem_to_smem(source, tiles.at[slot], self.ready.at[slot])

    def take(self, turn: Any, awaited: Any = True) -> list[Any]:
        """Return the tiles of a turn; wait for them unless they have been awaited before."""
        slot = self._slot(turn)

        @pl.when(awaited)
        def wait() -> None:
            gpu.barrier_wait(self.ready.at[slot])

        return [tiles.at[slot] for tiles in self.tiles]

    def release(self, turn: Any) -> None:
        """Let the slot be filled again when all warpgroups have released it."""
        gpu.commit_smem()  # bulk copies follow what was read
        gpu.barrier_arrive(self.free.at[self._slot(turn)])


def ring(slots: int, *tiles: Any) -> Ring:
    """Allocate a ring; `tiles` have shapes [slots,..]."""
    ready = gpu.Barrier(num_arrivals=len(tiles), num_barriers=slots)
    return Ring(ready, gpu.Barrier(num_arrivals=GROUPS, num_barriers=slots), tiles)


def by_role(memory: Callable[[], None], compute: Callable[[Any], None]) -> None:
    """Run `memory` on one warpgroup and `compute`, with its index, on the others."""
    group = lax.axis_index("group")

    @pl.when(group == GROUPS)
    def copy() -> None:
        gpu.set_max_registers(_REGISTERS["memory"], action="decrease")
        memory()

    @pl.when(group < GROUPS)
    def calculate() -> None:
        gpu.set_max_registers(_REGISTERS["compute"], action="increase")
        compute(group)


def load(ref: Any, along: int | None = None, **options: Any) -> Array:
    """Read a matrix f32[64,C] as products lay it out, or a vector along one of its axes."""
    layout = gpu.Layout.WGMMA if along is None else gpu.Layout.WGMMA.reduce(1 - along)
    return gpu.load(ref, layout=layout, **options).astype(jnp.float32)


def spread(vector: Array, axis: int, like: Array) -> Array:
    """Repeat a vector along `axis` of the matrix `like` over the other axis."""
    return lax.broadcast_in_dim(vector, like.shape, (axis,))


def mean(x: Array) -> Array:
    """Compute the mean of each row, as wide as the row."""
    return spread(x.sum(axis=1) * (1 / x.shape[1]), 0, x)


def multiply(total: Any, a: Any, b: Any, place: Any = None) -> None:
    """Start `total += a @ b`. JAX's interpreter takes `a` only from shared memory, `place`."""
    if place is not None:
        place[...] = a
        gpu.commit_smem()
        a = place
    gpu.wgmma(total, a, b)


def products(*operands: tuple[Any, ...]) -> list[Array]:
    """Compute `a @ b` in float32 for operands of `multiply`, after all products before it."""

    def run(*totals: Any) -> list[Array]:
        for total, pair in zip(totals, operands, strict=True):
            multiply(total, *pair)
        return [total[...] for total in totals]

    return pl.run_scoped(run, *(gpu.ACC((a.shape[0], b.shape[1])) for a, b, *_ in operands))


class Launch(NamedTuple):
    """A kernel: its name in a program's text, its body, its grid and its resources."""

    name: str
    body: Callable[..., None]  # receives references to arrays, results and `scratch`
    grid: dict[str, int]
    scratch: Sequence[Any]
    cost: pl.CostEstimate


def run(kernel: Launch, arrays: Sequence[Array], outs: Sequence[Any]) -> list[Array]:
    """Run a kernel on arrays in the GPU's memory."""
    call = gpu.kernel(
        kernel.body,
        out_type=list(outs),
        scratch_types=list(kernel.scratch),
        grid=tuple(kernel.grid.values()),
        grid_names=tuple(kernel.grid),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=kernel.name,
        cost_estimate=kernel.cost,
        interpret=gpu.InterpretGPUParams(detect_races=True) if interpreted.value else None,
        compiler_params=gpu.CompilerParams(approx_math=True),
    )
    return [*call(*arrays)]
