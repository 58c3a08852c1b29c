"""Conversion of an exported program of core operators to a `Program`, node by node.

PyTorch computes everything that does not depend on images once. An orthogonal or normalized weight
is therefore an array here, with PyTorch's bits. A weight that only has another layout remains a
weight of the module, under its name.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrobust.pytorch.operators import DRAWS, TABLE, TRAINING
from jaxrobust.pytorch.program import (
    OWN,
    NumberType,
    Of,
    OperatorCall,
    Program,
    names_in,
    needed,
    read_by,
)
from jaxrobust.pytorch.reading import refusals
from jaxrobust.pytorch.reading.custom_gradients import HOLE
from jaxrobust.pytorch.reading.refusals import is_draw, line
from jaxrobust.types import Array

COMPUTED = "computed."  # prefix of weights that are computed from the module's own
_DROPPED = {"layout", "device", "pin_memory", "memory_format", "non_blocking", "generator"}
# Checks of sizes, types and singular matrices; they compute nothing.
_CHECKS = ("_assert", "sym_constrain", "_log_api", "_linalg_check_errors")
_INDEXED = {"aten.index.Tensor", "aten.index_put.default"}
_LAYOUT = {
    f"aten.{name}"
    for name in (
        *("view.default", "permute.default", "unsqueeze.default", "squeeze.dims", "alias.default"),
        *("expand.default", "slice.Tensor", "select.int", "split_with_sizes.default"),
        "clone.default",
    )
} | {"getitem"}


def read(
    program: Any,
    *,
    single: bool = False,
    random: bool = False,
    double: bool = False,
    trainable: bool = False,
) -> tuple[Program, dict[str, Array]]:
    """Read a decomposed program as data, and its weights by their names in the module.

    `single`: it takes one image at a time; `random`: it may draw; `double`: weights in float64;
    `trainable`: weights change, so nothing is computed from them beforehand.
    """
    import torch

    kinds = torch.export.graph_signature.InputKind
    output_kinds = torch.export.graph_signature.OutputKind
    outputs = program.graph_signature.output_specs
    moved = {s.target: s.arg.name for s in outputs if s.kind == output_kinds.BUFFER_MUTATION}
    images, names, constants, tensors = "", {}, {}, {}
    for spec in program.graph_signature.input_specs:
        if spec.kind == kinds.USER_INPUT:
            images = spec.arg.name
        elif spec.kind == kinds.CONSTANT_TENSOR:
            constants[spec.arg.name] = program.constants[spec.target]
        elif spec.kind in (kinds.PARAMETER, kinds.BUFFER):
            tensor = program.state_dict.get(spec.target)
            tensor = program.constants[spec.target] if tensor is None else tensor
            if trainable and not tensor.is_floating_point() and spec.target not in moved:
                constants[spec.arg.name] = tensor  # such as table indices; not trained
                continue
            names[spec.arg.name] = spec.target
            tensors[spec.target] = tensor
    dtype = _dtype(tensors)
    fixed = {} if trainable else {name: tensors[key] for name, key in names.items()}
    free = Free(fixed, constants, dtype, double)
    rows = {*TABLE, *(TRAINING if trainable else ())}
    nodes = {node.name: node for node in program.graph.nodes}
    steps = [with_places(s, nodes, free.values) for s in _steps(program.graph, free, random, rows)]
    results = [s.arg for s in outputs if s.kind == output_kinds.USER_OUTPUT]
    values = [getattr(result, "name", None) for result in results]
    wanted = {*filter(None, values), *moved.values()}
    steps = needed(steps, wanted | {step.name for step in steps if is_draw(step.operator)})
    wanted = wanted.union(*map(read_by, steps))
    array_names = {name: key for name, key in names.items() if name in wanted}
    array_names |= {
        name: COMPUTED + name
        for name in sorted(wanted & free.values.keys() - free.constants - names.keys())
        if name not in {step.name for step in steps}
    }
    source = {key: tensors[key] if trainable else free.values[n] for n, key in array_names.items()}
    names, weights = shared(array_names, source)
    return Program(
        images=images,
        weights=names,
        constants={name: _array(free.values[name]) for name in sorted(wanted & free.constants)},
        steps=tuple(steps),
        results=dict(zip(_paths(program), values, strict=True)),
        dtype=dtype,
        single=single,
        draws=tuple(step.name for step in steps if is_draw(step.operator)),
        moved=moved,
        image_axes={},  # of training, as `blocks`, see `training_mode`; plain dicts can be pickled
        blocks={},
    ), weights


def _dtype(tensors: dict[str, Any]) -> str:
    floating = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
    if len(floating) > 1:
        raise ValueError(f"its weights have several types ({', '.join(sorted(floating))})")
    return floating.pop().removeprefix("torch.") if floating else "float32"


def shared(
    names: dict[str, str], tensors: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Array]]:
    """Return names and arrays, with one key for tensors that share memory."""
    first: dict[Any, str] = {}
    place = {
        key: first.setdefault((tensor.data_ptr() or key, tensor.shape, tensor.stride()), key)
        for key, tensor in tensors.items()
    }
    arrays = {key: _array(tensors[key]) for key in sorted(set(place.values()))}
    return {name: place[key] for name, key in names.items()}, arrays


def _array(value: Any) -> Array:
    return jnp.asarray(np.array(value.detach().numpy() if hasattr(value, "detach") else value))


def _paths(program: Any) -> list[str]:
    import torch.utils._pytree as pytree

    spec = program.call_spec.out_spec
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    return [".".join(re.findall(r"\w+", pytree.keystr(path))) for path in paths]


def chosen_output(exported: Any, program: Program, requested: str | None) -> str:
    """Find the logits among the results; `ValueError` if `requested` is missing, or several fit."""

    def text(shape: Any) -> str:
        return "[" + ", ".join(str(n) if isinstance(n, int) else "B" for n in shape) + "]"

    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    shapes = {
        path: getattr(values.get(name or ""), "shape", ()) for path, name in program.results.items()
    }
    could = [path for path, shape in shapes.items() if len(shape) == 2]
    listing = ", ".join(f"{path or 'a tensor'} {text(shape)}" for path, shape in shapes.items())
    if requested is not None and requested not in could:
        raise ValueError(f"it returns {listing}, but no logits {requested!r} [B,K]")
    if requested is None and len(could) != 1:
        raise ValueError(
            f"it returns {listing}; name the logits [B,K] with --torch_output NAME"
            if could
            else f"it returns {listing}, but no logits [B,K]; make it return them"
        )
    return could[0] if requested is None else requested


def chosen(result: Any, output: str) -> Any:
    """Return the logits among a module's results, by the path from `chosen_output`."""
    for key in output.split(".") if output else ():
        if isinstance(result, dict):
            result = result[key]
        elif isinstance(result, list | tuple) and key.isdigit():
            result = result[int(key)]
        else:
            result = getattr(result, key)
    return result


