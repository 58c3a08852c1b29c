"""Any network as a PyTorch module: the jaxpr of its evaluation pass, printed as code.

Each line computes a node of `torch_graph`. Equal blocks, recognized by the names of their weights,
become one function.
"""

import itertools
import keyword
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.publish.torch_graph import (
    Body,
    Graph,
    Node,
    Operation,
    Varies,
    VaryingSize,
    flatten,
    live,
    reached,
)  # fmt: skip
from jaxrobust.runtime.commandline import functions
from jaxrobust.weights.store.artifact import Network

OLDEST = (2, 6)  # PyTorch version that the extra `torch` allows
VARIABLES = [*"xyzuvwabcdefgklmoqrst"]
# Steps in which the sides of images may differ from a network's own, and whether they are square.
STEPS = (*itertools.product((1, 4, 8, 32), (False,)), (1, True), (8, True), (32, True), (0, True))
BATCHES = (3, 8, 5, 4, 7)  # of the traced images
# What is added to a multiple of 32 for their other sides: remainders at which roundings differ.
ROWS, COLUMNS = (64, 97, 159, 210), (191, 128, 33, 83)


class Sizes:
    """Expresses sizes that depend on the images by the shapes of the network's arrays."""

    def __init__(self, graph: Graph, nodes: Sequence[Node]) -> None:
        self.graph, self.nodes = graph, list[Node]()
        self.sources: dict[VaryingSize, tuple[Node, int]] = {}
        self.add_sides(graph.images)
        for node in nodes:
            code, inputs = "", list[Any]()
            for mark, value in zip(node.code.split("{}"), (*node.inputs, None), strict=True):
                text, value = (
                    self.written(value, node) if isinstance(value, VaryingSize) else ("{}", value)
                )
                code += mark + text * (value is not None)
                inputs += [] if value is None else [value]
            node.code, node.inputs = code, tuple(inputs)
            self.nodes.append(node)
            self.add_sides(node)

    def add_sides(self, node: Node) -> None:
        for axis, size in enumerate(node.shape):
            if isinstance(size, VaryingSize):
                self.sources.setdefault(size, (node, axis))

    def written(self, size: VaryingSize, node: Node) -> tuple[str, Node]:
        """Return code for a size that a node reads, and what that code reads itself."""
        for source in node.inputs:
            if isinstance(source, Node) and size in source.shape:
                return f"{{}}.shape[{source.shape.index(size)}]", source
        return "{}", self.node(size)

    def node(self, size: VaryingSize) -> Node:
        """Return a node that computes a size."""
        if size in self.sources:
            source, axis = self.sources[size]
            place = self.nodes.index(source) + 1 if source in self.nodes else 0
            return self.made(f"{{}}.shape[{axis}]", (source,), place)
        if not all(float(n).is_integer() for n in size):
            return self.made("1 / {}", (self.node(VaryingSize(round(1 / n) for n in size)),))
        for added in (0, 1, -1, 2):
            parts = [int(n) - added for n in size]
            common = math.gcd(*parts)
            for factor in (n for n in range(1, common + 1) if common % n == 0):
                quotient = VaryingSize(n // factor for n in parts)
                if (formula := self.form(quotient)) is not None:
                    code, sides = formula
                    code = f"{factor} * {code}" * (factor > 1) or code
                    code += f" {'+' if added > 0 else '-'} {abs(added)}" * bool(added)
                    return self.made(code, tuple(map(self.node, sides)))
        raise Varies(f"a size of {size}")

    def form(self, size: VaryingSize) -> tuple[str, tuple[VaryingSize, ...]] | None:
        if size in self.sources:
            return "{}", (size,)
        # The simplest formula of the nearest array.
        for divisor, side in itertools.product((2, 4, 8, *range(3, 65)), [*self.sources][::-1]):
            if size == tuple(-n % divisor for n in side):
                return f"(-{{}} % {divisor})", (side,)
            for added in (0, divisor - 1) if min(size) > 1 else ():
                if size == tuple((n + added) // divisor for n in side):
                    return (
                        f"(({{}} + {added}) // {divisor})" if added else f"({{}} // {divisor})"
                    ), (side,)
        for side in self.sources:
            if all(a > 0 and n % a == 0 for n, a in zip(size, side, strict=True)):
                other = VaryingSize(n // a for n, a in zip(size, side, strict=True))
                if other in self.sources:
                    return "{} * {}", (side, other)
        return None

    def made(self, code: str, inputs: tuple[Node, ...], place: int | None = None) -> Node:
        node = self.graph.make(code, inputs, (), np.dtype(int))
        node.of_weights = False
        if node not in self.nodes:
            self.nodes.insert(len(self.nodes) if place is None else place, node)
        return node


class Step(NamedTuple):
    """A line: the variables it assigns, and code with `{}` for what it reads."""

    outputs: list[Node]
    code: str
    inputs: tuple


class Block(NamedTuple):
    """Adjacent nodes whose weights share a prefix, as a function."""

    prefix: str
    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]
    body: str


class ForwardPass:
    """The code of a network's forward pass and of the functions that it calls."""

    def __init__(self, graph: Graph, logits: Node) -> None:
        self.graph, self.logits = graph, logits
        needed = reached([logits])
        nodes = [node for node in graph.nodes.values() if node in needed and node.code]
        self.nodes = Sizes(graph, nodes).nodes
        self.last = {
            i: at for at, node in enumerate(self.nodes) for i in node.inputs if isinstance(i, Node)
        }
        self.last[logits] = len(self.nodes)
        self.bodies: dict[str, str] = {}  # of loops: code -> name
        self.forward, self.functions = min(
            map(self.written, range(4)), key=lambda code: len(code[0]) + len("".join(code[1]))
        )

    def written(self, level: int) -> tuple[str, list[str]]:
        """Return the forward pass and the functions, for blocks under `level` numbered names."""
        parts = [self.block(*part) for part in self.split(level)]
        counts = Counter(part.body for part in parts if part.prefix)
        names: dict[str, str] = {}
        steps: list[Step] = []
        for part in parts:
            if counts[part.body] < 2 or not part.prefix:
                steps += [Step([node], node.code, node.inputs) for node in part.nodes]
                continue
            if part.body not in names:
                words = [word for word in part.prefix.split(".") if not word.isdigit()]
                stem = (
                    re.sub(r"\W|_?\d+$", "", words[-1] if words else "").lower().removesuffix("s")
                )
                if keyword.iskeyword(stem) or stem in RESERVED or len(stem) < 3:
                    stem = f"{stem}_block".strip("_")
                others = [f"{stem}_{n}" for n in range(2, len(names) + 3)]
                names[part.body] = next(n for n in (stem, *others) if n not in names.values())
            marks = ", ".join(["{}"] * (1 + len(part.inputs)))
            inputs = (Node("", (), (), np.dtype(bool), part.prefix), *part.inputs)
            steps.append(Step(part.outputs, f"{names[part.body]}({marks})", inputs))
        body = self.lines(steps, {self.graph.images: "images"}, [self.logits], "")
        functions = [f"def {name}(p, {body}" for body, name in names.items()]
        functions += [f"def {name}({body}" for body, name in self.bodies.items()]
        return body, functions

    def split(self, level: int) -> list[tuple[str, list[Node]]]:
        """Cut the nodes where blocks begin, between their weights where the fewest arrays live."""
        alive, count = [0], Counter(self.last[node] for node in self.nodes if not node.of_weights)
        for at, node in enumerate(self.nodes):
            alive.append(alive[-1] + (not node.of_weights) - count[at])
        keys = [self.prefix(node, level) for node in self.nodes]
        marks = [at for at, key in enumerate(keys) if key is not None]
        cuts = [0]
        for start, end in itertools.pairwise(marks):
            if keys[start] != keys[end]:
                cuts.append(-min((alive[at], -at) for at in range(start + 1, end + 1))[1])
        ends = [*cuts[1:], len(self.nodes)]
        runs = [self.nodes[start:end] for start, end in zip(cuts, ends, strict=True)]
        prefixes = [
            next((k for n in run if (k := self.prefix(n, level)) is not None), "") for run in runs
        ]
        number = Counter(prefixes)
        return [
            (prefix if number[prefix] == 1 else "", run)
            for prefix, run in zip(prefixes, runs, strict=True)
        ]

    @staticmethod
    def prefix(node: Node, level: int) -> str | None:
        """Return the first names of the weights that a node reads, up to the `level`th number."""
        prefixes = set()
        for name in (i.name for i in node.inputs if isinstance(i, Node) and i.name):
            parts = name.split(".")[:-1]
            ends = [i for i, part in enumerate(parts, 1) if re.search(r"\d$", part)]
            long = level and len(ends) >= level and not name.startswith("constants.")
            prefixes.add(".".join(parts[: ends[level - 1]]) if long else "")
        return None if not prefixes else prefixes.pop() if len(prefixes) == 1 else ""

    def block(self, prefix: str, nodes: list[Node]) -> Block:
        inside, end = {*nodes}, self.nodes.index(nodes[-1])
        inputs = [
            i
            for i in dict.fromkeys(i for node in nodes for i in node.inputs if isinstance(i, Node))
            if i not in inside and not i.name.startswith(prefix + ".")
        ]
        outputs = [node for node in nodes if self.last[node] > end]
        if not prefix or len(inputs) > 6 or not outputs:
            return Block("", nodes, inputs, outputs, "")
        names = dict(zip(inputs, VARIABLES, strict=False))
        steps = [Step([node], node.code, node.inputs) for node in nodes]
        return Block(prefix, nodes, inputs, outputs, self.lines(steps, names, outputs, prefix))

    def lines(self, steps: list[Step], names: Any, outputs: list[Node], prefix: str) -> str:
        """Write arguments and lines of a function; a variable is free after its last use."""
        arguments, names, lines = ", ".join(names.values()), dict(names), []
        last = {i: at for at, step in enumerate(steps) for i in step.inputs if isinstance(i, Node)}
        last |= dict.fromkeys(outputs, len(steps))
        for at, step in enumerate(steps):
            texts = [self.text(i, names, prefix) for i in step.inputs]
            code = step.code.format(*texts)
            dying = [
                node
                for node in step.inputs
                if isinstance(node, Node) and last[node] == at and node in names
            ]
            free = [names.pop(node) for node in dict.fromkeys(dying)]
            free = [name for name in free if name != "images"]
            more = (f"{name}{i}" for i in itertools.count(1) for name in VARIABLES)
            for node in step.outputs:
                taken = {*names.values()}
                names[node] = next(
                    n for n in itertools.chain(free, VARIABLES, more) if n not in taken
                )
            lines.append(f"{', '.join(names[node] for node in step.outputs)} = {code}")
        lines.append(f"return {', '.join(names[node] for node in outputs)}")
        return f"{arguments}):\n" + "".join(f"    {line}\n" for line in lines)

    def text(self, x: Any, names: dict[Any, str], prefix: str) -> str:
        if isinstance(x, Body):
            variables = (
                f"{'n' if isinstance(i, VaryingSize) else 'x'}{at}"
                for at, i in enumerate(x.arguments)
            )
            steps = [Step([node], node.code, node.inputs) for node in x.nodes]
            arguments = dict(zip(x.arguments, variables, strict=True))
            body = self.lines(steps, arguments, x.results, "")
            return self.bodies.setdefault(body, f"step_{len(self.bodies) + 1}")
        if isinstance(x, Node | VaryingSize) and x in names:
            return names[x]
        if isinstance(x, Node):
            return path(x.name, prefix)
        x = x.item() if isinstance(x, np.generic) else x
        return repr(x) if math.isfinite(x) else f'float("{x}")'


def path(name: str, prefix: str) -> str:
    """Write a weight as attributes of `self`, or of the part `p` if it has a prefix."""
    root, parts = ("p", name[len(prefix) + 1 :].split(".")) if prefix else ("self", name.split("."))
    plain = [part.isidentifier() and not keyword.iskeyword(part) for part in parts]
    return root + "".join(
        f".{part}" if is_plain else f"[{part if part.isdigit() else repr(part)}]"
        for part, is_plain in zip(parts, plain, strict=True)
    )


class Printed(NamedTuple):
    """The code of a network in PyTorch, and the arrays that it is loaded with."""

    code: str
    arrays: dict[str, np.ndarray]


def printed(network: Network) -> Printed:
    """Print the definitions of `Network()`, which takes f[B,C,H,W], for evaluation only.

    Raises:
      ValueError: an operation without a rule, or a PyTorch that is too old to run the module.
    """
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ValueError(
            f"PyTorch {torch.__version__} is too old for --layout module, which needs {needed}: "
            f"pip install 'torch>={needed}'"
        )
    is_ours = not functions.is_name(network.name)
    any_size = not is_ours or models.family(network.name).any_size
    for dtype, step in itertools.product(("float64", "float32"), STEPS if any_size else STEPS[-1:]):
        try:
            with jax.enable_x64(dtype == "float64"):
                apply = network.create(**{"dtype": dtype} if is_ours else {}).apply
                program = traced(apply, network, np.dtype(dtype), step)
            break
        except Varies as error:
            reason = error
    else:
        raise ValueError(f"{network.name} cannot be written in PyTorch: {reason}") from reason
    return _finished(program, network, *step)


def traced(apply: Any, network: Network, dtype: np.dtype, step: tuple[int, bool]) -> ForwardPass:
    """Trace `apply(params, stats, images)` for images in steps; `Varies` if that fails."""
    multiple, is_square = step
    graph, traces, results, starts = Graph(network.name, dtype), [], [], []
    weights = [
        {
            key: jax.ShapeDtypeStruct(a.shape, dtype if a.dtype.kind == "f" else a.dtype)
            for key, a in sorted(part.items())
        }
        for part in (network.params, network.stats)
    ]
    size = network.image_size
    for batch, *added in zip(
        BATCHES, (0, *ROWS), (0, *(ROWS if is_square else COLUMNS)), strict=True
    ):
        # In steps of one pixel, what is added begins at the next multiple of 32.
        sides = [
            size + (n and n + -size % 32 if multiple == 1 else multiple * (n // 32)) for n in added
        ]
        images = jax.ShapeDtypeStruct((batch, *sides, network.in_channels), dtype)
        try:
            closed = jax.make_jaxpr(lambda *operands: apply(*operands)[0])(*weights, images)
        except Exception as error:  # the network refuses images of that size, or that type
            raise Varies(str(error)) from error
        starts.append([Operation("argument", (), {}, aval) for aval in closed.in_avals])
        trace: list[Operation] = []
        results.append(flatten(closed, starts[-1], trace)[0])
        traces.append(live(trace, results[-1:]))
    env = {
        id(leaf): graph.leaf(name, leaf.shape, leaf.dtype)
        for name, leaf in zip([*weights[0], *weights[1]], starts[0], strict=False)
    }
    shape = [
        VaryingSize(sizes) for sizes in zip(*(start[-1].shape for start in starts), strict=True)
    ]
    sizes = [size if len({*size}) > 1 else size[0] for size in shape]
    graph.images = graph.leaf("images", [sizes[axis] for axis in (0, 3, 1, 2)], dtype)
    graph.images.of_weights = False
    env[id(starts[0][-1])] = graph.permute(graph.images, (0, 2, 3, 1))
    graph.read(traces, env)
    return ForwardPass(graph, env[id(results[0])])


def _finished(program: ForwardPass, network: Network, multiple: int, is_square: bool) -> Printed:
    constants = {
        key: a.astype(np.float32) if a.dtype.kind == "f" else a
        for key, a in program.graph.constants.items()
    }
    size, channels = network.image_size, network.in_channels
    bad, words = [f"images.ndim != 4 or images.shape[1] != {channels}"], ""
    if multiple != 1:
        bad.append(f"any((n - {size}) % {multiple or 8192} for n in images.shape[2:])")
        words = f", of {size} px" + f" plus or minus multiples of {multiple}" * bool(multiple)
    if is_square:
        bad.append("images.shape[2] != images.shape[3]")
        words = f", square ones{words}"
    code = "\n\n".join(["", *program.functions, ""])
    helpers = [text for name, text in HELPERS.items() if f"{name}(" in program.forward + code]
    buffers = {**network.stats, **constants}
    tables = [
        f"{name}: dict = {{\n"
        + "".join(f'    "{key}": ({a.shape}, torch.{a.dtype}),\n' for key, a in arrays.items())
        + "}\n"
        for name, arrays in (("PARAMETERS", network.params), ("BUFFERS", buffers))
    ]
    forward = "".join(f"    {line}\n" for line in program.forward.splitlines())
    module = MODULE.format(bad=" or ".join(bad), words=words, channels=channels)
    text = f"{''.join(tables)}{module}\n    def _logits(self, {forward.strip()}\n{code}"
    return Printed("".join([text, *helpers]).strip() + "\n", {**network.params, **buffers})


IMPORTS = """import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
"""
MODULE = '''

class Part(nn.Module):
    """Arrays and nested parts, by name."""

    def __getitem__(self, name):
        return getattr(self, str(name))


class Network(Part):
    """The network in evaluation mode; it cannot be trained."""

    def __init__(self):
        super().__init__()
        for name, (shape, dtype) in (PARAMETERS | BUFFERS).items():
            *path, last = name.split(".")
            part = self
            for step in path:
                if step not in part._modules:
                    part.add_module(step, Part())
                part = part[step]
            array = torch.zeros(shape, dtype=dtype)
            if len(shape) == 4:  # convolution kernels, in PyTorch's memory layout
                array = array.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
            if name in PARAMETERS:
                part.register_parameter(last, nn.Parameter(array, dtype.is_floating_point))
            else:
                part.register_buffer(last, array)
        self.train(False)

    def train(self, mode=True):
        if mode:
            raise RuntimeError("this module is for evaluation only; train it with jaxrobust")
        return super().train(False)

    def forward(self, images):
        """Compute logits of images f[B,{channels},H,W] in [0, 1]."""
        if {bad}:
            raise ValueError(
                f"images have shape {{tuple(images.shape)}}; give [B,{channels},H,W]{words}"
            )
        return self._logits(images)
'''
HELPERS = {
    "layer_norm": '''

def layer_norm(x, scale, bias, eps):
    """Layer norm of the last axis."""
    return F.layer_norm(x, scale.shape, scale, bias, eps)
''',
    "conv": '''

def conv(x, kernel, **settings):
    """Convolution of [B, H, W, C] (or with one or three axes between) by a kernel [h, w, C, D]."""
    n = x.ndim
    run = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[n]
    kernel = kernel.permute(n - 1, n - 2, *range(n - 2))
    return run(x.movedim(-1, 1), kernel, **settings).movedim(1, -1)
''',
    "pool": '''

def pool(x, function, *settings, **options):
    """Pooling of [B, H, W, C]."""
    return function(x.movedim(3, 1), *settings, **options).movedim(1, 3)
''',
    "scan": '''

def scan(step, constants, carry, slices, length, reverse):
    """Call `step` on each slice; return the last `carry` and the other outputs, stacked."""
    outs = []
    for i in reversed(range(length)) if reverse else range(length):
        out = step(*constants, *carry, *(x[i] for x in slices))
        out = out if isinstance(out, tuple) else (out,)
        carry = out[: len(carry)]
        outs.append(out[len(carry) :])
    outs = outs[::-1] if reverse else outs
    return (*carry, *(torch.stack(parts) for parts in zip(*outs)))
''',
    "fourier_features": '''

def fourier_features(height, width, like):
    """[height, width, 64]: sine and cosine of 16 frequencies of the row, then of the column."""
    waves = []
    for length in (height, width):
        at = torch.arange(1, length + 1, dtype=torch.float32, device=like.device)
        at = at / (at[-1] + 1e-6) * (2 * torch.pi)
        powers = torch.arange(0, 32, 2, dtype=torch.float64, device=like.device) / 32
        angles = (at[:, None] / (10000**powers).float()).double()
        waves.append(torch.stack([angles.sin(), angles.cos()], -1).reshape(length, 32))
    rows, columns = waves[0][:, None], waves[1][None]
    grid = (height, width, 32)
    return torch.cat([rows.expand(grid), columns.expand(grid)], -1).float().to(like.dtype)
''',
}
RESERVED = {*HELPERS, "load", "network", "torch", "images"}
