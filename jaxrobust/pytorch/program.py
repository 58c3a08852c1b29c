"""A program of PyTorch operators as data, and its values in JAX.

Nothing here needs PyTorch. A program is a list of steps. A step names an operator of
`operators.TABLE`, and its arguments name the results of earlier steps. PyTorch has channels before
the sides of images, but XLA's convolutions are fast with channels last. The results of convolutions
and of later steps are therefore `ChannelsLast`, until an operator needs PyTorch's layout.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.types import Array

Ints = Sequence[int]  # sizes, places or dimensions, as operands
OWN = "jaxrobust.own_gradient.default"  # of a `torch.autograd.Function`, see `custom_gradients`


class Of(NamedTuple):
    """The value of an earlier step, as an argument."""

    name: str


class NumberType(NamedTuple):
    """A dtype, as an argument: "float32", "int64", "bool"."""

    name: str


class OperatorCall(NamedTuple):
    """One operator with all arguments of its schema, in order."""

    name: str
    operator: str  # such as aten.convolution.default
    operands: tuple[Any, ...]
    keywords: Mapping[str, Any]  # keyword-only arguments
    line: str  # of the module's source
    backward: tuple["OperatorCall", ...] = ()  # of `own_gradient`: from its holes to its gradients


class Program(NamedTuple):
    """The computation from images and weights to the module's results."""

    images: str  # name of the value that holds the images
    weights: Mapping[str, str]  # name of a value -> key among the weights
    constants: Mapping[str, Any]  # name of a value -> array that is not a weight
    steps: tuple[OperatorCall, ...]
    results: Mapping[str, str | None]  # position in the module's result -> name of a value
    dtype: str = "float32"  # of its floating weights; `run` uses the type of the weights it gets
    single: bool = False  # it takes one image at a time
    draws: tuple[str, ...] = ()  # the steps that draw random numbers
    # Changes in training: key among the weights -> name of the new value.
    moved: Mapping[str, str] = MappingProxyType({})
    image_axes: Mapping[str, int] = MappingProxyType({})  # of each step's random draws in training
    blocks: Mapping[str, str] = MappingProxyType({})  # name of a step -> name of its block


class Converted(NamedTuple):
    """A network on both sides."""

    logits_fn: jax.tree_util.Partial
    weights: dict[str, Array]
    program: Program
    exported: Any  # torch.export.ExportedProgram, of core operators
    module: Any  # of PyTorch
    output: str  # which of the results are the logits
    keyed: bool = False  # `logits_fn` takes keys [B] too


class ChannelsLast(NamedTuple):
    """PyTorch values [B,C,sides...] with channels last: [B,sides...,C]."""

    array: Array

    def plain(self) -> Array:
        """Return the values in PyTorch's layout."""
        return jnp.moveaxis(self.array, -1, 1)


