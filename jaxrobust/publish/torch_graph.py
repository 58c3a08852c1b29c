"""A network's evaluation pass as a graph of PyTorch expressions.

The pass is traced for images of several sizes, and the traces are read in parallel: a number that
differs between them is a size, which the module computes from the shape of its images.
"""

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxrobust.models.kernels import attention, layers
from jaxrobust.models.modules import positions

CALLS = "jit pjit closed_call core_call custom_jvp_call custom_vjp_call remat remat2 checkpoint"
SAME = "optimization_barrier copy copy_p name layout_constraint sharding_constraint pvary"
SAME += " reduce_precision"
METHODS = "exp exp2 log log1p expm1 erf sqrt rsqrt tanh sin cos tan sinh cosh abs sign ceil "
METHODS += "square round asin acos atan"
# The code of elementwise operations.
ELEMENTWISE = {name: f"{{}}.{name}()" for name in METHODS.split()} | {
    **{
        "floor": "{}.floor()",
        "add": "{} + {}",
        "sub": "{} - {}",
        "mul": "{} * {}",
        "pow": "{} ** {}",
        "neg": "-{}",
    },
    **{"eq": "{} == {}", "ne": "{} != {}", "lt": "{} < {}", "le": "{} <= {}", "gt": "{} > {}"},
    **{"ge": "{} >= {}", "and": "{} & {}", "or": "{} | {}", "xor": "{} ^ {}", "not": "~{}"},
    **{"max": "torch.maximum({}, {})", "min": "torch.minimum({}, {})", "logistic": "{}.sigmoid()"},
    **{"rem": "torch.fmod({}, {})", "atan2": "torch.atan2({}, {})", "is_finite": "{}.isfinite()"},
}
REDUCED = {"sum": "sum", "max": "amax", "min": "amin", "and": "all", "or": "any", "prod": "prod"}
ALONG = "cumsum cumprod argmax argmin"
BIASED = ("F.linear(", "conv(")
# Rules that take inputs without the axes that JAX has broadcast.
LAZY = (
    "reshape squeeze expand_dims broadcast_in_dim convert_element_type stop_gradient integer_pow "
)
LAZY += "div select_n clamp"
# PyTorch layers, with functions that compute the same: their jaxprs are searched for.
LAYERS: list[tuple[Callable, str]] = [
    (inspect.unwrap(layers._norm_forward), "layer_norm({}, {}, {}, {})"),
    (inspect.unwrap(layers._gelu_forward), "F.gelu({} + {})"),
    (inspect.unwrap(attention.softmax), "{}.softmax(-1)"),
    (jax.nn.softmax, "{}.softmax(-1)"),
    (functools.partial(jax.nn.gelu, approximate=False), "F.gelu({})"),
    (jax.nn.gelu, 'F.gelu({}, approximate="tanh")'),
    (jax.nn.relu, "{}.relu()"),
    (jax.nn.silu, "F.silu({})"),
    (jax.nn.softplus, "F.softplus({}, threshold=1e4)"),
]


class NoRule(ValueError):
    """An operation without a rule."""


class Varies(Exception):
    """A value depends on the size of the images in a way that cannot be written down."""


class Operation:
    """An operation of one trace, with its value if it depends on neither weights nor images."""

    def __init__(
        self, name: Any, inputs: Any, params: Any, aval: Any, value: Any = None, line: str = ""
    ) -> None:
        self.name, self.inputs, self.params, self.value = name, inputs, params, value
        self.shape, self.dtype, self.line = tuple(aval.shape), aval.dtype, line


# ------------------------------------------------------------------------------------------ traces


