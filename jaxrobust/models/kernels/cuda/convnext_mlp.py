"""The MLP of a ConvNeXt block for Hopper: LayerNorm, two products, layer scale and residual.

The hidden layer, four times as wide as the block, never leaves the chip. Each processor takes tiles
of pixels in turn, while the weights pass by in parts of the hidden layer; with 96 channels, they
all stay in shared memory. The gradient recomputes the norm and the hidden layer. The norm's scale
and shift are folded into the first product, so that gradients of the folded parameters give those
of all. The GELU is that of `stem_blocks`, with the chip's approximate tanh, which is within 5e-4.
Compiled for an H100 and interpreted, not timed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxrobust.models.kernels.convnext_layers import BlockParameters
from jaxrobust.models.kernels.cuda import warpgroups as wg
from jaxrobust.models.kernels.cuda.hopper import TILE
from jaxrobust.models.kernels.cuda.warpgroups import GROUPS, PROCESSORS, ROWS, gpu
from jaxrobust.models.kernels.primitives import static_jit
from jaxrobust.models.kernels.tpu import interpreted
from jaxrobust.models.kernels.tpu.depthwise_norm import norm_gradient, normalised
from jaxrobust.models.kernels.tpu.stem_blocks import gelu, gelu_slope

Array = jax.Array
_PART = 64  # of the hidden layer that is computed at a time
_WEIGHT_SLOTS = 2  # unless all weights fit next to the pixels and stay
_ROW_SLOTS = 2  # for pixels of a kernel that sums
_BOTH = 96  # channels up to which one kernel sums the gradients of both products


class Folded(NamedTuple):
    """Parameters of `x + gamma * (gelu(normal @ first + first_bias) @ second + second_bias)`."""

    first: Array  # f[C,D], times the norm's scale
    first_bias: Array  # f32[D], plus the norm's shift times `first`
    second: Array  # f[D,C]
    branch: Array  # f32[2,C]: second bias and gamma


def _wide(p: BlockParameters) -> BlockParameters:
    return jax.tree.map(lambda a: a.astype(jnp.float32), p)


def folded(p: BlockParameters, dtype: Any) -> Folded:
    """Fold the affine map of the norm into the first product."""
    p = _wide(p)
    first = (p.scale[:, None] * p.first).astype(dtype)
    first_bias = jnp.matmul(p.shift, p.first, precision="highest") + p.first_bias
    return Folded(first, first_bias, p.second.astype(dtype), jnp.stack([p.second_bias, p.gamma]))


class _Sizes(NamedTuple):
    pixels: int
    channels: int
    hidden: int
    dtype: Any

    @property
    def processors(self) -> int:
        return min(PROCESSORS, self.pixels // TILE)

    @property
    def parts(self) -> int:
        return self.hidden // _PART

    @property
    def stays(self) -> bool:  # whether all weights are in shared memory at once
        return self._room(self.parts) >= 3

    @property
    def copies(self) -> int:  # of all weights, from the level-2 cache unless they stay
        return self.processors if self.stays else self.pixels // TILE

    def _room(self, weight_slots: int) -> int:
        """Count the tiles of pixels that fit next to the weights."""
        weights = weight_slots * 2 * self.channels * _PART
        return (wg.SHARED // 2 - weights) // (TILE * self.channels)

    def tile(self, *shape: int) -> Any:
        columns = math.gcd(self.channels, _PART)
        return wg.tile(*shape, columns=columns, dtype=self.dtype)

    def scratch(self, shared: bool) -> list[Any]:
        """Allocate rings of pixels and of weights, and operands for the interpreter."""
        c, count = self.channels, self.parts if self.stays else _WEIGHT_SLOTS
        room = self._room(count)
        first, second = 1 + (room >= 3), 1 + (room >= 4)
        others = [self.tile(second, TILE, c), *[wg.vector(second, TILE)] * shared]
        weights = self.tile(count, c, _PART), self.tile(count, _PART, c), wg.vector(count, _PART)
        places = [self.tile(GROUPS, ROWS, columns) for columns in (c, _PART)]
        rings = [wg.ring(first, self.tile(first, TILE, c)), wg.ring(second, *others)]
        return [[*rings, wg.ring(count, *weights)], places if interpreted.value else []]


def _tiles(s: _Sizes, call: Callable[[Any, Any], None]) -> None:
    """Call with each turn of this processor and the first pixel of its tile."""
    processor = lax.axis_index("processor")
    turns = lax.div(s.pixels // TILE - processor + s.processors - 1, s.processors)

    @pl.loop(0, turns)
    def tile(turn: Any) -> None:
        call(turn, (processor + turn * s.processors) * TILE)


def _stream(s: _Sizes, rings: Sequence[wg.Ring], pixels: Any, parameters: Any) -> None:
    """Copy tiles of pixels to shared memory and, for each tile unless they stay, all weights."""
    first, first_bias, second = parameters
    rows, others, weights = rings

    def tile(turn: Any, start: Any) -> None:
        here = [a.at[pl.ds(start, TILE)] for a in pixels]
        rows.fill(turn, here[0])
        others.fill(turn, *here[1:])

        @pl.when((turn == 0) | (not s.stays))
        def all_weights() -> None:
            @pl.loop(0, s.parts)
            def part(i: Any) -> None:
                columns = pl.ds(i * _PART, _PART)
                sources = first.at[:, columns], second.at[columns], first_bias.at[columns]
                weights.fill(i if s.stays else turn * s.parts + i, *sources)

    _tiles(s, tile)


def _hidden(s: _Sizes, turn: Any, weights: wg.Ring, step: Callable[..., None]) -> Array:
    """Sum f32[64,C] over parts of the hidden layer; `step` starts a product that adds its part.

    It receives the total, the part's weights, and a function to call after its first product: the
    part before is then done with its weights.
    """

    def run(total: Any) -> Array:
        @pl.loop(0, s.parts)
        def part(i: Any) -> None:
            count = i if s.stays else turn * s.parts + i
            tiles = weights.take(count, awaited=(turn == 0) if s.stays else True)

            def release() -> None:
                if not s.stays:
                    free = functools.partial(weights.release, count + _WEIGHT_SLOTS - 1)
                    pl.when(count > 0)(free)

            step(total, tiles, release)

        return total[...]

    return pl.run_scoped(run, gpu.ACC((ROWS, s.channels)))


def _store(value: Array, place: Any, out: Any, start: Any) -> None:
    """Write rows to the GPU's memory through shared memory."""
    place[...] = value.astype(place.dtype)
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(place, out.at[pl.ds(start, ROWS)])


