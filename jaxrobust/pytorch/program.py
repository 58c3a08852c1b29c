"""A program of PyTorch's operators as data, and its values in JAX.

Nothing here needs PyTorch. A program is a list of steps; a step names an operator of
`operators.TABLE`, and its arguments name what earlier steps gave. PyTorch puts the channels of
images before their sides; the fast layout of XLA's convolutions has them last. So the values of
convolutions and what follows them are kept as `ChannelsLast`, until an operator needs them as
PyTorch has them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust.types import Array

Ints = Sequence[int]  # sizes, places or dimensions, as operands
# Of a `torch.autograd.Function`; see `gradients`.
OWN = "jaxrobust.own_gradient.default"


class Of(NamedTuple):
    """The value of an earlier step, as an argument."""

    name: str


class NumberType(NamedTuple):
    """A type of numbers, as an argument: "float32", "int64", "bool"."""

    name: str


class OperatorCall(NamedTuple):
    """One operator with its arguments, all of its schema, in its order."""

    name: str
    operator: str  # such as aten.convolution.default
    operands: tuple[Any, ...]
    named: Mapping[str, Any]  # those that PyTorch takes by name only
    line: str  # of the module's source, which computes this
    backward: tuple["OperatorCall", ...] = ()  # of `own_gradient`: from its holes to its gradients


class Program(NamedTuple):
    """From images and weights to what the module returns."""

    images: str  # name of the value that is the images
    weights: Mapping[str, str]  # name of a value -> key among the weights
    constants: Mapping[str, Any]  # name of a value -> array, which is no weight
    steps: tuple[OperatorCall, ...]
    results: Mapping[str, str | None]  # what the module returns: its place there -> name of a value
    dtype: str = "float32"  # of its floating weights; `run` computes in that of those it is given
    single: bool = False  # it takes one image at a time
    draws: tuple[str, ...] = ()  # the steps that draw random numbers
    # What training changes: key among the weights -> name of the value that it becomes.
    moved: Mapping[str, str] = MappingProxyType({})
    image_axes: Mapping[str, int] = MappingProxyType({})  # of what each step draws in training
    blocks: Mapping[str, str] = MappingProxyType(
        {}
    )  # name of a step -> of its block, if it has one


class Converted(NamedTuple):
    """A network on both sides."""

    logits_fn: jax.tree_util.Partial
    weights: dict[str, Array]
    program: Program
    exported: Any  # torch.export.ExportedProgram, of core operators
    module: Any  # PyTorch's own
    output: str  # which of the results are the logits
    keyed: bool = False  # `logits_fn` takes keys [B] too


class ChannelsLast(NamedTuple):
    """Values [B,C,sides...] of PyTorch, which lie here with channels last: [B,sides...,C]."""

    array: Array

    def plain(self) -> Array:
        """Return the values as PyTorch has them."""
        return jnp.moveaxis(self.array, -1, 1)


class OperatorRule(NamedTuple):
    """How an operator is computed.

    `plain` takes and returns arrays as PyTorch has them; None: `last` is always taken. `last` takes
    the first operand with channels last, and says with `ChannelsLast` what it returns so; None:
    `plain` is always taken. `joins` says that operands broadcast against each other, in either
    form.
    """

    plain: Callable[..., Any] | None
    last: Callable[..., Any] | None = None
    joins: bool = False


def run(
    program: Program,
    table: Mapping[str, OperatorRule],
    weights: Mapping[str, Array],
    images: Array,
    key: Array | None = None,
) -> dict[str, Any]:
    """Compute all values of a program, by name, of images f[B,H,W,C]; draws have keys of `key`."""
    keys = {}
    if program.draws:
        assert key is not None, "it draws random numbers"
        keys = {name: jax.random.fold_in(key, place) for place, name in enumerate(program.draws)}
    dtype = computing(weights, images)
    values: dict[str, Any] = {
        name: a.astype(dtype) if a.dtype.name == program.dtype else a
        for name, a in program.constants.items()
    }
    values |= {name: weights[key] for name, key in program.weights.items()}
    values[program.images] = ChannelsLast(images.astype(dtype))
    # PyTorch's operators join numbers of several types and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for step in program.steps:
            own = keys.get(step.name)
            values[step.name] = compute(step, table, values, {program.dtype: dtype}, own)
    return values


def computing(weights: Mapping[str, Array], images: Array) -> Any:
    """Return the type that a program computes in: that of its weights, else that of the images."""
    floating = {a.dtype for a in weights.values() if jnp.issubdtype(a.dtype, jnp.floating)}
    return jnp.result_type(*floating) if floating else images.dtype


def compute(
    step: OperatorCall,
    table: Mapping[str, OperatorRule],
    values: Mapping[str, Any],
    types: Mapping[str, Any],
    key: Array | None = None,
) -> Any:
    """Compute a step; `types`: what some types are computed in; `key`: of a step that draws."""

    def read(operand: Any) -> Any:
        if isinstance(operand, Of):
            return values[operand.name]
        if isinstance(operand, NumberType):
            return types.get(operand.name) or jax.dtypes.canonicalize_dtype(operand.name)
        if isinstance(operand, tuple):
            return [read(each) for each in operand]
        return operand

    if step.operator == "getitem":
        several, place = step.operands
        return values[several.name][place]
    if step.operator == OWN:
        return _own_gradient(step, table, values, types)
    row = table[step.operator]
    operands = [read(operand) for operand in step.operands]
    named = {name: read(operand) for name, operand in step.named.items()}
    if key is not None:
        operands = [key, *operands]
    if row.joins and row.plain and (joined := _joined(operands)):
        return ChannelsLast(row.plain(*joined, **named))
    if row.last and (row.plain is None or _is_last(operands[0])):
        return row.last(_last(operands[0]), *map(plain, operands[1:]), **named)
    assert row.plain is not None
    return row.plain(*map(plain, operands), **named)


def names_in(operand: Any) -> Iterator[str]:
    """Yield the names of the values that an operand reads."""
    if isinstance(operand, Of):
        yield operand.name
    elif isinstance(operand, tuple) and not isinstance(operand, NumberType):
        for each in operand:
            yield from names_in(each)


def read_by(step: OperatorCall) -> set[str]:
    """Return the names of the values that a step reads, and its backward pass from outside."""
    if step.operator == OWN:
        outputs, holes, inputs, gradients = step.operands
        inside = {*names_in(holes), *(each.name for each in step.backward)}
        read = {*names_in(gradients)}.union(*map(read_by, step.backward)) - inside
        return {*names_in(outputs), *names_in(inputs)} | read
    return {*names_in(step.operands), *names_in(tuple(step.named.values()))}


def _own_gradient(
    step: OperatorCall,
    table: Mapping[str, OperatorRule],
    values: Mapping[str, Any],
    types: Mapping[str, Any],
) -> list[Array]:
    names = ([*names_in(each)] for each in step.operands)
    outputs, holes, inputs, gradients = names
    read = {name: values[name] for name in sorted(read_by(step)) if name not in outputs}
    leaves, tree = jax.tree.flatten(read)
    sizes = [leaf if isinstance(leaf, int | float) else None for leaf in leaves]
    arrays = [leaf for leaf, size in zip(leaves, sizes, strict=True) if size is None]

    @jax.custom_vjp
    def own(inputs: Any, outputs: Any, arrays: Any) -> Any:
        return outputs

    def forward(inputs: Any, outputs: Any, arrays: Any) -> Any:
        return outputs, (inputs, outputs, arrays)

    def backward(saved: Any, cotangents: Any) -> Any:
        towards, given, arrays = saved
        each = iter(arrays)
        restored = [next(each) if size is None else size for size in sizes]
        known = {**jax.tree.unflatten(tree, restored), **dict(zip(outputs, given, strict=True))}
        known |= dict(zip(holes, cotangents, strict=True))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for part in step.backward:
                known[part.name] = compute(part, table, known, types)
        pairs = zip(gradients, towards, strict=True)
        return [plain(known[name]).astype(x.dtype) for name, x in pairs], None, None

    own.defvjp(forward, backward)
    taken = ([plain(values[name]) for name in group] for group in (inputs, outputs))
    return own(*taken, arrays)


def _is_last(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) and value else value, ChannelsLast)


def plain(value: Any) -> Any:
    """Return a value, or a list of them, as PyTorch has it."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.plain() if isinstance(value, ChannelsLast) else value


def _last(value: Any) -> Any:
    if isinstance(value, list):
        return [_last(each) for each in value]
    return value.array if isinstance(value, ChannelsLast) else jnp.moveaxis(value, 1, -1)


def _joined(operands: list[Any]) -> list[Any]:
    """Return operands with channels last; none, if no such one has as many axes as any."""
    axes = max((each.array.ndim for each in operands if isinstance(each, ChannelsLast)), default=0)
    if not axes or axes < max(getattr(plain(each), "ndim", 0) for each in operands):
        return []

    def join(operand: Any) -> Any:
        if isinstance(operand, ChannelsLast) and operand.array.ndim == axes:
            return operand.array
        operand = plain(operand)
        if not getattr(operand, "ndim", 0):
            return operand
        return jnp.moveaxis(operand.reshape((1,) * (axes - operand.ndim) + operand.shape), 1, -1)

    return [join(operand) for operand in operands]