def _steps(graph: Any, free: "Free", random: bool, rows: set[str]) -> Iterator[OperatorCall]:
    """Yield the steps that depend on images; other values join `free`."""
    backward: dict[str, OperatorCall] = {}  # steps that read gradients, by name
    checks: set[Any] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = _name(node.target)
        # A check may be inside another node, which orders effects.
        checked = _name(node.args[1]) if name == "with_effects" else name
        if any(part in checked for part in _CHECKS) or (
            name == "getitem" and node.args[0] in checks
        ):
            checks.add(node)
            continue
        if refusals.is_for_checks(node, _CHECKS):
            continue
        if draws := is_drawing(node, name):
            if not random:
                raise ValueError(refusals.draws(line(node), name))
        elif free.takes(node, name, rows):
            continue
        if name == HOLE:
            backward[node.name] = OperatorCall(node.name, name, (), {}, line(node))
            continue
        if name not in (DRAWS if draws else rows) and name not in ("getitem", OWN):
            raise ValueError(refusals.no_row(line(node), name))
        step = _step(node, name, free)
        if name == OWN:
            steps = needed([*backward.values()], names_in(step.operands[3]))
            yield step._replace(backward=tuple(s for s in steps if s.operator != HOLE))
        elif not backward.keys().isdisjoint(read_by(step)):
            backward[step.name] = step
        else:
            yield step


def is_drawing(node: Any, operator: str) -> bool:
    """Tell whether a node draws random numbers; RReLU does so in training only."""
    return is_draw(operator) or ("rrelu" in operator and node.args[4:5] == (True,))


