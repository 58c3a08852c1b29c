"""Blocks of a program: computed again in the backward pass, and equal ones compiled as one.

A block is a run of steps that follow each other and belong to one part of the module's.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.pytorch.program import OWN, NumberType, Of, OperatorCall, Program, read_by

_SAME, _WEIGHT = "the same value", "a weight"


class Part(NamedTuple):
    """Steps that follow each other."""

    block: str | None  # name of the part of the module; None: they are of no block
    steps: Sequence[OperatorCall]
    kept: frozenset[str]  # which of their values are read later


# (part, values, weights that norms read in float32, numbers of draws) -> the values `kept`.
Compute = Callable[[Part, Mapping, Mapping, Mapping], dict[str, Any]]
# Names of values of a block -> those values, of whatever steps they need.
Subset = Callable[[Iterable[str]], dict[str, Any]]
# (part, values, subset) -> the values `kept`; None: another block.
Pattern = Callable[[Part, Mapping, Subset], dict[str, Any] | None]


def parted(program: Program) -> list[Part]:
    """Divide a program into its blocks and what is between them."""
    runs = [
        (block, tuple(steps))
        for block, steps in itertools.groupby(program.steps, lambda s: program.blocks.get(s.name))
    ]
    later = {name for name in program.results.values() if name} | {*program.moved.values()}
    parts = []
    for block, steps in reversed(runs):
        parts.append(Part(block, steps, frozenset(later & {step.name for step in steps})))
        later = later.union(*map(read_by, steps))
    return parts[::-1]


def computed(
    program: Program,
    compute: Compute,
    values: Mapping,
    wide: Mapping,
    places: Mapping,
    *,
    remat: bool,
    scan: bool,
) -> dict[str, Any]:
    """Compute a program block by block, and return the values between blocks."""

    def one(part: Part, values: Mapping) -> Mapping[str, Any]:
        if remat and part.block:
            return _computed_again(compute, part, values, wide, places)
        return compute(part, values, wide, places)

    values = dict(values)
    for parts in alike(program) if scan else [parted(program)]:
        values |= one(parts[0], values)
        made = None
        if scan and len(parts) > 2:
            made = _scanned(program, compute, parts, values, wide, remat=remat)
        if made is not None:
            values |= made
            continue
        for part in parts[1:]:
            values |= one(part, values)
    return values


def needed(steps: Sequence[OperatorCall], names: Iterable[str]) -> list[OperatorCall]:
    """Choose the steps that some of their values need."""
    wanted, chosen = {*names}, []
    for step in reversed(steps):
        if step.name in wanted:
            wanted |= read_by(step)
            chosen.append(step)
    return chosen[::-1]


def _computed_again(
    compute: Compute, part: Part, values: Mapping, *rest: Mapping
) -> dict[str, Any]:
    """Return the values `kept` that `compute` makes of a block, by `jax.checkpoint`.

    Sizes and other plain numbers stay what they are.
    """
    names = set().union(*map(read_by, part.steps)) & values.keys()
    leaves, tree = jax.tree.flatten({name: values[name] for name in sorted(names)})
    made: dict[str, Any] = {}

    def block(arrays: list[Any]) -> list[Any]:
        known = jax.tree.unflatten(tree, _joined(leaves, arrays))
        found = compute(part, known, *rest)
        made["leaves"], made["tree"] = jax.tree.flatten(found)
        return _arrays(made["leaves"])

    arrays = jax.checkpoint(block)(_arrays(leaves))
    return jax.tree.unflatten(made["tree"], _joined(made["leaves"], arrays))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def _arrays(leaves: list[Any]) -> list[Any]:
    return [leaf for leaf in leaves if _is_array(leaf)]


def _joined(leaves: list[Any], arrays: Sequence[Any]) -> list[Any]:
    each = iter(arrays)
    return [next(each) if _is_array(leaf) else leaf for leaf in leaves]


# ------------------------------------------------------------------------------------ equal blocks


class Form(NamedTuple):
    """What a block computes, whatever its values are called."""

    operations: tuple[Any, ...]
    kept: frozenset[int]  # places of the steps whose values are read later
    read: tuple[str, ...]  # names of the values from before, in the order in which they are read


def form(part: Part) -> Form:
    """Write a block with places instead of names."""
    places = {step.name: place for place, step in enumerate(part.steps)}
    read: dict[str, int] = {}

    def written(operand: Any) -> Any:
        if isinstance(operand, NumberType):
            return operand.name, "type"
        if isinstance(operand, Of):
            if operand.name in places:
                return "step", places[operand.name]
            return "read", read.setdefault(operand.name, len(read))
        if isinstance(operand, tuple):
            return tuple(map(written, operand))
        return type(operand).__name__, operand

    operations = tuple(
        (step.operator, written(step.operands), written((*sorted(step.named.items()),)))
        for step in part.steps
    )
    return Form(operations, frozenset(places[name] for name in part.kept), tuple(read))


def alike(program: Program) -> Iterator[list[Part]]:
    """Yield the parts of a program, blocks that follow each other and compute the same together."""
    parts = parted(program)
    forms = [form(part) if part.block else None for part in parts]
    start, link = 0, None
    for at in range(1, len(parts) + 1):
        found = _link(program, parts[at - 1], forms[at - 1], forms[at]) if at < len(parts) else None
        if found is None or link not in (None, found):
            yield parts[start:at]
            start, link = at, None
        else:
            link = found


def _link(
    program: Program, before: Part, first: Form | None, second: Form | None
) -> tuple[Any, ...] | None:
    """Say for each value that the second block reads where it is from; None: they are not alike.

    That is the place of a step of the first block, or it is a weight of each, or the same value.
    """
    if first is None or second is None or first[:2] != second[:2]:
        return None
    if any(operation[0] == OWN for operation in first.operations):
        return None
    places = {step.name: place for place, step in enumerate(before.steps)}
    link: list[Any] = []
    for mine, theirs in zip(first.read, second.read, strict=True):
        if mine == theirs:
            link.append(_SAME)
        elif {mine, theirs} <= program.weights.keys():
            link.append(_WEIGHT)
        elif theirs in places:
            link.append(places[theirs])
        else:
            return None
    return tuple(link)


def _scanned(
    program: Program,
    compute: Compute,
    parts: list[Part],
    values: Mapping,
    wide: Mapping,
    *,
    remat: bool,
) -> dict[str, Any] | None:
    """Return the values `kept` of blocks that are alike, after the first, by one that is compiled.

    None: their weights have several shapes, or what one hands to the next is not what it was given.
    """
    draws = {name: place for place, name in enumerate(program.draws)}
    before, *rest = parts
    forms, model = [form(part) for part in rest], rest[0]
    link = _link(program, before, form(before), forms[0])
    assert link is not None
    handed = [at for at, where in enumerate(link) if isinstance(where, int)]
    own = [at for at, where in enumerate(link) if where == _WEIGHT]
    drawing = [at for at, step in enumerate(model.steps) if step.name in draws]
    stacks: list[dict[str, Any]] = [{}, {}]
    for stack, source in zip(stacks, (values, wide), strict=True):
        for at in own:
            arrays: list[Any] = [source.get(each.read[at]) for each in forms]
            if len({getattr(a, "shape", None) for a in arrays}) > 1:
                return None
            if arrays[0] is not None:
                stack[forms[0].read[at]] = jnp.stack(arrays)
    numbers = {
        model.steps[at].name: jnp.asarray([draws[part.steps[at].name] for part in rest])
        for at in drawing
    }
    kept = sorted(forms[0].kept)

    def body(carry: list[Any], given: Any) -> tuple[list[Any], list[Any]]:
        weights, wider, places = given
        names = (forms[0].read[at] for at in handed)
        known = {**values, **weights, **dict(zip(names, carry, strict=True))}
        found = compute(model, known, {**wide, **wider}, {**draws, **places})
        outs = [found[model.steps[at].name] for at in kept]
        return [found[model.steps[link[at]].name] for at in handed], outs

    given = (*stacks, numbers)
    start = [values[forms[0].read[at]] for at in handed]
    if not all(map(_is_array, jax.tree.leaves(start))):
        return None
    one = jax.tree.map(lambda a: a[0], given)
    if _types(jax.eval_shape(lambda c, g: body(c, g)[0], start, one)) != _types(start):
        return None
    outs = lax.scan(jax.checkpoint(body) if remat else body, start, given)[1]
    return {
        part.steps[at].name: jax.tree.map(lambda a, n=number: a[n], out)
        for number, part in enumerate(rest)
        for at, out in zip(kept, outs, strict=True)
    }


def _types(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return [(a.shape, a.dtype) for a in leaves], structure
