"""Blocks of a program: recomputed in the backward pass; equal blocks are compiled once.

A block is a run of consecutive steps that belong to one part of the module.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.pytorch.program import OWN, NumberType, Of, OperatorCall, Program, arrays_of, read_by

_SAME, _WEIGHT = "the same value", "a weight"


class Part(NamedTuple):
    """Consecutive steps."""

    block: str | None  # name of the part of the module; None: not in a block
    steps: Sequence[OperatorCall]
    results: frozenset[str]  # values that later steps read


# (part, values, weights that norms read in float32, numbers of draws) -> the part's results.
Compute = Callable[[Part, Mapping, Mapping, Mapping], dict[str, Any]]
# Names of values of a block -> the values; only the necessary steps are computed.
Subset = Callable[[Iterable[str]], dict[str, Any]]
# (part, values, subset) -> the part's results; None: not this pattern.
Pattern = Callable[[Part, Mapping, Subset], dict[str, Any] | None]


def parted(program: Program) -> list[Part]:
    """Divide a program into its blocks and the steps between them."""
    runs = itertools.groupby(program.steps, lambda step: program.blocks.get(step.name))
    later = {name for name in program.results.values() if name} | {*program.moved.values()}
    parts = []
    for block, steps in reversed([(block, tuple(steps)) for block, steps in runs]):
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
    """Compute a program block by block, and return the values between the blocks."""
    values = dict(values)
    for parts in alike(program) if scan else [parted(program)]:
        for at, part in enumerate(parts):
            if at == 1 and scan and len(parts) > 2:
                results = _scanned(program, compute, parts, values, wide, remat=remat)
                if results is not None:
                    values |= results
                    break
            if remat and part.block:
                values |= _computed_again(compute, part, values, wide, places)
            else:
                values |= compute(part, values, wide, places)
    return values


def _computed_again(
    compute: Compute, part: Part, values: Mapping, wide: Mapping, places: Mapping
) -> dict[str, Any]:
    """Compute a block with `jax.checkpoint`; plain numbers stay plain."""
    names = set().union(*map(read_by, part.steps)) & values.keys()
    arrays, rebuilt = arrays_of({name: values[name] for name in sorted(names)})
    rebuild_results: list[Callable] = []

    def block(arrays: list[Any]) -> list[Any]:
        arrays, rebuild = arrays_of(compute(part, rebuilt(arrays), wide, places))
        rebuild_results.append(rebuild)
        return arrays

    arrays = jax.checkpoint(block)(arrays)
    return rebuild_results[-1](arrays)


# ------------------------------------------------------------------------------------ equal blocks


class Form(NamedTuple):
    """A block's computation, independent of the names of its values."""

    operations: tuple[Any, ...]
    results: frozenset[int]  # places of the steps whose values are read later
    inputs: tuple[str, ...]  # names of earlier values, in the order in which they are read


def form(part: Part) -> Form:
    """Describe a block by positions instead of names."""
    places = {step.name: place for place, step in enumerate(part.steps)}
    inputs: dict[str, int] = {}

    def placed(operand: Any) -> Any:
        if isinstance(operand, NumberType):
            return operand.name, "type"
        if isinstance(operand, Of):
            if operand.name in places:
                return "step", places[operand.name]
            return "input", inputs.setdefault(operand.name, len(inputs))
        if isinstance(operand, tuple):
            return tuple(map(placed, operand))
        return type(operand).__name__, operand

    operations = tuple(
        (step.operator, placed(step.operands), placed((*sorted(step.keywords.items()),)))
        for step in part.steps
    )
    return Form(operations, frozenset(places[name] for name in part.results), tuple(inputs))


def alike(program: Program) -> Iterator[list[Part]]:
    """Yield the parts of a program; consecutive blocks with the same computation come together."""
    parts = parted(program)
    forms = [form(part) if part.block else None for part in parts]
    group, group_link = parts[:1], None
    for at in range(1, len(parts)):
        link = _link(program, parts[at - 1], forms[at - 1], forms[at])
        if link is None or group_link not in (None, link):
            yield group
            group, group_link = [parts[at]], None
        else:
            group.append(parts[at])
            group_link = link
    if group:
        yield group


def _link(
    program: Program, first_part: Part, first: Form | None, second: Form | None
) -> tuple[Any, ...] | None:
    """Find the origin of each value that the second block reads; None: the blocks differ."""
    # It is a step of the first block, a weight of each block, or a value that both share.
    if first is None or second is None or first[:2] != second[:2]:
        return None
    if any(operation[0] == OWN for operation in first.operations):
        return None
    places = {step.name: place for place, step in enumerate(first_part.steps)}
    link: list[Any] = []
    for of_first, of_second in zip(first.inputs, second.inputs, strict=True):
        if of_first == of_second:
            link.append(_SAME)
        elif {of_first, of_second} <= program.weights.keys():
            link.append(_WEIGHT)
        elif of_second in places:
            link.append(places[of_second])
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
    """Return the results of equal blocks after the first, compiled as one."""
    # None: shapes of weights differ, or a block's output does not fit the next block's input.
    draws = {name: place for place, name in enumerate(program.draws)}
    first, *others = parts
    forms, model = [form(part) for part in others], others[0]
    link = _link(program, first, form(first), forms[0])
    assert link is not None
    names = forms[0].inputs
    carried = {  # name of an input -> of the step of the block before that gives it
        names[at]: model.steps[place].name
        for at, place in enumerate(link)
        if isinstance(place, int)
    }
    stacks: list[dict[str, Any]] = [{}, {}]
    for stack, source in zip(stacks, (values, wide), strict=True):
        for at in (at for at, place in enumerate(link) if place == _WEIGHT):
            arrays: list[Any] = [source.get(block.inputs[at]) for block in forms]
            if len({getattr(a, "shape", None) for a in arrays}) > 1:
                return None
            if arrays[0] is not None:
                stack[names[at]] = jnp.stack(arrays)
    numbers = {
        step.name: jnp.asarray([draws[part.steps[at].name] for part in others])
        for at, step in enumerate(model.steps)
        if step.name in draws
    }
    places = sorted(forms[0].results)

    def body(carry: list[Any], per_block: Any) -> tuple[list[Any], list[Any]]:
        weights, wider, numbers = per_block
        inputs = {**values, **weights, **dict(zip(carried, carry, strict=True))}
        results = compute(model, inputs, {**wide, **wider}, {**draws, **numbers})
        outs = [results[model.steps[at].name] for at in places]
        return [results[name] for name in carried.values()], outs

    per_block = (*stacks, numbers)
    start = [values[name] for name in carried]
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(start)):
        return None
    one = jax.tree.map(lambda a: a[0], per_block)
    if _types(jax.eval_shape(lambda c, g: body(c, g)[0], start, one)) != _types(start):
        return None
    outs = lax.scan(jax.checkpoint(body) if remat else body, start, per_block)[1]
    return {
        part.steps[at].name: jax.tree.map(lambda a, n=number: a[n], out)
        for number, part in enumerate(others)
        for at, out in zip(places, outs, strict=True)
    }


def _types(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return [(a.shape, a.dtype) for a in leaves], structure