def flatten(
    closed: Any, inputs: Sequence[Operation], out: list[Operation], caller: str = "an unknown line"
) -> list[Operation]:
    """List a jaxpr's operations, without calls and choices of a platform; return its results."""
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, constant in zip(jaxpr.constvars, closed.consts, strict=True):
        env[var] = Operation("constant", (), {}, var.aval, _numpy(constant))

    def read(var: Any) -> Operation:
        if isinstance(var, Literal):
            aval: Any = var.aval
            return Operation("constant", (), {}, aval, np.asarray(var.val, aval.dtype))
        return env[var]

    for eqn in jaxpr.eqns:
        name, params, inputs = eqn.primitive.name, eqn.params, [read(var) for var in eqn.invars]
        avals, line = [var.aval for var in eqn.outvars], _line(eqn) or caller
        if inner := _called(eqn, inputs):
            inputs, params = inputs[len(inputs) - len(inner.in_avals) :], {}
        if name == "platform_index":
            default = [i for i, p in enumerate(params["platforms"]) if p is None or "cpu" in p]
            results = [Operation(name, (), {}, avals[0], np.int32(default[-1]))]
        elif name == "scan":
            body: list[Operation] = []
            starts = [Operation("argument", (), {}, aval) for aval in params["jaxpr"].in_avals]
            ends = flatten(params["jaxpr"], starts, body, line)
            loop = {key: params[key] for key in ("length", "reverse", "num_consts", "num_carry")}
            loop["body"] = (starts, live(body, ends), ends)
            out.append(Operation(name, inputs, loop, avals[0], line=line))
            rows = [Operation("row", out[-1:], {"row": i}, aval) for i, aval in enumerate(avals)]
            out += (results := rows)
        elif inner and not (code := _layer(inner)):
            results = flatten(inner, inputs, out, line)
        else:
            values: list[Any] = [None] * len(avals)
            if inner and code:  # constants come first
                inputs = inputs[len(inputs) - code.count("{}") :]
            if not inner and all(i.value is not None for i in inputs):
                values = eqn.primitive.bind(*[i.value for i in inputs], **params)
                values = [*map(_numpy, values if eqn.primitive.multiple_results else [values])]
            results = [
                Operation(
                    code if inner else name, inputs, params | {"output": i}, aval, value, line
                )
                for i, (aval, value) in enumerate(zip(avals, values, strict=True))
            ]
            out += [result for result in results if result.value is None]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _numpy(value: Any) -> np.ndarray | None:
    """Return a constant; None for a key of random numbers, which evaluation does not use."""
    is_key = isinstance(value, jax.Array) and jax.dtypes.issubdtype(
        value.dtype, jax.dtypes.extended
    )
    return None if is_key else np.asarray(value)


def _line(eqn: Any) -> str:
    for frame in getattr(eqn.source_info.traceback, "frames", ()):
        if not re.search(r"/(jax|jaxlib|flax|haiku|equinox|optax|einops)/", frame.file_name):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


def _called(eqn: Any, inputs: Sequence[Operation]) -> ClosedJaxpr | None:
    if eqn.primitive.name == "cond" and inputs[0].value is not None:
        return eqn.params["branches"][int(inputs[0].value)]
    if eqn.primitive.name not in CALLS.split():
        return None
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)
    return inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ())


def _layer(closed: ClosedJaxpr) -> str | None:
    """Return the code of the layer that a called function is, if it is one of `LAYERS`."""
    if closed.jaxpr.debug_info.func_name == "_adaptive_pool":  # whose slices depend on the size
        return f"pool({{}}, F.adaptive_avg_pool2d, {closed.out_avals[0].shape[1]})"
    if closed.consts or len(closed.eqns) > 20 or len(closed.out_avals) != 1:
        return None
    return _layer_of(str(closed.jaxpr), *closed.in_avals)


@functools.cache
def _layer_of(text: str, *avals: Any) -> str | None:
    for function, code in LAYERS:
        if len(avals) == len(re.findall("{}", code)):
            try:
                traced = jax.make_jaxpr(function)(*avals)
            except (TypeError, ValueError):
                continue
            inner = _called(traced.eqns[0], ()) if len(traced.eqns) == 1 else None
            if text in (str(traced.jaxpr), str(inner and inner.jaxpr)):
                return code
    return None


def live(trace: Sequence[Operation], results: Sequence[Operation]) -> list[Operation]:
    """List the operations that the results depend on."""
    operations, needed = [], {*map(id, results)}
    for op in reversed(trace):
        if id(op) in needed:
            operations.append(op)
            needed.update(map(id, op.inputs))
    return operations[::-1]


# ------------------------------------------------------------------------------------------- graph


class Node:
    """An expression of arrays: code with `{}` for its inputs, which are nodes, numbers or sizes.

    Its shape is that of the array in PyTorch, which may lack axes that JAX has broadcast.
    """

    def __init__(self, code: str, inputs: tuple, shape: tuple, dtype: Any, name: str = "") -> None:
        self.code, self.inputs, self.shape, self.dtype, self.name = code, inputs, shape, dtype, name
        nodes = [i for i in inputs if isinstance(i, Node)]
        self.of_weights: bool = bool(name) or (bool(nodes) and all(n.of_weights for n in nodes))


def merged(values: Sequence[Any]) -> Any:
    """Merge the values of all traces: one if they are equal, else a size that varies."""
    values = [*map(_without_numpy, values)]
    first = values[0]
    if all(type(v) is type(first) and (v == first or repr(v) == repr(first)) for v in values):
        return first
    if all(isinstance(value, int | float) for value in values):
        return VaryingSize(values)
    if all(isinstance(v, tuple | list) and len(v) == len(first) for v in values):
        return tuple(merged(parts) for parts in zip(*values, strict=True))
    raise Varies(f"{values}"[:200])


