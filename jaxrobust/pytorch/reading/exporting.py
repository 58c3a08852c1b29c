"""From a PyTorch module to a `Program`: exported, decomposed, and read node by node."""

import contextlib
import functools
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrobust.pytorch.operators import DRAWS, TABLE, TRAINING
from jaxrobust.pytorch.program import OWN, NumberType, Of, OperatorCall, Program, names_in, read_by
from jaxrobust.pytorch.reading import (
    changing,
    custom_gradients,
    data_dependence,
    masks,
    refusals,
    scripted,
)
from jaxrobust.pytorch.reading.drawing import draws, drops, is_draw, refusal
from jaxrobust.pytorch.reading.folding import COMPUTED, Free
from jaxrobust.pytorch.reading.refusals import line, own_line
from jaxrobust.pytorch.reading.silence import quietly
from jaxrobust.types import Array

# Whose formula here is shorter than PyTorch's, or whose gradient it has by hand, and what is
# drawn at once.
# Without the last, PyTorch 2.14 writes the root of a sum, whose gradient at 0 is not a number.
_KEPT = (
    "scaled_dot_product_attention",
    "silu",
    "_euclidean_dist",
    "bernoulli",
    "linalg_vector_norm",
    # PyTorch's decomposition has other gradients at kinks and ends than the operator.
    *("hardsigmoid", "hardswish", "logit", "sinc", "special_entr", "binary_cross_entropy"),
    *("std.correction", "xlogy.Tensor", "xlogy.Scalar_Self", "xlogy.Scalar_Other"),
    *("special_xlog1py", "special_xlog1py.self_scalar", "special_xlog1py.other_scalar"),
)
_DROPPED = {"layout", "device", "pin_memory", "memory_format", "non_blocking", "generator"}
# Of sizes, types and matrices that have no inverse; they compute nothing.
_CHECKS = ("_assert", "sym_constrain", "_log_api", "_linalg_check_errors")


def check(module: Any, *, random: bool = False, modes: bool = True) -> None:
    """Raise `ValueError` unless a module is in eval mode (dropout: or `random`), CPU, float32;
    without `modes`, in whichever mode.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        what = "a state dict" if isinstance(module, dict) else f"a {type(module).__name__}"
        raise ValueError(f"it is {what}, no torch.nn.Module; return the module with its weights")
    refusals.check(module)
    of_a_batch = torch.nn.modules.batchnorm._NormBase
    training = [
        name or "it"
        for name, part in module.named_modules()
        if part.training and (not random or isinstance(part, of_a_batch))
    ]
    if training and modes:
        raise ValueError(f"{_named(training)} is in training mode; call module.eval() first")
    arrays = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    away = [name for name, array in arrays.items() if array.device.type != "cpu"]
    if away:
        where = f"{_named(away)} is on {arrays[away[0]].device}"
        raise ValueError(f"{where}; call module.cpu(): JAX has its own devices")
    floating = {name: a.dtype for name, a in arrays.items() if a.is_floating_point()}
    other = [name for name, dtype in floating.items() if dtype != torch.float32]
    if other:
        kind = str(floating[other[0]]).removeprefix("torch.")
        raise ValueError(
            f"{_named(other)} is {kind}; call module.float(): verdicts are those of float32"
        )


def _named(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def exported(
    module: Any, image: tuple[int, int, int], *, trainable: bool = False
) -> tuple[Any, bool]:
    """Export a module for images H, W, C; the second result says that it takes one image only.

    The program of a `trainable` one computes what the module keeps from evaluation to evaluation.
    """
    import torch

    if not module.training:  # where a norm of one image would have nothing to normalise
        refusals.check_takes(module, image)
    if scripted.is_scripted(module):
        return scripted.exported(module, image)
    data_dependence.check_hooks(module)
    functions: list[str] = []

    def of(count: int, strict: bool) -> Any:
        example = refusals.example(module, image, count)
        sizes = ({0: torch.export.Dim("batch")},) if count > 1 else None
        with quietly(), torch.enable_grad():
            seen = data_dependence.watched(module, example)
            functions.extend(seen.functions)
            if trainable and not module.training:
                module.train().eval()
            # PyTorch reads the module's source where it is strict, and our answers are no part.
            ours = data_dependence.answering(module, seen)
            with contextlib.nullcontext() if strict else ours:
                return torch.export.export(module, (example,), dynamic_shapes=sizes, strict=strict)

    reasons: list[Exception] = []
    for count in (2, 1):  # one by one, if its code is written for a number of images
        for strict in (False, True):
            if strict and functions:  # whose backward passes would be lost
                continue
            try:
                return of(count, strict), count == 1
            except custom_gradients.Refused:
                raise
            except Exception as error:
                reasons.append(error)
    raise ValueError(f"torch.export: {_reason(reasons[0])}") from reasons[0]


def loaded(path: Path) -> tuple[Any, bool]:
    """Load the program of a `.pt2`; the second result says that it takes one image only."""
    import torch

    with quietly():
        try:
            program = torch.export.load(path)
        except Exception as error:
            raise ValueError(
                f"torch.export.load cannot read it with PyTorch {torch.__version__} "
                f"({_first_line(error)}); a newer PyTorch reads what an older one wrote: install "
                "one as new as its writer, write it again with torch.export.save and this "
                "version, or name the function that makes the module"
            ) from error
    sizes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"]
    images: tuple[Any, ...] = tuple(sizes[-1]) if sizes else ()
    if len(images) != 4:
        raise ValueError(f"it takes {images}, no images [B,C,H,W]; export it with images")
    if isinstance(images[0], int) and images[0] != 1:
        raise ValueError(
            f"it takes {images[0]} images at a time and no other number; export it with "
            'dynamic_shapes=({0: torch.export.Dim("batch")},), or with one image'
        )
    return program, images[0] == 1


def decomposed(program: Any) -> Any:
    """Return an exported program in PyTorch's core operators, and the few that are kept."""
    import torch

    table = torch.export.default_decompositions()
    sampler = torch.ops.aten.grid_sampler_2d.default
    table[sampler] = _strict(torch._decomp.get_decompositions([sampler])[sampler])
    drop = any(map(drops, program.graph.nodes))
    for name in _KEPT:
        if not (drop and "attention" in name):
            packet, _, overload = name.partition(".")
            table.pop(getattr(getattr(torch.ops.aten, packet), overload or "default"), None)
    with quietly():
        return changing.one_name(custom_gradients.kept(program)).run_decompositions(table)