def _forward(*refs, s: _Sizes, shared: bool, eps: float) -> None:
    pixels, refs = refs[: 2 + shared], refs[2 + shared :]
    *parameters, branch, out, rings, places = refs
    rows, others, weights = rings
    exact = s.dtype == jnp.float32

    def compute(group: Any) -> None:
        mine = pl.ds(group * ROWS, ROWS)
        place = [p.at[group] for p in places] or [None] * 2

        def tile(turn: Any, start: Any) -> None:
            (z,) = rows.take(turn)
            y = normalised(wg.load(z.at[mine]), eps, wg.mean)[0].astype(s.dtype)
            rows.release(turn)

            def step(total: Any, part: Any, release: Callable[[], None]) -> None:
                first, second, bias = part
                (h,) = wg.products((y, first, place[0]))
                release()
                h = gelu(h + wg.spread(wg.load(bias, 1), 1, h), exact)
                wg.multiply(total, h.astype(s.dtype), second, place[1])

            added = _hidden(s, turn, weights, step)
            second_bias, gamma = (
                wg.spread(wg.load(branch.at[i], 1, optimized=False), 1, added) for i in (0, 1)
            )
            added = (added + second_bias) * gamma
            x, *share = (a.at[mine] for a in others.take(turn))
            if shared:
                added = added * wg.spread(wg.load(share[0], 0), 0, added)
            _store(wg.load(x) + added, x, out, start + group * ROWS)
            gpu.wait_smem_to_gmem(0, wait_read_only=True)
            others.release(turn)

        _tiles(s, tile)
        gpu.wait_smem_to_gmem(0)

    wg.by_role(lambda: _stream(s, rings, pixels, parameters), compute)


def _gradient(*refs, s: _Sizes, shared: bool, keep: bool, eps: float) -> None:
    pixels, refs = refs[: 2 + shared], refs[2 + shared :]
    *parameters, out = refs[:4]
    *stored, rings, places = refs[4:]
    rows, others, weights = rings
    exact = s.dtype == jnp.float32

    def compute(group: Any) -> None:
        mine = pl.ds(group * ROWS, ROWS)
        place = [p.at[group] for p in places] or [None] * 2

        def tile(turn: Any, start: Any) -> None:
            z, g, *share = (a.at[mine] for a in (*rows.take(turn), *others.take(turn)))
            y = normalised(wg.load(z), eps, wg.mean)[0].astype(s.dtype)

            def step(total: Any, part: Any, release: Callable[[], None]) -> None:
                first, second, bias = part
                h, to_h = wg.products((y, first, place[0]), (g, second.T))
                release()
                to_h = to_h * gelu_slope(h + wg.spread(wg.load(bias, 1), 1, h), exact)
                if shared:
                    to_h = to_h * wg.spread(wg.load(share[0], 0), 0, to_h)
                wg.multiply(total, to_h.astype(s.dtype), first.T, place[1])

            to_normal = _hidden(s, turn, weights, step)
            normal, inverse = normalised(wg.load(z), eps, wg.mean)
            to_z = norm_gradient(normal, inverse, to_normal, wg.mean)
            _store(to_z, z, out, start + group * ROWS)
            if keep:
                _store(normal, g, stored[0], start + group * ROWS)
            gpu.wait_smem_to_gmem(0, wait_read_only=True)
            rows.release(turn)
            others.release(turn)

        _tiles(s, tile)
        gpu.wait_smem_to_gmem(0)

    wg.by_role(lambda: _stream(s, rings, pixels, parameters), compute)


