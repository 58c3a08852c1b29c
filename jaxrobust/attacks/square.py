"""Square: random search with square windows, from logits alone.

Every query draws a window and changes the best point so far inside it: on Linf by the whole width
of the ball, on L2 and L1 by moving the mass of two windows into one of them. What lowers the
margin is kept. The windows shrink by a schedule.

Source: Andriushchenko et al. 2020 (arXiv 1912.00049), algorithms 1 to 3; the L1 version is Croce &
Hein 2021 (arXiv 2103.01208). Details that the papers leave open follow auto-attack a392200, but
for one: windows and signs are an image's own, not shared by all images of a batch. Parity:
tests/test_square.py.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks.balls import BALLS, l1_correction, l2_norm, per_image
from jaxrobust.attacks.losses import cw_loss
from jaxrobust.attacks.machine import check_inputs, check_settings, image_keys
from jaxrobust.types import Array, LogitsFn, Machine


class SquareState(NamedTuple):
    """The state of Square; the first axis of every array is the image, so slots can be refilled.

    States of two machines that differ in nothing but the radius may share one batch, and either's
    `tell`.
    """

    images: Array  # as rows [B, H, W*C]; the centre of the ball, may leave [0, 1] on Linf and L2
    labels: Array  # i32[B]
    epsilon: Array  # f[B]
    keys: Array  # u32[B, 2], the data of threefry keys: `where` and shard_map take no typed keys
    iteration: Array  # i32[B], evaluations told so far; the first is that of the start
    points: Array  # [B, H, W, C], to be evaluated next
    x_best: Array  # as rows; the point of smallest margin, before any is known the start
    margin_best: Array  # f[B], logit of the label minus the largest other; inf before any is known


class Draws(NamedTuple):
    """What one query draws, per image."""

    offsets: Array  # i32[B, 4]: first row and first column of window 1, then of window 2
    signs: Array  # f[B, C]
    across: Array  # bool[B]: the template changes its sign along columns, not along rows


class StartDraws(NamedTuple):
    """What a start draws, per image."""

    signs: Array  # f[B, W, C], one stripe for each column; L2 and L1: f[B, tiles, C], row by row
    across: Array  # bool[B, tiles], as in `Draws`; Linf: no tiles


def square_run(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    norm: str,
    epsilon: float | Array,
    queries: int = 5000,
    key: Array,
    p_init: float = 0.8,
    rescale: bool = False,
) -> SquareState:
    """One run of Square, until every image is misclassified or out of queries; its final state.

    Args:
      logits_fn: f[B,H,W,C] -> f[B,C]; not differentiated.
      images: f[B,H,W,C].
      labels: i32[B].
      norm: "linf", "l2" or "l1".
      epsilon: radius, in units of pixels in [0, 1].
      queries: at most; the start costs one evaluation more.
      key: one key or keys [B] (see `machine.image_keys`).
      p_init: the fraction of an image's pixels that the first windows cover.
      rescale: stretch the schedule, which is made for 10,000 queries, to `queries`.
    Returns:
      `SquareState`: `x_best`, `margin_best` (success: at most 0), `iteration` and the rest.
    Raises:
      ValueError: see `square_machine`.
    """
    machine = square_machine(
        norm=norm, epsilon=epsilon, queries=queries, p_init=p_init, rescale=rescale
    )

    def over(state):
        return machine.finished(state) | (state.margin_best <= 0)

    def step(state):
        told = machine.tell(state, logits_fn(machine.query(state)), None)
        stays = over(state)
        return jax.tree.map(lambda a, b: jnp.where(per_image(stays, a), a, b), state, told)

    start = machine.init(images, labels, image_keys(key, len(images)))
    return jax.lax.while_loop(lambda state: ~jnp.all(over(state)), step, start)


def square_machine(
    *,
    norm: str,
    epsilon: float | Array,
    queries: int = 5000,
    p_init: float = 0.8,
    rescale: bool = False,
) -> Machine:
    """Square as a `types.Machine` of at most `queries + 1` evaluations, none with a gradient.

    Arguments as in `square_run`; an `epsilon` that is an array is not checked, as it may be traced.
    `init` always needs keys, and knows one start, "random". An image is finished when its queries
    are used up: whether a margin of 0 or less means success is the driver's to say, whose network
    may be a less exact one than the one that decides. `tell` leaves a finished image as it is. The
    draws of evaluation n, the start being 0, come from `fold_in(key, n)`.

    Raises:
      ValueError: see `machine.check_settings`; queries not an int >= 1, p_init outside (0, 1].
        From `init`: soft labels, another start, no keys, or keys that are not threefry's.
    """
    check_settings(norm=norm, epsilon=epsilon, loss="cw")
    _check_schedule(queries, p_init)
    levels = window_levels(queries, rescale)
    geometry = GEOMETRIES[norm]

    def init(images, labels, keys=None, start="random"):
        images, labels = check_inputs(images, labels)
        if labels.ndim != 1:
            raise ValueError(f"labels of shape {labels.shape}: Square needs classes; pass i32[B]")
        if not (isinstance(start, str) and start == "random"):
            raise ValueError("Square has a start of its own; pass start='random' and keys [B]")
        if norm == "l1":
            images = jnp.clip(images, 0, 1)  # as the projection does
        keys = _key_data(image_keys(keys, len(images)))
        one_each = images.reshape(len(images), -1)[:, 0]
        # A product, which takes over shard_map's axes.
        radius = jnp.ones_like(one_each) * jnp.asarray(epsilon, one_each.dtype)
        points = geometry.start(images, radius, geometry.draw_start(keys, images))
        return SquareState(
            images=_rows(images),
            labels=labels,
            epsilon=radius,
            keys=keys,
            iteration=jnp.zeros_like(one_each, jnp.int32),
            points=points,
            x_best=_rows(points),
            margin_best=jnp.full_like(one_each, jnp.inf),
        )

    def tell(state, logits, gradient=None):
        del gradient
        margin = -cw_loss(logits.astype(state.epsilon.dtype), state.labels)
        searching = ~finished(state)
        better = searching & (margin < state.margin_best)  # NaN never is
        state = state._replace(
            iteration=state.iteration + searching.astype(jnp.int32),
            x_best=jnp.where(better[:, None, None], _rows(state.points), state.x_best),
            margin_best=jnp.where(better, margin, state.margin_best),
        )
        windows = window_table(norm, levels, p_init, state.points.shape[1:3])
        level = jnp.asarray(levels)[jnp.clip(state.iteration - 1, 0, queries - 1)]
        draws = draw_query(state, jnp.asarray(windows.sides)[level])
        return state._replace(points=geometry.propose(state, draws, windows, level))

    def finished(state):
        return state.iteration > queries

    return Machine(
        init=init,
        query=lambda state: state.points,
        loss=None,
        tell=tell,
        finished=finished,
        result=lambda state: BALLS[norm].settle(
            *(a.reshape(state.points.shape) for a in (state.x_best, state.images))
        ),
    )


def _check_schedule(queries, p_init):
    try:
        whole = not isinstance(queries, bool) and operator.index(queries) >= 1
    except TypeError:
        whole = False
    if not whole:
        raise ValueError(f"queries={queries!r} is not a number of queries; pass an int >= 1")
    if not 0 < p_init <= 1:
        raise ValueError(
            f"p_init={p_init} is not a fraction of the pixels; pass a number above 0, at most 1"
        )


# --- The schedule: NumPy, in Python's doubles, rounded half to even as the reference does ---


class Windows(NamedTuple):
    """The windows of a schedule; they keep to few sides, the levels."""

    levels: np.ndarray  # i32[queries], the level of each query
    sides: np.ndarray  # i32[levels]
    profiles: np.ndarray  # f64[levels, 2, 2, largest side], see `template_profiles`; Linf: zeros


def window_levels(queries: int, rescale: bool) -> np.ndarray:
    """How often each query's window was halved in area, i32[queries]."""
    at = np.arange(queries)
    if rescale:
        at = (at / queries * 10000).astype(int)
    bounds = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]  # the last query before a halving
    return np.searchsorted(bounds, at).astype(np.int32)


