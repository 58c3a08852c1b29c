"""Blocks of a program, whose backward pass computes their values again instead of keeping them."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxrobust.interop.program import OperatorCall, Program, read_by

Compute = Callable[[Sequence[OperatorCall], Mapping[str, Any]], dict[str, Any]]


def parted(program: Program) -> Iterator[tuple[bool, list[OperatorCall], set[str]]]:
    """Yield steps that follow each other and belong to one block, or to none.

    Before them stands whether it is a block, and after them which of their values are read later.
    """
    runs = [
        (block, list(steps))
        for block, steps in itertools.groupby(program.steps, lambda s: program.blocks.get(s.name))
    ]
    results = {name for name in program.results.values() if name} | {*program.moved.values()}
    for at, (block, steps) in enumerate(runs):
        later = results.union(*(read_by(step) for _, rest in runs[at + 1 :] for step in rest))
        yield block is not None, steps, later & {step.name for step in steps}


def computed_again(
    compute: Compute, steps: Sequence[OperatorCall], kept: Collection[str], values: Mapping
) -> dict[str, Any]:
    """Return what `compute` makes of steps, only the values `kept`, by `jax.checkpoint`.

    Sizes and other plain numbers stay what they are.
    """
    names = set().union(*(read_by(step) for step in steps)) & values.keys()
    leaves, tree = jax.tree.flatten({name: values[name] for name in sorted(names)})
    made: dict[str, Any] = {}

    def block(arrays: list[Any]) -> list[Any]:
        known = jax.tree.unflatten(tree, _joined(leaves, arrays))
        found = compute(steps, known)
        made["leaves"], made["tree"] = jax.tree.flatten({name: found[name] for name in kept})
        return _arrays(made["leaves"])

    arrays = jax.checkpoint(block)(_arrays(leaves))
    return jax.tree.unflatten(made["tree"], _joined(made["leaves"], arrays))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def _arrays(leaves: list[Any]) -> list[Any]:
    return [leaf for leaf in leaves if _is_array(leaf)]


def _joined(leaves: list[Any], arrays: Sequence[Any]) -> list[Any]:
    """Return leaves with other arrays in place of those among them."""
    each = iter(arrays)
    return [next(each) if _is_array(leaf) else leaf for leaf in leaves]
