"""The order of equal numbers in PyTorch's `sort` and `topk`.

A gradient goes to the index that its element came from. On a CPU, PyTorch's indices come from
libstdc++: `std::sort`, `std::nth_element`, and `std::partial_sort` for a few of many elements.
Here all parts of a row are split at once. Rows without ties, and short rows, are sorted as usual.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.types import Array

_SHORT = 16  # up to here libstdc++ sorts by insertion, which is stable


def order(x: Array, dim: int, descending: bool) -> Array:
    """Return the positions of the numbers along `dim`, in the order of `torch.sort`."""
    if x.shape[dim] <= _SHORT or not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.argsort(x, axis=dim, stable=True, descending=descending)
    size = x.shape[dim]
    return _places(x, dim, descending, size, lambda ranks: _sorted(ranks, jnp.arange(size), size))


def first(x: Array, count: int, dim: int, descending: bool, in_order: bool) -> Array:
    """Return the positions of the first numbers along `dim`, as `torch.topk` selects them."""
    few = count * 64 <= x.shape[dim]

    def chosen(ranks: Array) -> Array:
        if few:
            return _heaped(ranks, count)
        order = _nth_element(ranks, count - 1)
        return (_sorted(ranks, order, count - 1) if in_order else order)[:count]

    return _places(x, dim, descending, count, chosen, always=not (few or in_order))


def _places(
    x: Array, dim: int, descending: bool, count: int, chosen: Any, always: bool = False
) -> Array:
    """Return the first positions along `dim`; `chosen` selects by ranks i[N] among equals."""
    rows = jnp.moveaxis(lax.stop_gradient(x), dim, -1)
    places = jnp.argsort(rows, axis=-1, stable=True, descending=descending)
    ordered = jnp.take_along_axis(rows, places, -1)
    previous, after = ordered[..., :-1], ordered[..., 1:]
    equal = (previous == after) | (jnp.isnan(previous) & jnp.isnan(after))

    def as_pytorch(places: Array, equal: Array) -> Array:
        steps = jnp.cumsum(~equal, -1)
        ranks = jnp.concatenate([jnp.zeros_like(steps[..., :1]), steps], -1)
        ranks = jnp.put_along_axis(jnp.zeros_like(ranks), places, ranks, -1, inplace=False)
        selected = jax.vmap(chosen)(ranks.reshape(-1, ranks.shape[-1]))
        return selected.reshape(*ranks.shape[:-1], count).astype(places.dtype)

    tied = equal[..., :count].any()
    selected = lax.cond(
        tied | always, as_pytorch, lambda places, _: places[..., :count], places, equal
    )
    return jnp.moveaxis(selected, -1, dim)


def _split(
    ranks: Array, order: Array, first: Array, last: Array, active: Array
) -> tuple[Array, Array]:
    """Split parts of `order` at their median of three, with libstdc++'s exchanges.

    Args:
      ranks: i[N] of the numbers.
      order: i[N], places of the numbers.
      first, last: i[N], where the part of each position begins and ends.
      active: bool[N], whether it is split.
    Returns:
      The new order, and for each position the start of the second half of its part.
    """
    at, ordered, middle = jnp.arange(len(order)), ranks[order], first + (last - first) // 2
    a, b, c = ordered[first + 1], ordered[middle], ordered[last - 1]
    low = jnp.where(b < c, middle, jnp.where(a < c, last - 1, first + 1))
    high = jnp.where(a < c, first + 1, jnp.where(b < c, last - 1, middle))
    pivot_at = jnp.where(a < b, low, high)
    source = jnp.where(at == first, pivot_at, jnp.where(at == pivot_at, first, at))
    source = jnp.where(active, source, at)
    order, ordered = order[source], ordered[source]

    # From both ends, numbers on the wrong side or equal to the pivot are exchanged in pairs.
    inside, pivot = active & (at > first), ordered[first]
    not_below, not_above = inside & (ordered >= pivot), inside & (ordered <= pivot)
    lefts, rights = jnp.cumsum(not_below), jnp.cumsum(not_above)
    from_left, beyond = lefts - lefts[first], rights[last - 1] - rights
    from_right = beyond + 1
    leaves = not_below & (beyond >= from_left)
    comes = not_above & (jnp.where(not_below, from_left - 1, from_left) >= from_right)
    none = jnp.full(len(order) + 1, len(order))
    nth_left = none.at[jnp.where(not_below, first + from_left, len(order))].set(at)
    nth_right = none.at[jnp.where(not_above, first + from_right, len(order))].set(at)
    source = jnp.where(comes, nth_left[first + from_right], at)
    source = jnp.where(leaves, nth_right[first + from_left], source)
    exchanged = jnp.cumsum(leaves)
    count = exchanged[last - 1] - exchanged[first]
    more = from_left[last - 1] > count
    next_left = jnp.where(more, nth_left[first + count + 1], len(order))
    last_right = jnp.where(count > 0, nth_right[first + count], len(order))
    return order[source], jnp.minimum(next_left, last_right)


def _inserted(ranks: Array, order: Array, first: Any, last: Any) -> Array:
    """Sort the positions [first, last) by insertion."""
    at = jnp.arange(len(order))
    inside = (at >= first) & (at < last)
    keys = jnp.where(inside, ranks[order], 0), jnp.where(inside, first, at)
    return order[jnp.lexsort(keys)]


def _sorted(ranks: Array, order: Array, count: int) -> Array:
    """Sort the first positions like `std::sort`."""
    at = jnp.arange(len(order))
    inside = at < count

    def split(state: Any) -> Any:
        order, first, last = state
        active = last - first > _SHORT
        order, cut = _split(ranks, order, first, last, active)
        behind = at >= cut
        return (
            order,
            jnp.where(active & behind, cut, first),
            jnp.where(active & ~behind, cut, last),
        )

    parts = order, jnp.where(inside, 0, at), jnp.where(inside, count, at + 1)
    order = lax.while_loop(lambda state: (state[2] - state[1] > _SHORT).any(), split, parts)[0]
    return _inserted(ranks, order, 0, count)


def _nth_element(ranks: Array, place: int) -> Array:
    """Return an order with the number of this rank in its position, like `std::nth_element`."""
    at = jnp.arange(len(ranks))

    def split(state: Any) -> Any:
        order, first, last = state
        inside = (at >= first) & (at < last)
        parts = jnp.where(inside, first, at), jnp.where(inside, last, at + 1)
        order, cuts = _split(ranks, order, *parts, inside)
        cut = cuts[first]
        after_cut = cut <= place
        return order, jnp.where(after_cut, cut, first), jnp.where(after_cut, last, cut)

    ends = jnp.asarray(0, at.dtype), jnp.asarray(len(ranks), at.dtype)
    state = lax.while_loop(lambda state: state[2] - state[1] > 3, split, (at, *ends))
    return _inserted(ranks, *state)


def _heaped(ranks: Array, count: int) -> Array:
    """Return the first positions in order, like `std::partial_sort` with its heap."""
    at = jnp.arange(len(ranks))

    def adjust(heap: Array, hole: Any, length: Any, value: Array) -> Array:
        top = hole

        def down(state: Any) -> Any:
            heap, hole = state
            child = 2 * (hole + 1)
            child = jnp.where(ranks[heap[child]] < ranks[heap[child - 1]], child - 1, child)
            return heap.at[hole].set(heap[child]), child

        heap, hole = lax.while_loop(lambda state: state[1] < (length - 1) // 2, down, (heap, hole))
        alone = (length % 2 == 0) & (hole == (length - 2) // 2)
        heap = jnp.where(alone, heap.at[hole].set(heap[2 * hole + 1]), heap)
        hole = jnp.where(alone, 2 * hole + 1, hole)

        def above(state: Any) -> Any:
            heap, hole = state
            return (hole > top) & (ranks[heap[(hole - 1) // 2]] < ranks[value])

        def up(state: Any) -> Any:
            heap, hole = state
            return heap.at[hole].set(heap[(hole - 1) // 2]), (hole - 1) // 2

        heap, hole = lax.while_loop(above, up, (heap, hole))
        return heap.at[hole].set(value)

    def following(heap: Array, start: Any) -> Array:
        better = (at >= start) & (ranks < ranks[heap[0]])
        return jnp.where(better.any(), jnp.argmax(better), len(ranks)).astype(at.dtype)

    def build(i: Any, heap: Array) -> Array:
        parent = count // 2 - 1 - i
        return adjust(heap, parent, count, heap[parent])

    def replace(state: Any) -> Any:
        heap, place = state
        heap = adjust(heap, jnp.zeros_like(place), count, place)
        return heap, following(heap, place + 1)

    def pop(i: Any, heap: Array) -> Array:
        length = count - 1 - i
        value = heap[length]
        return adjust(heap.at[length].set(heap[0]), jnp.zeros_like(length), length, value)

    heap = lax.fori_loop(0, count // 2, build, at[:count])
    start = heap, following(heap, count)
    heap, _ = lax.while_loop(lambda state: state[1] < len(ranks), replace, start)
    return lax.fori_loop(0, count - 1, pop, heap)
