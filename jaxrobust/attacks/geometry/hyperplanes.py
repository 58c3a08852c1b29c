"""The shortest move from a point in the box [0, 1] to a hyperplane, staying in the box.

Source: Croce & Hein 2020 (arXiv 1907.02044), section 2.2; parity: tests/attacks/test_fab.py.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxrobust.types import Array, PerImage

Rows = Float[Array, "B d"]  # images or normals, flat

_FAR = 1e12  # a level at which every entry has reached the box


def project_onto_hyperplane(points: Rows, normals: Rows, offsets: PerImage, *, norm: str) -> Rows:
    """Return the shortest move from points in the box [0, 1] to a hyperplane, inside the box.

    Args:
      points: f[B, d] in [0, 1].
      normals: f[B, d]; entries up to 1e-8 in size count as 0 for L2 and L1.
      offsets: f[B]; the hyperplane is {z | <normal, z> = offset}.
      norm: "linf", "l2" or "l1", which measures the move.
    Returns:
      f[B, d], to add to the points. If the hyperplane does not meet the box: the move to the
      nearest corner.
    """
    if norm not in _MOVES:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(_MOVES)}")
    return displacement(points, normals, jnp.sum(normals * points, axis=1) - offsets, norm)


def displacement(points: Rows, normals: Rows, excess: PerImage, norm: str) -> Rows:
    """Project by `excess` f[B] = <normal, point> - offset, which rounds less than the offset."""
    # Every entry can only move down along the normal, as far as the box lets it.
    normals = jnp.where((excess >= 0)[:, None], normals, -normals)
    reach = jnp.where(normals > 0, points, 1 - points)
    moves = _MOVES[norm](jnp.abs(normals), reach, jnp.abs(excess))
    return jnp.where(normals > 0, -moves, jnp.where(normals < 0, moves, 0))


def _moves_linf(sizes: Rows, reach: Rows, excess: PerImage) -> Rows:
    level = _level(1.0, sizes, reach, excess)
    return jnp.minimum(level[:, None], reach)


def _moves_l2(sizes: Rows, reach: Rows, excess: PerImage) -> Rows:
    sizes = jnp.where(sizes > 1e-8, sizes, 0)
    level = _level(sizes, sizes, reach, excess)
    return jnp.minimum(level[:, None] * sizes, reach)


def _level(speed: Any, sizes: Rows, reach: Rows, excess: PerImage) -> PerImage:
    """Return the level f[B] at which sum(sizes * min(level * speed, reach)) equals the excess."""
    # The sum is concave and piecewise linear in the level, so Newton's method climbs to the root
    # from below and has reached it once no further entry exhausts its reach: few passes, no sort.

    def body(carry: Any) -> Any:
        passes, level, _ = carry
        free = level[:, None] * speed < reach
        # Select before multiplying: XLA would store products that the loop does not change.
        slope = jnp.sum(jnp.where(free, sizes, 0) * speed, axis=1)
        stopped = jnp.sum(jnp.where(free, 0, reach) * sizes, axis=1)
        higher = jnp.where(slope > 0, jnp.minimum((excess - stopped) / slope, _FAR), _FAR)
        return passes + 1, jnp.maximum(level, higher), higher > level

    def unfinished(carry: Any) -> Array:
        passes, _, climbs = carry
        goes_on: Array = jnp.any(climbs) & (passes < 64)
        return goes_on

    # Start as if no entry exhausted its reach.
    level = jnp.minimum(excess / jnp.maximum(jnp.sum(sizes * speed, axis=1), 1e-30), _FAR)
    start = 0, level, jnp.ones_like(excess, bool)
    return jax.lax.while_loop(unfinished, body, start)[1]


class _Cut(NamedTuple):
    """The entries larger than `size` f[B], how far they can move to the plane, their number."""

    size: PerImage
    gain: PerImage
    number: PerImage


def _moves_l1(sizes: Rows, reach: Rows, excess: PerImage) -> Rows:
    """Move entries into their corner in order of size, and the last one as far as needed."""
    # Bisects the sizes, instead of sorting, until a single entry, or equal ones, remain between the
    # cut `upper`, whose entries move fully, and `lower`, whose entries are more than enough.
    sizes = jnp.where(sizes > 1e-8, sizes, 0)
    gains = sizes * reach

    def cut(size: PerImage) -> _Cut:
        chosen = (sizes > size[:, None]).astype(sizes.dtype)
        return _Cut(size, jnp.sum(chosen * gains, axis=1), jnp.sum(chosen, axis=1))

    def middle(lower: _Cut, upper: _Cut) -> PerImage:
        return lower.size + (upper.size - lower.size) / 2

    def body(carry: tuple[_Cut, _Cut]) -> tuple[_Cut, _Cut]:
        lower, upper = carry
        new = cut(middle(lower, upper))
        select = partial(jnp.where, new.gain > excess)
        return jax.tree.map(select, new, lower), jax.tree.map(select, upper, new)

    def unfinished(carry: tuple[_Cut, _Cut]) -> Array:
        lower, upper = carry
        between = middle(lower, upper)
        several = lower.number > upper.number + 1
        return jnp.any(several & (between > lower.size) & (between < upper.size))

    lower, upper = cut(jnp.zeros_like(excess)), cut(jnp.max(sizes, axis=1))
    in_reach = lower.gain > excess  # otherwise all move fully
    upper = jax.tree.map(partial(jnp.where, in_reach), upper, lower)
    lower, upper = jax.lax.while_loop(unfinished, body, (lower, upper))
    mass = lower.gain - upper.gain
    share = jnp.clip((excess - upper.gain) / jnp.where(mass > 0, mass, 1), 0, 1)
    last = jnp.where(sizes > lower.size[:, None], share[:, None] * reach, 0)
    return jnp.where(sizes > upper.size[:, None], reach, last)


_MOVES = {"linf": _moves_linf, "l2": _moves_l2, "l1": _moves_l1}
