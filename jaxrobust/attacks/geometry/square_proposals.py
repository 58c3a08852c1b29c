"""What Square draws for a query, and how each norm uses the draws.

Rows are [B, H, W*C]: XLA's loops over a last axis of 3 channels are 20 times slower on CPU.
All draws of a query are separable in rows and columns: vectors [B, H, 1] and [B, 1, W*C] are made
first, then combined in few passes over the image. Source and parity: see `square`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt32

from jaxrobust.attacks.geometry.balls import l1_correction, l2_norm, per_image
from jaxrobust.attacks.geometry.square_windows import Windows, template_of
from jaxrobust.types import Array, Counts, Images, Mask, PerImage

KeyData = UInt32[Array, "B 2"]  # of threefry keys
Rows = Float[Array, "B H columns"]  # images, each row with its pixels and channels in sequence


class SquareDraws(NamedTuple):
    """The draws of a query, per image."""

    offsets: Int32[Array, "B 4"]  # first row and first column of window 1, then of window 2
    signs: Float[Array, "B channels"]
    across: Mask  # whether the template changes sign along columns instead of rows


class StartDraws(NamedTuple):
    """The draws of a start, per image."""

    signs: Float[Array, "B stripes channels"]  # one per column; L2, L1: tiles, row by row
    across: Bool[Array, "B tiles"]  # as in `SquareDraws`; Linf: no tiles


# --- Draws ---


def draw_query(state: Any, side: Counts) -> SquareDraws:
    """Draw for evaluation `state.iteration` >= 1, with windows of `side` i32[B]."""
    height, width, channels = state.points.shape[1:]
    words = _random_words(state.keys, state.iteration, 4, 1 + channels)
    room = jnp.stack([height - side, width - side] * 2, axis=1)
    # Below `room`, so never the last place: with a float's 24 bits, nothing rounds up to it.
    uniform = (words[:, :4] >> 8).astype(jnp.float32) * np.float32(2**-24)
    flips = _bits(words[:, 4:], 1 + channels)
    return SquareDraws(
        offsets=jnp.floor(uniform * room.astype(jnp.float32)).astype(jnp.int32),
        signs=_signs(flips[:, 1:], state.images),
        across=flips[:, 0] == 1,
    )


def _draw_stripes(keys: KeyData, images: Images) -> StartDraws:
    batch, _, width, channels = images.shape
    words = _random_words(keys, jnp.zeros_like(keys[:, 0]), 0, width * channels)
    flips = _bits(words, width * channels).reshape(batch, width, channels)
    return StartDraws(signs=_signs(flips, images), across=flips[:, 0, :0] == 1)


def _draw_tiles(keys: KeyData, images: Images) -> StartDraws:
    batch, height, width, channels = images.shape
    side = _tile_side(images)
    tiles = (height // side) * (width // side)
    words = _random_words(keys, jnp.zeros_like(keys[:, 0]), 0, tiles * (1 + channels))
    flips = _bits(words, tiles * (1 + channels)).reshape(batch, tiles, 1 + channels)
    return StartDraws(signs=_signs(flips[:, :, 1:], images), across=flips[:, :, 0] == 1)


def _random_words(keys: KeyData, evaluation: Any, words: int, bits: int) -> Array:
    """Draw u32[B, n] per image: `words` of them, plus enough to hold `bits`."""

    def draw(key: Array, evaluation: Array) -> Array:
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        shape = (words + -(-bits // 32),)
        return jax.random.bits(jax.random.fold_in(key, evaluation), shape, jnp.uint32)

    return jax.vmap(draw)(keys, evaluation)


def _bits(words: Array, count: int) -> Array:
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    return bits.reshape(len(words), -1)[:, :count]


def _signs(bits: Array, images: Array) -> Array:
    return 1 - 2 * bits.astype(images.dtype)


def _start_linf(images: Images, epsilon: PerImage, draws: StartDraws) -> Images:
    return jnp.clip(images + per_image(epsilon, images) * draws.signs[:, None], 0, 1)


def _propose_linf(state: Any, draws: SquareDraws, windows: Windows, level: Counts) -> Images:
    images, best, epsilon = state.images, state.x_best, state.epsilon[:, None, None]
    inside_row, inside_column = _window(state.points, draws, 0, jnp.asarray(windows.sides)[level])
    step = jnp.where(inside_column, 2 * epsilon * _by_channel(draws.signs, state.points), 0)
    moved = best + jnp.where(inside_row, step, 0)
    moved = jnp.minimum(jnp.maximum(moved, images - epsilon), images + epsilon)
    return jnp.clip(moved, 0, 1).reshape(state.points.shape)


def _start_mass(norm: str, images: Images, epsilon: PerImage, draws: StartDraws) -> Images:
    """Fill five by five tiles (more for oblong or tiny images) with a template each."""
    batch, height, width, channels = images.shape
    side = _tile_side(images)
    down, right = height // side, width // side
    template = jnp.asarray(template_of(norm, side), images.dtype)[None, None]
    turned = draws.across[:, :, None, None]
    tiles = jnp.where(turned, template.swapaxes(2, 3), template)
    tiles = tiles[..., None] * draws.signs[:, :, None, None]  # [B, tiles, side, side, C]
    delta = tiles.reshape(batch, down, right, side, side, channels).swapaxes(2, 3)
    delta = delta.reshape(batch, down * side, right * side, channels)
    margins = (height - down * side, width - right * side)  # an unchanged margin
    delta = jnp.pad(delta, ((0, 0), *((r // 2, r - r // 2) for r in margins), (0, 0)))
    return _to_sphere(norm, as_rows(images), as_rows(delta), epsilon).reshape(images.shape)


def _tile_side(images: Images) -> int:
    return max(min(images.shape[1:3]) // 5, 1)


def _propose_mass(
    norm: str, state: Any, draws: SquareDraws, windows: Windows, level: Counts
) -> Images:
    """Gather the mass of two windows, and the ball's remaining mass, in window 1 on a template."""
    # Mass is the sum of squares for L2, of absolute values for L1; for L2, `length` is its root.
    mass: Callable[[Array], Array] = jnp.square if norm == "l2" else jnp.abs
    length: Callable[[Array], Array] = jnp.sqrt if norm == "l2" else lambda total: total
    channels = state.points.shape[3]
    by_channel = functools.partial(_by_channel, images=state.points)
    images, delta = state.images, state.x_best - state.images
    side = jnp.asarray(windows.sides)[level]
    first_row, first_column = _window(state.points, draws, 0, side)
    second_row, second_column = _window(state.points, draws, 1, side)
    first = first_row & first_column
    either = first | (second_row & second_column)

    mass_first = _per_channel(jnp.where(first, mass(delta), 0), channels)
    mass_either = _per_channel(jnp.where(either, mass(delta), 0), channels)
    spare = jnp.maximum(mass(state.epsilon) - jnp.sum(mass(delta), axis=(1, 2)), 0)
    target = length(spare[:, None] / channels + mass_either)
    if norm == "l1":
        target = target * channels  # as in the reference; the projection removes the excess
    shape = _template(state.points, draws, windows, level) * by_channel(draws.signs)
    shape = jnp.where(first, shape + delta * by_channel(1 / (1e-12 + length(mass_first))), 0)
    size = length(_per_channel(mass(shape), channels))
    delta = jnp.where(either, shape * by_channel(target / (1e-12 + size)), delta)
    return _to_sphere(norm, images, delta, state.epsilon).reshape(state.points.shape)