def _name(target: Any) -> str:
    return str(target) if hasattr(target, "_schema") else target.__name__


def _step(node: Any, name: str, free: "Free") -> OperatorCall:
    import torch

    def read(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            number = free.values.get(value.name)
            return number if isinstance(number, bool | int | float) else Of(value.name)
        if isinstance(value, torch.dtype):
            return NumberType(str(value).removeprefix("torch."))
        return tuple(map(read, value)) if isinstance(value, list | tuple) else value

    if not hasattr(node.target, "_schema"):
        return OperatorCall(node.name, name, tuple(map(read, node.args)), {}, line(node))
    operands, keywords = [], {}
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name in _DROPPED:
            continue
        value = node.kwargs.get(argument.name, argument.default_value)
        if argument.name == "dtype" and isinstance(value, int):  # long, as PyTorch counts types
            value = None
        value = read(node.args[place] if place < len(node.args) else value)
        if argument.kwarg_only:
            keywords[argument.name] = value
        else:
            operands.append(value)
    return OperatorCall(node.name, name, tuple(operands), keywords, line(node))


class Free:
    """Values that do not depend on images, computed by PyTorch, optionally in double precision."""

    def __init__(
        self, weights: dict[str, Any], constants: dict[str, Any], dtype: str, double: bool = False
    ) -> None:
        import torch

        self._dtype = getattr(torch, dtype)
        self._wide = torch.float64 if double else self._dtype
        self.constants = set(constants)  # and values computed only from them
        self.values = {name: self._typed(value) for name, value in (constants | weights).items()}
        self._laid_out = set(weights)  # weights, and the same numbers in another layout

    def _typed(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            value = value.detach()
            return value.to(self._wide) if value.dtype == self._dtype else value
        if isinstance(value, torch.dtype) and value in (torch.uint16, torch.uint32, torch.uint64):
            return torch.int64  # for the indices of `eye`; PyTorch does not support the other types
        return self._wide if value is self._dtype else value

    def takes(self, node: Any, name: str, rows: Iterable[str]) -> bool:
        """Compute a node, in the graph's order; True: the program needs no step for it."""
        import torch

        inputs = node.args[0] if name == OWN else node.all_input_nodes
        names = {source.name for source in inputs}
        if name == HOLE or not names <= self.values.keys():
            return False
        operands = torch.fx.map_arg((node.args, node.kwargs), lambda n: self.values.get(n.name))
        if name == OWN:  # its gradient is never asked for
            self.values[node.name] = operands[0][0]
        else:
            args, keywords = torch.fx.node.map_aggregate(operands, self._typed)
            with torch.no_grad():
                self.values[node.name] = node.target(*args, **keywords)
        if names <= self.constants:
            self.constants.add(node.name)
        if name in _LAYOUT and (name in rows or name == "getitem") and names <= self._laid_out:
            self._laid_out.add(node.name)
            return not names
        return True


def with_places(step: OperatorCall, nodes: dict[str, Any], values: dict[str, Any]) -> OperatorCall:
    """Replace known masks in an indexing step by positions; masks from images are refused.

    XLA needs known sizes. A mask that does not depend on images selects a known number.
    """
    import torch

    if step.operator not in _INDEXED:
        return step
    indices: list[Any] = []
    for index in step.operands[1]:
        node = nodes.get(index.name) if isinstance(index, Of) else None
        value = node.meta.get("val") if node is not None else None
        if value is None or value.dtype != torch.bool:
            indices.append(index)
        elif (mask := values.get(index.name)) is not None:
            indices += [tuple(places.tolist()) for places in mask.nonzero(as_tuple=True)]
        elif _puts_one_number(step, nodes):
            indices.append(index)
        else:
            raise ValueError(
                f"{step.line}: a mask that depends on the images determines how many values there "
                "are, and sizes that depend on the images cannot be compiled; use "
                "torch.where(mask, x, 0), which keeps the size"
            )
    return step._replace(operands=(step.operands[0], tuple(indices), *step.operands[2:]))


def _puts_one_number(step: OperatorCall, nodes: dict[str, Any]) -> bool:
    if step.operator != "aten.index_put.default" or not isinstance(step.operands[2], Of):
        return False
    value = nodes[step.operands[2].name].meta.get("val")
    return len(value.shape) == 0 and sum(index is not None for index in step.operands[1]) == 1