def _sums(*refs, s: _Sizes, shared: bool, slices: int, which: tuple[str, ...]) -> None:
    """Sum over a slice of the pixels, for a part of the hidden layer: all matrices are transposed,
    so that parts of the hidden layer are the rows of a product.
    """
    pixels, refs = refs[: 2 + shared], refs[2 + shared :]
    (*parameters, first_bias), refs = refs[:3], refs[3:]
    outs, (rows, ready, places, *weights) = refs[: len(which) + 1], refs[len(which) + 1 :]
    column, piece = lax.axis_index("part"), lax.axis_index("slice")
    turns = lax.div(s.pixels // ROWS - piece + slices - 1, slices)
    exact = s.dtype == jnp.float32

    def memory() -> None:
        for source, place in zip(parameters, weights, strict=True):
            gpu.copy_gmem_to_smem(source.at[pl.ds(column * TILE, TILE)], place, ready)

        @pl.loop(0, turns)
        def fill(turn: Any) -> None:
            start = (piece + turn * slices) * ROWS
            rows.fill(turn, *(a.at[pl.ds(start, ROWS)] for a in pixels))

    def compute(group: Any) -> None:
        mine = pl.ds(group * ROWS, ROWS)
        hidden_rows = pl.ds(column * TILE + group * ROWS, ROWS)
        first, second = (w.at[mine] for w in weights)
        place = dict(zip(which, (p.at[group] for p in places), strict=False))
        bias = wg.load(first_bias.at[hidden_rows], 0, optimized=False)
        gpu.barrier_wait(ready)

        def step(totals: dict[str, Any], turn: Any, to_bias: Array) -> Array:
            y, g, *share = rows.take(turn)
            h, *to_h = wg.products((first, y.T), *[(second, g.T)] * ("first" in which))
            pl.when(turn > 0)(functools.partial(rows.release, turn + _ROW_SLOTS - 1))
            h = h + wg.spread(bias, 0, h)
            weight = wg.spread(wg.load(share[0], 1), 1, h) if shared else 1.0
            if "second" in which:
                hidden = (gelu(h, exact) * weight).astype(s.dtype)
                wg.multiply(totals["second"], hidden, g, place.get("second"))
            if "first" in which:
                change = to_h[0] * gelu_slope(h, exact) * weight
                wg.multiply(totals["first"], change.astype(s.dtype), y, place.get("first"))
                to_bias = to_bias + change.sum(axis=1)
            return to_bias

        def run(*totals: Any) -> tuple[Array, ...]:
            named = dict(zip(which, totals, strict=True))
            to_bias = lax.fori_loop(0, turns, functools.partial(step, named), 0 * bias)
            return *(total[...] for total in totals), to_bias

        sums = pl.run_scoped(run, *[gpu.ACC((ROWS, s.channels))] * len(which))
        for total, out in zip(sums, outs, strict=True):
            out.at[piece, hidden_rows][...] = total

    wg.by_role(memory, compute)


def _cost(s: _Sizes, products: int, *copied: tuple[int, Sequence[Any]]) -> pl.CostEstimate:
    """Count all operations, and the bytes of arrays, each copied as often as its number says."""
    moved = sum(n * a.size * a.dtype.itemsize for n, arrays in copied for a in arrays)
    flops = 2 * products * s.pixels * s.channels * s.hidden
    return pl.CostEstimate(flops=flops, transcendentals=s.pixels * s.hidden, bytes_accessed=moved)


def _rows(x: Array, share: Array | None, *others: Array) -> list[Array]:
    """Reshape images to rows of pixels, and repeat an image's share of the branch for each."""
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, *others)]
    each = x.size // (len(x) * x.shape[-1])
    return rows if share is None else [*rows, jnp.repeat(share.astype(jnp.float32), each)]