def _to_sphere(norm: str, images: Rows, delta: Rows, epsilon: PerImage) -> Rows:
    if norm == "l2":
        scale = per_image(epsilon / (l2_norm(delta) + 1e-12), delta)
        return jnp.clip(images + scale * delta, 0, 1)
    # Shortened by the sum's rounding, as in the reference.
    return (images + delta) + l1_correction(images, delta, epsilon * (1 - 1e-6))


def _template(images: Images, draws: SquareDraws, windows: Windows, level: Counts) -> Rows:
    """Compute `template_profiles`' template in window 1, finite values outside; [B, H, W*C]."""
    count, _, _, largest = windows.profiles.shape
    table = jnp.asarray(windows.profiles.reshape(2 * count, 2, largest), images.dtype)

    def profile(axis: int, turned: Mask) -> list[Array]:
        places = _places(images)[axis][None] - draws.offsets[:, axis, None]
        rows = 2 * level + turned.astype(jnp.int32)
        at = jnp.clip(places, 0, largest - 1)
        return [
            jnp.take_along_axis(jnp.take(t, rows, axis=0, mode="clip"), at, axis=1, mode="clip")
            for t in (table[:, 0], table[:, 1])
        ]

    row_reach, row_scale = profile(0, ~draws.across)
    column_reach, column_scale = profile(1, draws.across)
    reach = jnp.minimum(row_reach[:, :, None], column_reach[:, None])
    return reach * row_scale[:, :, None] * column_scale[:, None]


def _window(images: Images, draws: SquareDraws, number: int, side: Counts) -> tuple[Any, Any]:
    def covered(axis: int) -> Any:
        place = _places(images)[axis][None] - draws.offsets[:, 2 * number + axis, None]
        return (place >= 0) & (place < side[:, None])

    return covered(0)[:, :, None], covered(1)[:, None]


def _places(images: Images) -> tuple[np.ndarray, np.ndarray]:
    _, height, width, channels = images.shape
    columns = np.repeat(np.arange(width, dtype=np.int32), channels)
    return np.arange(height, dtype=np.int32), columns


def as_rows(images: Images) -> Rows:
    """Reshape f[B, H, W, C] to [B, H, W*C]."""
    return images.reshape(*images.shape[:2], -1)


def _by_channel(values: Array, images: Images) -> Array:
    # A product, which XLA does not fuse: it would compute a tiled index per entry of an image.
    spread = np.tile(np.eye(values.shape[1]), (1, images.shape[2])).astype(values.dtype)
    return jnp.dot(values, spread, precision="highest")[:, None]


def _per_channel(rows: Rows, channels: int) -> Array:
    return jnp.sum(jnp.sum(rows, axis=1).reshape(len(rows), -1, channels), axis=1)


class Proposals(NamedTuple):
    """How Square works for a norm.

    `draw_start(keys, images) -> StartDraws`, `start(images, epsilon, draws) -> points`;
    `propose(state, draws, windows, level) -> points`, with the query's level i32[B].
    """

    draw_start: Callable[..., StartDraws]
    start: Callable[..., Array]
    propose: Callable[..., Array]


PROPOSALS = {"linf": Proposals(_draw_stripes, _start_linf, _propose_linf)} | {
    norm: Proposals(
        _draw_tiles, functools.partial(_start_mass, norm), functools.partial(_propose_mass, norm)
    )
    for norm in ("l2", "l1")
}