def window_table(norm: str, levels: np.ndarray, p_init: float, shape: tuple[int, int]) -> Windows:
    """The windows for images of `shape` (H, W), from `window_levels`."""
    height, width = shape

    def side(level):
        wished = round((p_init / 2**level * height * width) ** 0.5)
        if norm != "linf":
            wished = max(wished, 3)
            wished += wished % 2 == 0
        return min(max(wished, 1), height, width)

    sides = np.array([side(level) for level in range(levels.max() + 1)], np.int32)
    profiles = np.zeros((len(sides), 2, 2, sides.max()))
    if norm != "linf":
        for level, s in enumerate(sides):
            profiles[level, :, :, :s] = template_profiles(norm, s)
    return Windows(levels, sides, profiles)


def template_profiles(norm: str, side: int) -> np.ndarray:
    """The template of L2 and L1, a pyramid above a negative one, by its axes; f64[2, 2, side].

    A pyramid stacks centred squares of sides 1, 3, 5, .. and heights 1, 1/4, 1/9, .. (L2) or 1,
    1/16, 1/81, .. (L1). Its value is a falling function of the larger of the distances of row and
    column from the peak, hence the smaller of what row and column allow. Returns what the axis
    along which the template keeps its sign allows, and ones; then what the axis allows along
    which the sign changes, and factors: the sign, over the length of pyramid and template.
    Multiply by both axes' factors, as `template_of` does.
    """
    power = {"l2": 2, "l1": 4}[norm]
    heights = 1 / np.arange(1.0, side // 2 + 2) ** power
    allowed = np.cumsum(heights[::-1])[::-1]  # by the distance from the peak
    other = allowed[np.abs(np.arange(side) - side // 2)]
    along, scale = np.ones(side), np.ones(side)
    for sign, half in ((1, np.arange(side // 2)), (-1, np.arange(side // 2, side))):
        along[half] = allowed[np.abs(np.arange(len(half)) - len(half) // 2)]
        pyramid = np.minimum(along[half, None], other)
        scale[half] = sign / max(_length(norm, pyramid), 1e-12)
    template = scale[:, None] * np.minimum(along[:, None], other)
    return np.array([[other, np.ones(side)], [along, scale / _length(norm, template)]])


def template_of(norm: str, side: int) -> np.ndarray:
    """The template itself, f64[side, side], positive in the upper half."""
    (other, _), (along, scale) = template_profiles(norm, side)
    return scale[:, None] * np.minimum(along[:, None], other)


def _length(norm, values):
    return np.abs(values).sum() if norm == "l1" else np.sqrt((values**2).sum())


# --- Draws ---


def draw_query(state: SquareState, side: Array) -> Draws:
    """The draws for evaluation `state.iteration` >= 1, with windows of `side` i32[B]."""
    height, width, channels = state.points.shape[1:]
    words = _random_words(state.keys, state.iteration, 4, 1 + channels)
    room = jnp.stack([height - side, width - side] * 2, axis=1)
    # Below `room`, so never the last place. With 24 bits, a float's, no rounding up to it.
    uniform = (words[:, :4] >> 8).astype(jnp.float32) * np.float32(2**-24)
    flips = _bits(words[:, 4:], 1 + channels)
    return Draws(
        offsets=jnp.floor(uniform * room.astype(jnp.float32)).astype(jnp.int32),
        signs=_signs(flips[:, 1:], state.images),
        across=flips[:, 0] == 1,
    )


def _draw_stripes(keys, images):
    batch, _, width, channels = images.shape
    words = _random_words(keys, jnp.zeros_like(keys[:, 0]), 0, width * channels)
    flips = _bits(words, width * channels).reshape(batch, width, channels)
    return StartDraws(signs=_signs(flips, images), across=flips[:, 0, :0] == 1)


def _draw_tiles(keys, images):
    batch, height, width, channels = images.shape
    side = _tile_side(images)
    tiles = (height // side) * (width // side)
    words = _random_words(keys, jnp.zeros_like(keys[:, 0]), 0, tiles * (1 + channels))
    flips = _bits(words, tiles * (1 + channels)).reshape(batch, tiles, 1 + channels)
    return StartDraws(signs=_signs(flips[:, :, 1:], images), across=flips[:, :, 0] == 1)


def _random_words(keys, evaluation, words, bits):
    """u32[B, n]: `words` of them and as many as it takes to hold `bits`, per image."""

    def draw(key, evaluation):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        shape = (words + -(-bits // 32),)
        return jax.random.bits(jax.random.fold_in(key, evaluation), shape, jnp.uint32)

    return jax.vmap(draw)(keys, evaluation)


def _bits(words, count):
    """The first bits of u32[B, n] words, u32[B, count]."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    return bits.reshape(len(words), -1)[:, :count]


def _signs(bits, images):
    return 1 - 2 * bits.astype(images.dtype)


def _key_data(keys):
    data = jax.random.key_data(keys)
    if data.shape[1:] != (2,):
        raise ValueError(
            f"keys of {jax.random.key_impl(keys)!r} do not fit Square; "
            "pass jax.random.key(seed, impl='threefry2x32')"
        )
    return data


# --- What the norms make of them. Rows [B, H, W*C]: XLA's loops over a last axis of 3 channels are
# 20 times slower on CPU. Whatever a query draws is separable in rows and columns: vectors [B, H, 1]
# and [B, 1, W*C] are made first, and combined in few passes over the image. ---


def _start_linf(images, epsilon, draws):
    return jnp.clip(images + per_image(epsilon, images) * draws.signs[:, None], 0, 1)


def _propose_linf(state, draws, windows, level):
    images, best, epsilon = state.images, state.x_best, state.epsilon[:, None, None]
    inside_row, inside_column = _window(state.points, draws, 0, jnp.asarray(windows.sides)[level])
    step = jnp.where(inside_column, 2 * epsilon * _by_channel(draws.signs, state.points), 0)
    moved = best + jnp.where(inside_row, step, 0)
    moved = jnp.minimum(jnp.maximum(moved, images - epsilon), images + epsilon)
    return jnp.clip(moved, 0, 1).reshape(state.points.shape)


def _start_mass(norm, images, epsilon, draws):
    """Five by five tiles (more if the image is oblong or tiny), each with a template."""
    batch, height, width, channels = images.shape
    side = _tile_side(images)
    down, right = height // side, width // side
    template = jnp.asarray(template_of(norm, side), images.dtype)[None, None]
    turned = draws.across[:, :, None, None]
    tiles = jnp.where(turned, template.swapaxes(2, 3), template)
    tiles = tiles[..., None] * draws.signs[:, :, None, None]  # [B, tiles, side, side, C]
    delta = tiles.reshape(batch, down, right, side, side, channels).swapaxes(2, 3)
    delta = delta.reshape(batch, down * side, right * side, channels)
    rest = (height - down * side, width - right * side)  # a margin, unchanged
    delta = jnp.pad(delta, ((0, 0), *((r // 2, r - r // 2) for r in rest), (0, 0)))
    return _to_sphere(norm, _rows(images), _rows(delta), epsilon).reshape(images.shape)


def _tile_side(images):
    return max(min(images.shape[1:3]) // 5, 1)


def _propose_mass(norm, state, draws, windows, level):
    """Gathers the mass of two windows, and what the ball has left, in window 1 on a template.

    Mass is the sum of squares on L2, of absolute values on L1, and `length` its root on L2.
    """
    if norm == "l2":
        mass, length = jnp.square, jnp.sqrt
    else:
        mass, length = jnp.abs, lambda total: total
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
        target = target * channels  # the reference's; the projection takes back what is too much
    shape = _template(state.points, draws, windows, level) * by_channel(draws.signs)
    shape = jnp.where(first, shape + delta * by_channel(1 / (1e-12 + length(mass_first))), 0)
    size = length(_per_channel(mass(shape), channels))
    delta = jnp.where(either, shape * by_channel(target / (1e-12 + size)), delta)
    return _to_sphere(norm, images, delta, state.epsilon).reshape(state.points.shape)


def _to_sphere(norm, images, delta, epsilon):
    if norm == "l2":
        scale = per_image(epsilon / (l2_norm(delta) + 1e-12), delta)
        return jnp.clip(images + scale * delta, 0, 1)
    # Shortened by the rounding of the sum, as in the reference.
    return (images + delta) + l1_correction(images, delta, epsilon * (1 - 1e-6))


def _template(images, draws, windows, level):
    """The template of `template_profiles` in window 1, something finite outside; [B, H, W*C]."""
    count, _, _, largest = windows.profiles.shape
    table = jnp.asarray(windows.profiles.reshape(2 * count, 2, largest), images.dtype)

    def profile(axis, turned):
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


def _window(images, draws, which, side):
    """Which rows and which columns a window covers, bool[B, H, 1] and bool[B, 1, W*C]."""

    def covered(axis):
        place = _places(images)[axis][None] - draws.offsets[:, 2 * which + axis, None]
        return (place >= 0) & (place < side[:, None])

    return covered(0)[:, :, None], covered(1)[:, None]


def _places(images):
    """The row of each row, and the column of each entry of one; NumPy."""
    _, height, width, channels = images.shape
    columns = np.repeat(np.arange(width, dtype=np.int32), channels)
    return np.arange(height, dtype=np.int32), columns


def _rows(images):
    return images.reshape(*images.shape[:2], -1)


def _by_channel(values, images):
    """One value per channel, f[B, C], for each entry of a row, f[B, 1, W*C]."""
    # A product, which XLA does not fuse: it would compute a tiled index for each entry of an image.
    spread = np.tile(np.eye(values.shape[1]), (1, images.shape[2])).astype(values.dtype)
    return jnp.dot(values, spread, precision="highest")[:, None]


def _per_channel(rows, channels):
    """The sum per channel of [B, H, W*C], f[B, C]."""
    return jnp.sum(jnp.sum(rows, axis=1).reshape(len(rows), -1, channels), axis=1)


class Geometry(NamedTuple):
    """What a norm does.

    `draw_start(keys, images) -> StartDraws`, `start(images, epsilon, draws) -> points`;
    `propose(state, draws, windows, level) -> points`, with the level i32[B] of the query.
    """

    draw_start: Callable[..., StartDraws]
    start: Callable[..., Array]
    propose: Callable[..., Array]


GEOMETRIES = {"linf": Geometry(_draw_stripes, _start_linf, _propose_linf)} | {
    norm: Geometry(
        _draw_tiles,
        functools.partial(_start_mass, norm),
        functools.partial(_propose_mass, norm),
    )
    for norm in ("l2", "l1")
}