@static_jit
def forward(z: Array, x: Array, share: Array | None, p: BlockParameters, *, eps: float) -> Array:
    """Compute `x + share * gamma * MLP(LN(z))` for f[B,H,W,C]; `share` f[B]: None is all of it."""
    channels, hidden = p.first.shape
    s, w = _Sizes(z.size // channels, channels, hidden, z.dtype), folded(p, z.dtype)
    pixels, weights = _rows(z, share, x), [w.first, w.first_bias, w.second, w.branch]
    outs = [jax.ShapeDtypeStruct((s.pixels, s.channels), z.dtype)]
    kernel = wg.Launch(
        "convnext_mlp",
        functools.partial(_forward, s=s, shared=share is not None, eps=eps),
        {"processor": s.processors},
        s.scratch(share is not None),
        _cost(s, 2, (1, [*pixels, *outs]), (s.copies, weights)),
    )
    return wg.run(kernel, [*pixels, *weights], outs)[0].reshape(z.shape)


def _sum_kernel(
    normal: Array, g: Array, share: Array | None, w: Folded, which: tuple[str, ...]
) -> list[Array]:
    """Sum gradients of the products that `which` names, f32[D,C], and that of the first bias."""
    c, hidden = w.first.shape
    s = _Sizes(normal.size // c, c, hidden, normal.dtype)
    parts, pieces = hidden // TILE, s.pixels // ROWS
    slices = min(pieces, max(1, PROCESSORS // parts))
    pixels, weights = _rows(normal, share, g), [w.first.T, w.second, w.first_bias]
    outs = [jax.ShapeDtypeStruct((slices, hidden, c), jnp.float32)] * len(which)
    outs.append(jax.ShapeDtypeStruct((slices, hidden), jnp.float32))
    rows = [s.tile(_ROW_SLOTS, ROWS, c)] * 2
    rows += [wg.vector(_ROW_SLOTS, ROWS)] * (share is not None)
    places = [s.tile(GROUPS, ROWS, ROWS) for _ in which] if interpreted.value else []
    ready = gpu.Barrier(num_arrivals=2)
    scratch = [wg.ring(_ROW_SLOTS, *rows), ready, places, s.tile(TILE, c), s.tile(TILE, c)]
    body = functools.partial(_sums, s=s, shared=share is not None, slices=slices, which=which)
    copied = (parts, pixels), (slices, weights), (1, outs)
    cost = _cost(s, 1 + len(which) + ("first" in which), *copied)
    kernel = wg.Launch("convnext_mlp_sums", body, {"part": parts, "slice": slices}, scratch, cost)
    return [total.sum(0) for total in wg.run(kernel, [*pixels, *weights], outs)]


@static_jit
def backward(
    z: Array, g: Array, share: Array | None, p: BlockParameters, *, eps: float, needed: bool
) -> tuple[Array, BlockParameters | None]:
    """Compute the gradient of `forward` for `z` from that of its result.

    If `needed`, also compute the gradients for the parameters, in float32.
    """
    channels, hidden = p.first.shape
    s, w = _Sizes(z.size // channels, channels, hidden, z.dtype), folded(p, z.dtype)
    w = w._replace(second=(p.second.astype(jnp.float32) * w.branch[1:]).astype(z.dtype))
    pixels, weights = _rows(z, share, g), [w.first, w.first_bias, w.second]
    outs = [jax.ShapeDtypeStruct((s.pixels, s.channels), z.dtype)] * (1 + needed)
    kernel = wg.Launch(
        "convnext_mlp_gradient",
        functools.partial(_gradient, s=s, shared=share is not None, keep=needed, eps=eps),
        {"processor": s.processors},
        s.scratch(share is not None),
        _cost(s, 3, (1, [*pixels, *outs]), (s.copies, weights)),
    )
    to_z, *normal = (a.reshape(z.shape) for a in wg.run(kernel, [*pixels, *weights], outs))
    if not needed:
        return to_z, None
    return to_z, _parameter_gradients(normal[0], g, share, p, w)


def _parameter_gradients(
    normal: Array, g: Array, share: Array | None, p: BlockParameters, w: Folded
) -> BlockParameters:
    run = functools.partial(_sum_kernel, normal, g, share, w)
    if normal.shape[-1] <= _BOTH:
        first, second, first_bias = run(("first", "second"))
    else:
        (first, first_bias), (second, _) = run(("first",)), run(("second",))
    first, wide = first.T, _wide(p)
    to_branch = g.astype(jnp.float32)
    if share is not None:
        to_branch = to_branch * share.astype(jnp.float32)[:, None, None, None]
    return BlockParameters(
        taps=None,
        bias=None,
        scale=(first * wide.first).sum(1),
        shift=jnp.matmul(wide.first, first_bias, precision="highest"),
        first=wide.scale[:, None] * first + wide.shift[:, None] * first_bias[None],
        first_bias=first_bias,
        **wide.of_branch(second, to_branch.sum((0, 1, 2))),
    )