def _without_numpy(value: Any) -> Any:
    """Turn NumPy numbers, also inside tuples, into Python numbers, which can be printed as code."""
    if type(value) in (tuple, list):
        return type(value)(map(_without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


class VaryingSize(tuple):
    """A number that depends on the size of the images: one value for each trace."""


def product(sizes: Iterable[Any]) -> Any:
    """Multiply sizes."""
    return calculated(lambda *numbers: math.prod(numbers), *sizes)


def total(*sizes: Any) -> Any:
    """Add sizes."""
    return calculated(lambda *numbers: sum(numbers), *sizes)


def calculated(function: Callable, *sizes: Any) -> Any:
    """Compute a number from sizes in each trace."""
    if not any(isinstance(size, VaryingSize) for size in sizes):
        return function(*sizes)
    count = next(len(size) for size in sizes if isinstance(size, VaryingSize))
    rows = [size if isinstance(size, VaryingSize) else (size,) * count for size in sizes]
    return merged([function(*numbers) for numbers in zip(*rows, strict=True)])


class Body(NamedTuple):
    """The part of a loop that is repeated."""

    arguments: list[Any]  # nodes and sizes
    nodes: list[Node]
    results: list[Node]


def reached(results: Iterable[Any]) -> set[Node]:
    """Collect the nodes that results need, with themselves."""
    needed = {result for result in results if isinstance(result, Node)}
    stack = [*needed]
    while stack:
        new = [i for i in stack.pop().inputs if isinstance(i, Node) and i not in needed]
        needed.update(new)
        stack += new
    return needed


class Graph:
    """Makes nodes from the operations of all traces; `wide` is their floating-point type."""

    def __init__(self, network: str, wide: np.dtype) -> None:
        self.network, self.wide = network, wide
        self.nodes: dict[Any, Node] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.images: Any = None

    def make(self, code: str, inputs: Sequence[Any], shape: Sequence[Any], dtype: Any) -> Node:
        key = (code, *(id(i) if isinstance(i, Node | Body) else (type(i), i) for i in inputs))
        if key not in self.nodes:
            self.nodes[key] = Node(code, tuple(inputs), tuple(shape), np.dtype(dtype))
        return self.nodes[key]

    def leaf(self, name: str, shape: Sequence[Any], dtype: Any) -> Node:
        return self.nodes.setdefault(name, Node("", (), tuple(shape), np.dtype(dtype), name))

    def read(self, traces: Sequence[list[Operation]], env: dict[int, Any]) -> None:
        """Make nodes of lists of operations, for the first trace's; `env` has what they read."""
        lengths = {len(trace) for trace in traces}
        if len(lengths) > 1:
            raise Varies(f"{lengths} operations")
        for same in zip(*traces, strict=True):
            inputs = [self.value(env, parts) for parts in _inputs(same)]
            env[id(same[0])] = self.node(same, inputs)

    def value(self, env: dict[int, Any], same: Sequence[Operation]) -> Any:
        """Return a node, a number or a size for one input of an operation."""
        first = same[0]
        if id(first) in env:
            return env[id(first)]
        values = [np.asarray(one.value) for one in same]
        if all(v.size == 1 or (v.size and (v == v.flat[0]).all()) for v in values):
            env[id(first)] = merged([v.flat[0].item() for v in values])
        elif len({v.shape for v in values}) == 1 and all((v == values[0]).all() for v in values):
            names = (k for k, a in self.constants.items() if a is first.value)
            name = next(names, f"constants.{len(self.constants)}")
            self.constants[name] = first.value
            env[id(first)] = self.leaf(name, values[0].shape, first.dtype)
        elif first.name == "constant":
            env[id(first)] = self.waves(values)
        else:
            inputs = [self.value(env, parts) for parts in _inputs(same)]
            env[id(first)] = self.node(same, inputs)
        return env[id(first)]

    def waves(self, values: Sequence[np.ndarray]) -> Node:
        """Return XCiT's positions, which the module computes for any grid."""
        if not all(
            v.ndim == 3 and np.array_equal(v, positions.fourier_features(*v.shape[:2]))
            for v in values
        ):
            raise Varies(f"constants of shapes {[v.shape for v in values]}")
        shape = merged([v.shape for v in values])
        inputs = (*shape[:2], self.images)
        return self.make("fourier_features({}, {}, {})", inputs, shape, values[0].dtype)

    def node(self, same: Sequence[Operation], inputs: list[Any]) -> Any:
        op = same[0]
        merged([one.name for one in same])
        shape = merged([one.shape for one in same])
        parts = _inputs(same)
        shapes = [merged([part.shape for part in part]) for part in parts]
        skipped = ("body", "jaxpr", "call_jaxpr", "sharding", "out_sharding", "precision")
        params = {k: merged([one.params[k] for one in same]) for k in op.params if k not in skipped}
        if "{}" in op.name:
            return self.layer(op.name, inputs, shapes[0], shape, op.dtype)
        if op.name in SAME.split():
            return inputs[params["output"]]
        if op.name in ELEMENTWISE:
            return self.elementwise(ELEMENTWISE[op.name], inputs, op.dtype)
        if op.name not in LAZY.split():
            rows = zip(inputs, shapes, parts, strict=True)
            inputs = [self.full(x, shape, part[0].dtype) for x, shape, part in rows]
        if op.name == "scan":
            return self.scan([one.params["body"] for one in same], params, inputs, id(op), shape)
        try:
            params |= {"shapes": shapes, "shape": shape, "dtype": op.dtype}
            return RULES.get(op.name, _no_rule)(self, params, *inputs)
        except NotImplementedError as error:
            raise NoRule(
                f"{self.network} has the operation {op.name!r} ({op.line}), which cannot be "
                "translated to PyTorch; write that line with other operations, or export with "
                "--layout jaxrobust"
            ) from error

    def full(self, x: Any, shape: Any, dtype: Any) -> Any:
        """Return an input with the axes that JAX has broadcast."""
        if isinstance(x, Node) and x.shape != shape:
            return self.make(f"{{}}.expand({_marks(shape)})", (x, *shape), shape, x.dtype)
        if not isinstance(x, Node) and shape:
            kind, more = self.kind(dtype)
            code = f"torch.full(({_marks(shape)},), {{}}, dtype={kind}, device={{}}.device)"
            return self.make(code, (*shape, x, *more, self.images), shape, dtype)
        return x

    def kind(self, dtype: Any) -> tuple[str, tuple]:
        """Return the code of a type, and its inputs: every floating point is that of the images."""
        if np.issubdtype(dtype, np.floating):
            return "{}.dtype", (self.images,)
        return f"torch.{np.dtype(dtype).name}", ()

    def elementwise(self, code: str, inputs: Sequence[Any], dtype: Any) -> Any:
        nodes = [i for i in inputs if isinstance(i, Node)]
        numbers = [i for i in inputs if not isinstance(i, Node)]
        if code in ("{} + {}", "{} * {}") and numbers == [float(code == "{} * {}")]:
            return nodes[0]
        if code == "{} + {}" and (
            layer := self.with_bias(*inputs) or self.with_bias(*inputs[::-1])
        ):
            return layer
        if numbers and (bound := re.fullmatch(r"torch.(max|min)imum.*", code)):
            other = {"max": "min", "min": "max"}[bound[1]]
            code, inputs = f"{{}}.clamp({other}={{}})", (*nodes, *numbers)
        rank = max(len(node.shape) for node in nodes)
        shapes = [(1,) * (rank - len(node.shape)) + node.shape for node in nodes]
        shape = [next((s for s in sizes if s != 1), 1) for sizes in zip(*shapes, strict=True)]
        return self.make(code, inputs, shape, dtype)

    def with_bias(self, x: Any, bias: Any) -> Node | None:
        """Return a linear map or convolution with a bias, of a sum of both."""
        fits = isinstance(x, Node) and isinstance(bias, Node) and x.code.startswith(BIASED)
        if (
            not fits
            or "bias" in x.code
            or not bias.of_weights
            or product(bias.shape) != x.shape[-1]
        ):
            return None
        bias = self.reshape(bias, bias.shape, x.shape[-1:])
        return self.make(x.code[:-1] + ", bias={})", (*x.inputs, bias), x.shape, x.dtype)

    def layer(self, code: str, inputs: list[Any], input_shape: Any, shape: Any, dtype: Any) -> Node:
        if " + " in code:
            code, inputs = "F.gelu({})", [self.elementwise("{} + {}", inputs, dtype)]
        inputs = [self.full(inputs[0], input_shape, dtype), *inputs[1:]]
        return self.make(code, inputs, shape, dtype)

    def reshape(self, x: Any, old: Any, new: Any) -> Any:
        if not isinstance(x, Node):
            return x
        if x.shape != old:  # of what JAX has broadcast, only the last axes matter
            small = x.shape
            while small and small[0] == 1:
                small = small[1:]
            for start in range(len(new), -1, -1):
                if old[len(old) - len(small) :] == small and product(new[start:]) == product(small):
                    return self.reshape(x, x.shape, new[start:])
            x = self.full(x, old, x.dtype)
        if x.code.startswith("{}.reshape("):
            x = x.inputs[0]
        if (1,) * (len(new) - len(x.shape)) + x.shape == new:
            return x
        if x.code.startswith("F.linear(") and x.shape[-1] == new[-1]:
            first = self.reshape(x.inputs[0], x.inputs[0].shape, (*new[:-1], x.inputs[0].shape[-1]))
            return self.make(x.code, (first, *x.inputs[1:]), new, x.dtype)
        varying = [i for i, size in enumerate(new) if isinstance(size, VaryingSize)]
        sizes = [-1 if varying == [i] else size for i, size in enumerate(new)]
        return self.make(f"{{}}.reshape({_marks(new)})", (x, *sizes), new, x.dtype)

    def permute(self, x: Node, axes: Sequence[int]) -> Node:
        if re.fullmatch(r"\{\}\.permute\([\d, ]+\)", x.code):
            inner = [int(axis) for axis in re.findall(r"\d+", x.code)]
            axes, x = [inner[axis] for axis in axes], x.inputs[0]
        if list(axes) == sorted(axes):
            return x
        shape = [x.shape[axis] for axis in axes]
        return self.make(f"{{}}.permute({', '.join(map(str, axes))})", (x,), shape, x.dtype)

    def scan(
        self, bodies: Sequence[Any], params: Any, inputs: list[Any], key: int, shape: Any
    ) -> Node:
        """Return a loop, whose body is a function of its inputs, constants and sizes."""
        starts, traces, ends = zip(*bodies, strict=True)
        env = {}
        for number, same in enumerate(zip(*starts, strict=True)):
            leaf = Node("", (), merged([one.shape for one in same]), same[0].dtype)
            env[id(same[0])] = self.nodes.setdefault((key, number), leaf)
        arguments = [*env.values()]
        self.read(traces, env)
        results = [
            self.full(self.value(env, same), merged([one.shape for one in same]), same[0].dtype)
            for same in zip(*ends, strict=True)
        ]
        needed, read = reached(results), dict[VaryingSize, None]()
        inside = [node for node in self.nodes.values() if node in needed]
        for node in inside:
            read |= dict.fromkeys(i for i in node.inputs if isinstance(i, VaryingSize))
        outer = [n for n in inside if n.name or n is self.images] + [*read]
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        groups = [[*outer, *inputs[:first]], inputs[first:last], inputs[last:]]
        marks = ", ".join("(" + "{}, " * len(group) + ")" for group in groups)
        code = f"scan({{}}, {marks}, {{}}, {params['reverse']})"
        body = Body([*outer, *arguments], [n for n in inside if n.code], results)
        return self.make(
            code,
            (body, *itertools.chain(*groups), params["length"]),
            shape,
            inputs[first].dtype if params["num_carry"] else self.wide,
        )

    # ------------------------------------- rules: (parameters with shape and type, *inputs) -> node

    def of(self, p: Any, code: str, *inputs: Any) -> Node:
        return self.make(code, inputs, p["shape"], p["dtype"])

    def reduced(self, method: str, p: Any, x: Any) -> Any:
        axes = p["axes"][0] if len(p["axes"]) == 1 else tuple(p["axes"])
        return self.of(p, f"{{}}.{method}({axes})", x) if axes != () else x

    def along(self, method: str, p: Any, x: Any) -> Node:
        axis = p["axes"][0] if "axes" in p else p["axis"]
        flip = f".flip({axis})" * bool(p.get("reverse"))
        return self.of(p, f"{{}}{flip}.{method}({axis}){flip}", x)

    def broadcast(self, p: Any, x: Any, *sizes: Any) -> Any:
        axes = dict(zip(p["broadcast_dimensions"], p["shapes"][0], strict=True))
        rank = len(p["shape"])
        new = tuple(axes.get(i, 1) for i in range(min(axes, default=rank), rank))
        return self.reshape(x, p["shapes"][0], new)

    def convert(self, p: Any, x: Any) -> Any:
        (kind, more), dtype = self.kind(p["dtype"]), p["dtype"]
        if not isinstance(x, Node):
            return calculated(lambda n: np.asarray(n).astype(dtype).item(), x)
        if x.dtype == dtype or kind == self.kind(x.dtype)[0]:
            return x
        return self.make(f"{{}}.to({kind})", (x, *more), x.shape, dtype)

    def divide(self, p: Any, x: Any, y: Any) -> Any:
        if isinstance(x, Node) and x.code.startswith("{}.sum("):
            axes = map(int, re.findall(r"\d+", x.code))
            if y == product(x.inputs[0].shape[axis] for axis in axes):
                return self.make(x.code.replace("sum", "mean"), x.inputs, x.shape, p["dtype"])
        is_float = np.issubdtype(p["dtype"], np.floating)
        code = "{} / {}" if is_float else 'torch.div({}, {}, rounding_mode="trunc")'
        return self.elementwise(code, (x, y), p["dtype"])

    def select(self, p: Any, case: Any, *cases: Any) -> Any:
        if not isinstance(case, Node):
            return cases[int(case)]
        if len(cases) != 2 or case.dtype != np.bool_:
            raise NotImplementedError
        if case.code == "{} <= {}" and case.inputs == (cases[0], 0) and cases[1] == 0:
            return self.make("{}.relu()", cases[:1], cases[0].shape, p["dtype"])
        if not any(isinstance(option, Node) for option in cases):
            cases = (self.full(cases[0], (1,), p["dtype"]), cases[1])
        return self.elementwise("torch.where({}, {}, {})", (case, *cases[::-1]), p["dtype"])

    def clamp(self, p: Any, low: Any, x: Any, high: Any) -> Any:
        x = self.elementwise(ELEMENTWISE["max"], (x, low), p["dtype"])
        return self.elementwise(ELEMENTWISE["min"], (x, high), p["dtype"])

    def iota(self, p: Any) -> Any:
        axis, shape, (kind, more) = p["dimension"], p["shape"], self.kind(p["dtype"])
        code = f"torch.arange({{}}, dtype={kind}, device={{}}.device)"
        inputs = (shape[axis], *more, self.images)
        line = self.make(code, inputs, shape[axis : axis + 1], p["dtype"])
        new = (shape[axis], *(1,) * (len(shape) - axis - 1))
        return self.full(self.reshape(line, line.shape, new), shape, p["dtype"])

    def split(self, p: Any, x: Any) -> Any:
        starts, limits, ends = [0] * len(x.shape), [*x.shape], p["sizes"][: p["output"] + 1]
        starts[p["axis"]], limits[p["axis"]] = total(*ends[:-1]), total(*ends)
        return self.sliced(p, x, starts, limits)

    def dynamic_slice(self, p: Any, x: Any, *starts: Any) -> Any:
        if any(isinstance(start, Node) for start in starts):
            raise NotImplementedError
        return self.sliced(p, x, starts, [*map(total, starts, p["shape"])])

    def sliced(self, p: Any, x: Any, starts: Any, limits: Any, strides: Any = None) -> Any:
        codes, inputs, strides = [], [x], strides or (1,) * len(x.shape)
        for axis in zip(starts, limits, strides, x.shape, p["shape"], strict=True):
            code, ends = _cut(*axis)
            inputs += ends
            codes.append(code)
        cut = ", ".join(codes)
        return self.make(f"{{}}[{cut}]", inputs, p["shape"], x.dtype) if cut.strip(":, ") else x

    def pad(self, p: Any, x: Any, value: Any) -> Any:
        if any(inner for *_, inner in p["padding_config"]) or isinstance(value, Node):
            raise NotImplementedError
        return self.padded(x, [pair[:2] for pair in p["padding_config"]], value)

    def padded(self, x: Any, pairs: Any, value: Any) -> Any:
        pads = [n for pair in reversed(pairs) for n in pair]
        if not any(pads):
            return x
        shape = [total(size, *pair) for size, pair in zip(x.shape, pairs, strict=True)]
        code = f"F.pad({{}}, ({_marks(pads)}), value={{}})"
        return self.make(code, (x, *pads, value), shape, x.dtype)

    def dot_general(self, p: Any, x: Any, y: Any) -> Any:
        (x_axes, y_axes), (batch, of_y) = p["dimension_numbers"]
        ranks, n, first = (len(x.shape), len(y.shape)), len(batch), tuple(range(len(batch)))
        if not batch and ranks[1] == 2 and tuple(x_axes) == (ranks[0] - 1,) and y.of_weights:
            return self.of(p, "F.linear({}, {})" if y_axes[0] else "F.linear({}, {}.mT)", x, y)
        if tuple(batch) == tuple(of_y) == first and ranks == (n + 2, n + 2) and len(x_axes) == 1:
            x = x if x_axes[0] == n + 1 else self.permute(x, (*first, n + 1, n))
            y = y if y_axes[0] == n else self.permute(y, (*first, n + 1, n))
            is_attention = x.code == "{}.softmax(-1)" and x.inputs[0].code == "{} @ {}" and n == 2
            if is_attention and x.inputs[0].inputs[0].shape[:n] == p["shape"][:n]:
                q, k = x.inputs[0].inputs
                return self.attention(q, k, y, p["shape"])
            return self.of(p, "{} @ {}", x, y)
        letters = iter("abcdefghijklmnopqrstuvwxyz")
        names: list[list[str]] = [[""] * ranks[0], [""] * ranks[1]]
        for i, j in (*zip(batch, of_y, strict=True), *zip(x_axes, y_axes, strict=True)):
            names[0][i] = names[1][j] = next(letters)
        out = [names[0][i] for i in batch]
        for part in names:
            for axis in [i for i, name in enumerate(part) if not name]:
                part[axis] = next(letters)
                out.append(part[axis])
        text = f"{''.join(names[0])},{''.join(names[1])}->{''.join(out)}"
        return self.of(p, f'torch.einsum("{text}", {{}}, {{}})', x, y)

    def attention(self, q: Node, k: Node, v: Node, shape: Any) -> Node:
        """Return the softmax of q @ k times v, which PyTorch computes without the whole matrix."""
        scale = 1.0
        if q.code == "{} * {}" and isinstance(q.inputs[1], float):
            q, scale = q.inputs
        code = "F.scaled_dot_product_attention({}, {}, {}, scale={})"
        return self.make(code, (q, self.permute(k, (0, 1, 3, 2)), v, scale), shape, v.dtype)

    def convolution(self, p: Any, x: Any, kernel: Any) -> Any:
        shape, pads = p["shape"], p["padding"]
        if {*p["lhs_dilation"]} != {1} or p["batch_group_count"] != 1 or len(shape) > 5:
            raise NotImplementedError
        of_x, of_kernel, of_out = (tuple(part) for part in p["dimension_numbers"])
        x = self.permute(x, (of_x[0], *of_x[2:], of_x[1]))
        kernel = self.permute(kernel, (*of_kernel[2:], of_kernel[1], of_kernel[0]))
        places = (of_out[0], *of_out[2:], of_out[1])
        if any(low != high or isinstance(low, VaryingSize) or low < 0 for low, high in pads):
            x, pads = self.padded(x, ((0, 0), *pads, (0, 0)), 0.0), ((0, 0),) * len(pads)
        settings = {
            "stride": tuple(p["window_strides"]),
            "padding": tuple(low for low, _ in pads),
            "dilation": tuple(p["rhs_dilation"]),
            "groups": (p["feature_group_count"],),
        }
        code = ""
        for key, values in settings.items():
            if {*values} != {0 if key == "padding" else 1}:
                code += f", {key}={values[0] if len({*values}) == 1 else values}"
        new = [shape[axis] for axis in places]
        out = self.make(f"conv({{}}, {{}}{code})", (x, kernel), new, p["dtype"])
        return self.permute(out, [places.index(axis) for axis in range(len(shape))])

    def gather(self, p: Any, x: Any, indices: Any) -> Any:
        d, sizes, shape = p["dimension_numbers"], p["slice_sizes"], p["shape"]
        indexed = tuple(d.start_index_map)
        others = [axis for axis in range(len(x.shape)) if axis not in indexed]
        mode = "FILL" if p["mode"] is None else p["mode"].name
        if isinstance(indices, Node) and indices.name in self.constants:
            places, top = self.constants[indices.name], [x.shape[axis] for axis in indexed]
            is_fixed = not any(isinstance(n, VaryingSize) for n in top)
            if is_fixed and ((places >= 0) & (places < top)).all():
                mode = "PROMISE_IN_BOUNDS"
        takes_all = all(sizes[axis] == x.shape[axis] for axis in others)
        plain = tuple(d.collapsed_slice_dims) == indexed and not d.operand_batching_dims
        if not (plain and takes_all) or "FILL" in mode:
            raise NotImplementedError
        # The indexed axes come first, then the axes of the indices, and the others behind them.
        x, rank = self.permute(x, (*indexed, *others)), len(indices.shape) - 1
        new = (*indices.shape[:-1], *x.shape[len(indexed) :])
        clamp = ".clamp(0, {})" * (mode == "CLIP")
        parts = [f"{{}}[..., {i}].long(){clamp}" for i in range(len(indexed))]
        tops = [total(size, -1) for size in x.shape[: len(indexed)]]
        pairs = [part for top in tops for part in (indices, top)[: 1 + bool(clamp)]]
        picked = self.make(f"{{}}[{', '.join(parts)}]", (x, *pairs), new, p["dtype"])
        offsets, batches = iter(range(rank, len(shape))), iter(range(rank))
        order = [next(offsets) if i in d.offset_dims else next(batches) for i in range(len(shape))]
        return self.permute(picked, order)

    def pooled(self, name: str, p: Any, x: Any) -> Any:
        window, strides = p["window_dimensions"], p["window_strides"]
        dilation = {*(p.get("base_dilation") or ()), *(p.get("window_dilation") or ())}
        if dilation - {1} or len(window) != 4 or {window[0], window[3]} != {1}:
            raise NotImplementedError
        x = self.padded(x, p["padding"], -math.inf if name == "max" else 0.0)
        code = f"pool({{}}, F.{name}_pool2d, {tuple(window[1:3])}, {tuple(strides[1:3])}"
        return self.of(p, code + (", divisor_override=1)" if name == "avg" else ")"), x)


def _no_rule(*operation: Any) -> Any:
    raise NotImplementedError


# A primitive -> its rule: (graph, parameters with the result's shape and type, *inputs) -> node.
RULES: dict[str, Callable[..., Any]] = {
    **{f"reduce_{n}": lambda g, p, x, m=m: g.reduced(m, p, x) for n, m in REDUCED.items()},
    **{name: lambda g, p, x, name=name: g.along(name, p, x) for name in ALONG.split()},
    **dict.fromkeys(
        ("reshape", "squeeze", "expand_dims"),
        lambda g, p, x, *sizes: g.reshape(x, p["shapes"][0], p["shape"]),
    ),
    "broadcast_in_dim": Graph.broadcast,
    "convert_element_type": Graph.convert,
    "integer_pow": lambda g, p, x: g.elementwise("{} ** {}", (x, p["y"]), p["dtype"]),
    "stop_gradient": lambda g, p, x: (
        g.make("{}.detach()", (x,), x.shape, p["dtype"]) if isinstance(x, Node) else x
    ),
    "div": Graph.divide,
    "select_n": Graph.select,
    "clamp": Graph.clamp,
    "transpose": lambda g, p, x: g.permute(x, p["permutation"]),
    "concatenate": lambda g, p, *xs: g.of(p, f"torch.cat(({_marks(xs)},), {p['dimension']})", *xs),
    "stack": lambda g, p, *xs: g.of(p, f"torch.stack(({_marks(xs)},), {p['axis']})", *xs),
    "row": lambda g, p, x: g.of(p, f"{{}}[{p['row']}]", x),
    "tile": lambda g, p, x: g.of(p, f"{{}}.tile({_marks(p['reps'])})", x, *p["reps"]),
    "rev": lambda g, p, x: g.of(p, f"{{}}.flip({p['dimensions']})", x),
    "iota": Graph.iota,
    "split": Graph.split,
    "slice": lambda g, p, x: g.sliced(p, x, p["start_indices"], p["limit_indices"], p["strides"]),
    "dynamic_slice": Graph.dynamic_slice,
    "pad": Graph.pad,
    "dot_general": Graph.dot_general,
    "conv_general_dilated": Graph.convolution,
    "gather": Graph.gather,
    "reduce_window_max": lambda g, p, x: g.pooled("max", p, x),
    "reduce_window_sum": lambda g, p, x: g.pooled("avg", p, x),
}


def _marks(inputs: Sequence[Any]) -> str:
    return ", ".join(["{}"] * len(inputs))


def _cut(start: Any, limit: Any, stride: int, size: Any, count: Any) -> tuple[str, list[Any]]:
    """Write a slice of an axis from its end where its size varies, and what the code reads."""
    begin, end, ends = "" if start == 0 else "{}", "" if limit == size else "{}", list[Any]()
    from_end = calculated(lambda n, start: start - n, size, start)
    if isinstance(start, VaryingSize) and not isinstance(from_end, VaryingSize):
        begin = str(from_end)
    for less in range(65) if isinstance(limit, VaryingSize) and isinstance(start, int) else ():
        if count == calculated(lambda n, less=less: -((less + start - n) // stride), size):
            end = f"-{less}" if less else ""
            break
    ends += [start] * (begin == "{}") + [limit] * (end == "{}")
    return f"{begin}:{end}" + (f":{stride}" if stride > 1 else ""), ends


def _inputs(same: Sequence[Operation]) -> list[tuple[Operation, ...]]:
    return [*zip(*(one.inputs for one in same), strict=True)]