def _strict(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decomposition where `clamp` has no gradient at its bounds, as PyTorch's sampler."""
    import torch
    from torch.nn.functional import threshold

    def clamp(x: Any, low: float, high: float) -> Any:
        return -threshold(-threshold(x, low, low), -high, -high)

    def strict(*operands: Any, **named: Any) -> Any:
        before, torch.clamp = torch.clamp, clamp  # type: ignore[assignment]
        try:
            return decomposition(*operands, **named)
        finally:
            torch.clamp = before

    return strict


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
    `trainable`: weights change, so nothing is computed of them beforehand.
    """
    import torch

    kinds = torch.export.graph_signature.InputKind
    images, names, known, arrays = "", {}, {}, {}
    moved = _moved(program)
    for spec in program.graph_signature.input_specs:
        if spec.kind == kinds.USER_INPUT:
            images = spec.arg.name
        elif spec.kind == kinds.CONSTANT_TENSOR:
            known[spec.arg.name] = program.constants[spec.target]
        elif spec.kind in (kinds.PARAMETER, kinds.BUFFER):
            held = program.state_dict.get(spec.target)
            held = program.constants[spec.target] if held is None else held
            if trainable and not held.is_floating_point() and spec.target not in moved:
                known[spec.arg.name] = held  # such as places in a table: nothing that trains
                continue
            names[spec.arg.name] = spec.target
            arrays[spec.target] = held
    fixed = {} if trainable else {name: arrays[key] for name, key in names.items()}
    free = Free(fixed, known, _dtype(arrays), double)
    output = torch.export.graph_signature.OutputKind.USER_OUTPUT
    results = [s.arg for s in program.graph_signature.output_specs if s.kind == output]
    rows = {*TABLE, *(TRAINING if trainable else ())}
    graph = masks.resolved(program, [*_steps(program.graph, free, random, rows)], free.values)
    values = [getattr(result, "name", None) for result in results]
    read = {*filter(None, values), *moved.values()}
    steps = _living(graph, read)
    read = read.union(*map(read_by, steps))
    constants = {name: _array(free.values[name]) for name in sorted(read & free.constants)}
    own = {name: key for name, key in names.items() if name in read}
    own |= {
        name: COMPUTED + name
        for name in sorted(read & free.values.keys() - free.constants - names.keys())
        if name not in {step.name for step in steps}
    }
    held = {key: arrays[key] if trainable else free.values[name] for name, key in own.items()}
    names, weights = _shared(own, held)
    return Program(
        images=images,
        weights=names,
        constants=constants,
        steps=tuple(steps),
        results=dict(zip(_paths(program), values, strict=True)),
        dtype=_dtype(arrays),
        single=single,
        draws=tuple(step.name for step in steps if is_draw(step.operator)),
        moved=moved,
        image_axes={},  # of training, as `blocks`, see `training_mode`; plain dicts can be pickled
        blocks={},
    ), weights


def _moved(program: Any) -> dict[str, str]:
    """Say which buffers a pass changes: their names in the module -> names of their new values."""
    import torch

    kind = torch.export.graph_signature.OutputKind.BUFFER_MUTATION
    specs = program.graph_signature.output_specs
    return {spec.target: spec.arg.name for spec in specs if spec.kind == kind}


def _dtype(tensors: dict[str, Any]) -> str:
    floating = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
    if len(floating) > 1:
        raise ValueError(f"its weights have several types ({', '.join(sorted(floating))})")
    return floating.pop().removeprefix("torch.") if floating else "float32"


def _shared(
    names: dict[str, str], tensors: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Array]]:
    first: dict[Any, str] = {}
    for key, tensor in tensors.items():
        first.setdefault((tensor.data_ptr() or key, tensor.shape, tensor.stride()), key)
    place = {k: first[t.data_ptr() or k, t.shape, t.stride()] for k, t in tensors.items()}
    own = {key: _array(tensors[key]) for key in set(place.values())}
    return {name: place[key] for name, key in names.items()}, dict(sorted(own.items()))


def _array(value: Any) -> Array:
    return jnp.asarray(np.array(value.detach().numpy() if hasattr(value, "detach") else value))


def _paths(program: Any) -> list[str]:
    import torch.utils._pytree as pytree

    spec = program.call_spec.out_spec
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    return [".".join(re.findall(r"\w+", pytree.keystr(path))) for path in paths]


def _steps(graph: Any, free: Free, random: bool, rows: set[str]) -> Iterator[OperatorCall]:
    """Yield what is left to compute of images; what no image changes joins what is free."""
    backward: dict[
        str, OperatorCall
    ] = {}  # what is computed of gradients, by the names of the values
    checks: set[Any] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = _name(node.target)
        if _is_check(node, name) or (name == "getitem" and node.args[0] in checks):
            checks.add(node)
            continue
        if refusals.is_for_checks(node, _CHECKS):
            continue
        if drawn := draws(node, name):
            if not random:
                raise ValueError(refusal(line(node), name))
        elif free.takes(node, name, rows):
            continue
        if name == custom_gradients.HOLE:
            backward[node.name] = OperatorCall(node.name, name, (), {}, line(node))
            continue
        if name not in (DRAWS if drawn else rows) and name not in ("getitem", OWN):
            raise ValueError(refusals.no_row(line(node), name))
        step = _step(node, name, free)
        if name == OWN:
            yield step._replace(backward=_needed(step, backward))
        elif not backward.keys().isdisjoint(read_by(step)):
            backward[step.name] = step
        else:
            yield step


def _is_check(node: Any, name: str) -> bool:
    """Tell whether a node computes nothing; one may stand in another, which orders effects."""
    name = _name(node.args[1]) if name == "with_effects" else name
    return any(part in name for part in _CHECKS)


def _living(steps: Sequence[OperatorCall], results: set[str]) -> list[OperatorCall]:
    read, living = set(results), []
    for step in reversed(steps):
        if step.name in read or is_draw(step.operator):
            living.append(step)
            read |= read_by(step)
    return living[::-1]


def _needed(step: OperatorCall, backward: dict[str, OperatorCall]) -> tuple[OperatorCall, ...]:
    """Return the steps from a step's holes to its gradients, in their order."""
    wanted, todo = set(), list(names_in(step.operands[3]))
    while todo:
        name = todo.pop()
        if name in backward and name not in wanted:
            wanted.add(name)
            todo += read_by(backward[name])
    steps = (one for name, one in backward.items() if name in wanted)
    return tuple(one for one in steps if one.operator != custom_gradients.HOLE)


def _name(target: Any) -> str:
    return str(target) if hasattr(target, "_schema") else target.__name__


def _step(node: Any, name: str, free: Free) -> OperatorCall:
    read = functools.partial(_operand, free)
    if not hasattr(node.target, "_schema"):
        return OperatorCall(node.name, name, tuple(map(read, node.args)), {}, line(node))
    operands, named = [], {}
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name in _DROPPED:
            continue
        value = node.kwargs.get(argument.name, argument.default_value)
        if argument.name == "dtype" and isinstance(value, int):  # long, as PyTorch counts types
            value = None
        value = read(node.args[place] if place < len(node.args) else value)
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            operands.append(value)
    return OperatorCall(node.name, name, tuple(operands), named, line(node))


def _operand(free: Free, value: Any) -> Any:
    import torch

    if isinstance(value, torch.fx.Node):
        return free.values[value.name] if free.is_number(value.name) else Of(value.name)
    if isinstance(value, torch.dtype):
        return NumberType(str(value).removeprefix("torch."))
    if isinstance(value, list | tuple):
        return tuple(_operand(free, each) for each in value)
    return value


def _first_line(error: Exception) -> str:
    return " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__


def _reason(error: Exception) -> str:
    frames = "".join(traceback.format_tb(error.__traceback__))
    where = own_line(str(error)) or own_line(frames)
    remedy = ""
    if "data-dependent" in str(error):
        remedy = "; what is computed must not depend on the images: use torch.where for the branch"
    return f"{_first_line(error)}{f' at {where}' if where else ''}{remedy}"