class OperatorRule(NamedTuple):
    """The implementation of an operator.

    `plain` takes and returns arrays in PyTorch's layout; None: always use `last`. `last` takes the
    first operand with channels last, and marks results in this layout as `ChannelsLast`; None:
    always use `plain`. `joins`: operands broadcast against each other, in either layout.
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
    """Compute all values of a program, by name, for images f[B,H,W,C]; `key` is for its draws."""
    keys = {}
    if program.draws:
        assert key is not None, "it draws random numbers"
        keys = {name: jax.random.fold_in(key, place) for place, name in enumerate(program.draws)}
    dtype = computing(weights, images)
    values = inputs(program, weights, images, dtype)
    # PyTorch's operators combine numbers of several types and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for step in program.steps:
            step_key = keys.get(step.name)
            values[step.name] = compute(step, table, values, {program.dtype: dtype}, step_key)
    return values


def inputs(
    program: Program, weights: Mapping[str, Array], images: Array, dtype: Any
) -> dict[str, Any]:
    """Return the initial values of the steps, by name."""
    values: dict[str, Any] = {
        name: a.astype(dtype) if a.dtype.name == program.dtype else jnp.asarray(a)
        for name, a in program.constants.items()
    }
    values |= {name: weights[key] for name, key in program.weights.items()}
    values[program.images] = ChannelsLast(images.astype(dtype))
    return values


def computing(weights: Mapping[str, Array], images: Array) -> Any:
    """Return the compute type of a program: the type of its weights, else of the images."""
    floating = {a.dtype for a in weights.values() if jnp.issubdtype(a.dtype, jnp.floating)}
    return jnp.result_type(*floating) if floating else images.dtype


def compute(
    step: OperatorCall,
    table: Mapping[str, OperatorRule],
    values: Mapping[str, Any],
    types: Mapping[str, Any],
    key: Array | None = None,
) -> Any:
    """Compute a step; `types` maps some types to compute types; `key` is for a step that draws."""

    def read(operand: Any) -> Any:
        if isinstance(operand, Of):
            return values[operand.name]
        if isinstance(operand, NumberType):
            return types.get(operand.name) or jax.dtypes.canonicalize_dtype(operand.name)
        return [*map(read, operand)] if isinstance(operand, tuple) else operand

    if step.operator == "getitem":
        several, place = step.operands
        return values[several.name][place]
    if step.operator == OWN:
        return _own_gradient(step, table, values, types)
    rule = table[step.operator]
    operands = [read(operand) for operand in step.operands]
    keywords = {name: read(operand) for name, operand in step.keywords.items()}
    if key is not None:
        operands = [key, *operands]
    if rule.joins and rule.plain and (joined := _joined(operands)):
        return ChannelsLast(rule.plain(*joined, **keywords))
    first = operands[0] if operands else None
    of_first = first[0] if isinstance(first, list) and first else first
    if rule.last and (rule.plain is None or isinstance(of_first, ChannelsLast)):
        return rule.last(channels_last(first), *map(plain, operands[1:]), **keywords)
    assert rule.plain is not None
    return rule.plain(*map(plain, operands), **keywords)


def names_in(operand: Any) -> Iterator[str]:
    """Yield the names of the values that an operand reads."""
    if isinstance(operand, Of):
        yield operand.name
    elif isinstance(operand, tuple) and not isinstance(operand, NumberType):
        for part in operand:
            yield from names_in(part)


def read_by(step: OperatorCall) -> set[str]:
    """Return the names of the values that a step and its backward pass read from outside."""
    if step.operator == OWN:
        outputs, holes, inputs, gradients = step.operands
        inside = {*names_in(holes), *(part.name for part in step.backward)}
        outside = {*names_in(gradients)}.union(*map(read_by, step.backward)) - inside
        return {*names_in(outputs), *names_in(inputs)} | outside
    return {*names_in(step.operands), *names_in(tuple(step.keywords.values()))}


def needed(steps: Sequence[OperatorCall], names: Iterable[str]) -> list[OperatorCall]:
    """Select the steps that some values need."""
    wanted, chosen = {*names}, []
    for step in reversed(steps):
        if step.name in wanted:
            wanted |= read_by(step)
            chosen.append(step)
    return chosen[::-1]


def arrays_of(tree: Any) -> tuple[list[Array], Callable[[Sequence[Array]], Any]]:
    """Return the arrays of a tree, and a function that replaces them.

    Sizes and other plain numbers are kept.
    """
    leaves, structure = jax.tree.flatten(tree)

    def rebuilt(arrays: Sequence[Array]) -> Any:
        others = iter(arrays)
        replaced = (next(others) if isinstance(x, jax.Array) else x for x in leaves)
        return jax.tree.unflatten(structure, replaced)

    return [leaf for leaf in leaves if isinstance(leaf, jax.Array)], rebuilt


def _own_gradient(
    step: OperatorCall,
    table: Mapping[str, OperatorRule],
    values: Mapping[str, Any],
    types: Mapping[str, Any],
) -> list[Array]:
    outputs, holes, inputs, gradients = ([*names_in(operand)] for operand in step.operands)
    outside = {name: values[name] for name in sorted(read_by(step)) if name not in outputs}
    arrays, rebuilt = arrays_of(outside)

    @jax.custom_vjp
    def identity(inputs: Any, outputs: Any, arrays: Any) -> Any:
        return outputs

    def forward(inputs: Any, outputs: Any, arrays: Any) -> Any:
        return outputs, (inputs, outputs, arrays)

    def backward(saved: Any, cotangents: Any) -> Any:
        input_values, output_values, arrays = saved
        values = rebuilt(arrays) | dict(zip(outputs, output_values, strict=True))
        values |= dict(zip(holes, cotangents, strict=True))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for part in step.backward:
                values[part.name] = compute(part, table, values, types)
        pairs = zip(gradients, input_values, strict=True)
        return [plain(values[name]).astype(x.dtype) for name, x in pairs], None, None

    identity.defvjp(forward, backward)
    groups = ([plain(values[name]) for name in group] for group in (inputs, outputs))
    return identity(*groups, arrays)


def plain(value: Any) -> Any:
    """Return a value, or a list of them, in PyTorch's layout."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.plain() if isinstance(value, ChannelsLast) else value


def channels_last(value: Any) -> Any:
    """Return the array of a value with channels last, or a list of them."""
    if isinstance(value, list):
        return [channels_last(part) for part in value]
    return value.array if isinstance(value, ChannelsLast) else jnp.moveaxis(value, 1, -1)


def _joined(operands: list[Any]) -> list[Any]:
    """Return operands with channels last; none if no channels-last operand has the most axes."""
    axes = max((x.array.ndim for x in operands if isinstance(x, ChannelsLast)), default=0)
    if not axes or axes < max(getattr(plain(x), "ndim", 0) for x in operands):
        return []

    def join(operand: Any) -> Any:
        if isinstance(operand, ChannelsLast) and operand.array.ndim == axes:
            return operand.array
        operand = plain(operand)
        if not getattr(operand, "ndim", 0):
            return operand
        return jnp.moveaxis(operand.reshape((1,) * (axes - operand.ndim) + operand.shape), 1, -1)

    return [join(operand) for operand in operands]


def differences(values: Any, expected: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return sizes of differences (0 for equal infinities or NaNs) and of finite numbers."""
    values, expected = (np.asarray(value, np.float64) for value in (values, expected))
    finite = np.isfinite(values) & np.isfinite(expected)
    same = (values == expected) | (np.isnan(values) & np.isnan(expected))
    infinite = np.full(expected.shape, np.inf)
    apart = np.abs(np.subtract(values, expected, where=finite, out=infinite))
    return np.where(same, 0, apart), np.where(np.isfinite(expected), np.abs(expected), 0)
