"""Gradients that a module's author defines, as operators of an exported program.

PyTorch's export only records values. Its core operators lose what the author defines for
gradients: `detach`, `torch.no_grad`, and the backward pass of a `torch.autograd.Function`. Three
operators of our own keep this through the decompositions:

  stop(x)                                       x, through which no gradient passes
  hole(output)                                  the gradient of an output, known in a backward pass
  own_gradient(outputs, holes, inputs, gradients)  the outputs; the gradients of the inputs are
                                                what steps between holes and gradients compute"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jaxrobust.pytorch.reading.refusals import line

NAMESPACE = "jaxrobust"
HOLE = f"{NAMESPACE}.hole.default"
_SCHEMAS = {
    "stop": "(Tensor x) -> Tensor",
    "hole": "(Tensor output) -> Tensor",
    "own_gradient": "(Tensor[] outputs, Tensor[] holes, Tensor[] inputs, Tensor[] gradients) "
    "-> Tensor[]",
}


class Refused(ValueError):
    """A module that cannot be converted, with a readable reason."""


@functools.cache
def declared() -> Any:
    """Declare the operators to PyTorch once, and return the library that holds them."""
    import torch

    values: dict[str, Callable[..., Any]] = {
        "stop": lambda x: x.clone(),
        "hole": lambda output: output.new_zeros(output.shape),
        "own_gradient": lambda outputs, holes, inputs, gradients: [x.clone() for x in outputs],
    }
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, values[name], "CompositeExplicitAutograd")
    return library


# --- What a module says while it is written down ---


@contextlib.contextmanager
def written_down() -> Iterator[None]:
    """Keep the backward pass of each `torch.autograd.Function`, `Tensor.data` and lists."""
    import torch

    declared()
    function: Any = torch.autograd.Function
    of_class: Any = vars(torch._C.TensorBase)["data"]  # a property
    apply, fake = vars(function)["apply"], torch._subclasses.FakeTensor
    tolist = vars(fake).get("tolist")  # which asks for each number separately

    def data(tensor: Any) -> Any:
        return tensor.detach() if isinstance(tensor, fake) else of_class.__get__(tensor)

    function.apply = classmethod(_applied)
    torch.Tensor.data = property(data, of_class.__set__)  # type: ignore[assignment, misc]
    if tolist:
        del fake.tolist
    try:
        yield
    finally:
        if tolist:
            fake.tolist = tolist  # type: ignore[method-assign]
        del torch.Tensor.data
        function.apply = apply  # type: ignore[method-assign]


class _Context:
    """The context in which a `Function` stores values."""

    def __init__(self, name: str, needs: tuple[bool, ...]) -> None:
        self.name, self.needs_input_grad = name, needs
        self.saved_tensors: tuple[Any, ...] = ()
        self.constant: list[Any] = []  # outputs without a gradient
        self.materialize_grads = True

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        pass  # for forward-mode derivatives, which no attack uses

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value

    def mark_non_differentiable(self, *outputs: Any) -> None:
        self.constant += outputs

    def mark_dirty(self, *inputs: Any) -> None:
        raise Refused(
            f"torch.autograd.Function {self.name} changes its input in place (ctx.mark_dirty); let "
            "it return a new tensor"
        )


def _floats(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _applied(cls: Any, *operands: Any) -> Any:
    import torch

    ops = torch.ops.jaxrobust
    needs = tuple(_floats(value) and torch.is_grad_enabled() for value in operands)
    context = _Context(cls.__qualname__, needs)
    with torch.no_grad():
        if cls.setup_context is torch.autograd.function._SingleLevelFunction.setup_context:
            result = cls.forward(context, *operands)
        else:
            result = cls.forward(*operands)
            cls.setup_context(context, operands, result)
    if not any(needs):  # its gradient is never needed
        return result
    outputs = result if isinstance(result, tuple) else (result,)
    constant = [id(value) for value in context.constant]
    differentiable = [_floats(o) and id(o) not in constant for o in outputs]
    if any(differentiable):
        with torch.no_grad():
            holes = [
                ops.hole(o) if has else torch.zeros_like(o) if isinstance(o, torch.Tensor) else None
                for o, has in zip(outputs, differentiable, strict=True)
            ]
            # Copies: what a method such as `contiguous` gives back would take a hole's name.
            gradients = cls.backward(context, *(None if h is None else h.clone() for h in holes))
            gradients = gradients if isinstance(gradients, tuple | list) else (gradients,)
            pairs = [
                (operand, _fitted(gradient, operand))
                for operand, gradient, needed in zip(operands, gradients, needs, strict=False)
                if needed and gradient is not None
            ]
        owned = iter(
            ops.own_gradient(
                [*itertools.compress(outputs, differentiable)],
                [*itertools.compress(holes, differentiable)],
                [operand for operand, _ in pairs],
                [gradient for _, gradient in pairs],
            )
        )
    # No gradient passes through other results; integers have none anyway.
    values = [
        next(owned) if has else ops.stop(o) if _floats(o) else o
        for o, has in zip(outputs, differentiable, strict=True)
    ]
    return tuple(values) if isinstance(result, tuple) else values[0]


def _fitted(gradient: Any, operand: Any) -> Any:
    if gradient.shape != operand.shape:
        gradient = gradient.sum_to_size(operand.shape)
    return gradient if gradient.dtype == operand.dtype else gradient.to(operand.dtype)


# --- What PyTorch's export says ---


def with_stops(program: Any) -> Any:
    """Put `stop` for `detach` and `torch.no_grad`, which the decompositions that follow drop."""
    import torch

    declared()
    copied = copy.copy(program)
    module = torch.fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    module.meta.update(program.graph_module.meta)
    copied._graph_module = module
    graph = module.graph
    while regions := [node for node in graph.nodes if _name(node) == "wrap_with_set_grad_enabled"]:
        for node in regions:
            _inline(module, node)
    for node in list(graph.nodes):
        name = _name(node)
        if name not in ("aten.detach.default", "aten.detach_.default"):
            continue
        source = node.args[0]
        new = _stop(graph, node, source)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        if name.endswith("detach_.default"):
            nodes = list(graph.nodes)
            later = {*nodes[nodes.index(new) + 1 :]}
            source.replace_all_uses_with(new, delete_user_cb=later.__contains__)
    module.recompile()
    return copied


def _name(node: Any) -> str:
    return str(node.target) if node.op == "call_function" else ""


def _stop(graph: Any, after: Any, value: Any) -> Any:
    import torch

    with graph.inserting_after(after):
        new = graph.call_function(torch.ops.jaxrobust.stop.default, (value,))
    new.meta = {key: after.meta[key] for key in ("val", "stack_trace") if key in after.meta}
    return new


def _inline(module: Any, region: Any) -> None:
    import torch

    graph, (enabled, body, *operands) = module.graph, region.args
    inner = getattr(module, body.target)
    places = [node for node in inner.graph.nodes if node.op == "placeholder"]
    values = dict(zip(places, operands, strict=True))
    for name, part in inner.named_children():  # regions within it
        module.add_submodule(f"{body.target}_{name}", part)
    copies = []
    with graph.inserting_before(region):
        for node in inner.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if not enabled:
                _check_in_place(node, values, places)
                if _gives_itself(node):
                    values[node] = values[node.args[0]]
                    continue
            new = values[node] = graph.node_copy(node, lambda source: values[source])
            if node.op == "get_attr":
                new.target = f"{body.target}_{node.target}"
            copies.append(new)
    results = torch.fx.node.map_arg(inner.graph.output_node().args[0], lambda node: values[node])
    results = results if isinstance(results, tuple | list) else (results,)
    stopped = {
        value: _stop(graph, value, value)
        for value in dict.fromkeys(results)
        if not enabled
        and value in copies
        and hasattr(value.meta.get("val"), "is_floating_point")
        and _name(value) != HOLE
    }
    if isinstance(region.meta.get("val"), tuple | list) or all(
        _name(user) == "<built-in function getitem>" for user in region.users
    ):
        for user in list(region.users):
            value = results[user.args[1]]
            user.replace_all_uses_with(stopped.get(value, value))
            graph.erase_node(user)
    else:
        region.replace_all_uses_with(stopped.get(results[0], results[0]))
    graph.erase_node(region)
    if not body.users:
        graph.erase_node(body)


def _gives_itself(node: Any) -> bool:
    """Tell whether a node returns the tensor that it takes, which keeps its gradient then."""
    name = _name(node)
    if not name.startswith(("aten.to.", "aten.contiguous.")):
        return False
    source, result = node.args[0].meta["val"], node.meta["val"]
    is_same = "contiguous" not in name or source.is_contiguous()
    return is_same and source.dtype == result.dtype and True not in node.args[1:]


def _check_in_place(node: Any, values: dict[Any, Any], places: list[Any]) -> None:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or _name(node) == "aten.detach_.default":
        return
    changed = node.args[0]
    if changed in places and values[changed].op == "call_function":
        raise Refused(
            f"{line(node)}: {_name(node)} changes a tensor in place under torch.no_grad, so its "
            "gradient no longer matches its value; write x + (changed - x).detach() instead"
        )
