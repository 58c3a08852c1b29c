"""Plain numbers that a module reads from weights that training changes.

A program freezes plain numbers and branches as they were at export. So a few passes on real
numbers precede the export. They record which tensors are read as numbers, at which line, and what
the passes themselves change."""

import contextlib
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrobust.pytorch.reading import refusals
from jaxrobust.pytorch.reading.custom_gradients import Refused
from jaxrobust.pytorch.reading.data_dependence import storage, tensors
from jaxrobust.pytorch.reading.wrappers import quietly

_MODES = (True, True, False, True, False)  # of the passes: in training mode?
# These read numbers without an operator; all others call one that PyTorch tags.
_UNTAGGED = {"tolist", "numpy", "__array__", "__dlpack__", "storage", "untyped_storage"}
_PRINTED = {"__repr__", "__format__"}
_OF_SHAPES = ("new_", "zeros_like", "ones_like", "empty_like", "full_like")
_IMAGES = ""  # the origin of values that depend on images or random draws
_DEPTH, _LONG = 4, 1000  # limits for a module's Python values: levels, and entries of a list


def check(module: Any, image: tuple[int, int, int]) -> None:
    """Refuse a module whose program would freeze a number that training changes.

    Raises:
      Refused: it reads a trained parameter or a changing buffer as a number, changes a parameter
        in its forward pass, counts its passes in an attribute, or reads a tensor from an earlier
        pass. The message names the line. Modules that do not run at all are left to the export.
    """
    import torch

    if isinstance(module, torch.jit.ScriptModule):
        return  # every number is a step of its program
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    noted = _Noted({**parameters, **buffers})
    attributes = []
    for train in _MODES:
        module.train(train)
        images = refusals.example(module, image, 2).requires_grad_()
        try:
            with quietly(), torch.enable_grad(), noted.passing(images):
                module(images.clone())
        except Exception:
            return
        attributes.append(_attributes(module))
        noted.remember(module)
        now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name in now.keys() & noted.storages.keys():
            if storage(now[name])[0] != noted.storages[name][0]:
                noted.written[-1].setdefault(name, "")  # other memory took its place
    written = noted.written
    moved = {name for of_pass in written for name in of_pass}
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    _check_reads(noted.reads, parameters.keys(), trained, moved, written)
    for name, (line, origins) in noted.stale.items():
        if origins & (trained | moved | {_IMAGES}):
            raise Refused(
                f"{line or 'it'} reads its tensor `{name}` from an earlier pass, but an "
                "exported program would keep its current values; compute it in every pass, or "
                "only in evaluation mode and clear it in train()"
            )
    if changed := sorted(moved & parameters.keys()):
        line = next(of_pass[changed[0]] for of_pass in written if changed[0] in of_pass)
        raise Refused(
            f"{line or 'its forward pass'} changes parameter `{changed[0]}`, which only the "
            "optimizer may change; if only the first pass does so, call the module on a batch of "
            "images once before you return it, else compute the changed tensor from the parameter"
        )
    first, second = attributes[:2]
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name):
            raise Refused(
                f"its attribute `{name}` changes in a training pass ({first.get(name)} before, "
                f"{second.get(name)} after), but an exported program would keep its current value; "
                "move it out of the forward pass"
            )


def _check_reads(
    reads: Collection[tuple[str, frozenset[str]]],
    parameters: Collection[str],
    trained: set[str],
    moved: set[str],
    written: Sequence[Mapping[str, str]],
) -> None:
    for line, origins in reads:
        changing = sorted(origins & (trained | moved))
        if not changing or _IMAGES in origins:
            continue
        name = next((name for name in changing if name in trained), changing[0])
        kind = "parameter" if name in parameters else "buffer"
        remedy = "compute with the tensor (torch.where for a branch)"
        if name in trained:
            remedy += ", or freeze it with requires_grad_(False)"
        if name in written[0] and name not in written[1]:
            remedy = (
                "if only the first pass changes it, call the module on a batch of images once "
                "before you return it"
            )
        raise Refused(
            f"{line or 'it'} reads a value of {kind} `{name}`, which training changes, but an "
            f"exported program would keep its current value; {remedy}"
        )


def check_memory(exported: Any, moved: Collection[str]) -> None:
    """Refuse a program's tensor that shares memory with a tensor that training changes.

    Args:
      exported: PyTorch's program before decomposition.
      moved: names of buffers that change, in addition to parameters that require gradients.
    """
    all_tensors = {**exported.state_dict, **exported.constants}
    changing: dict[int, list[tuple[str, Any]]] = {}
    for name, tensor in all_tensors.items():
        if tensor.requires_grad or name in moved:
            changing.setdefault(storage(tensor)[0], []).append((name, tensor))
    for name, tensor in all_tensors.items():
        for other, changed in changing.get(storage(tensor)[0], []):
            if tensor is changed:
                continue
            ends = [(x.data_ptr(), x.numel() * x.element_size()) for x in (tensor, changed)]
            if max(start for start, _ in ends) < min(start + size for start, size in ends):
                raise Refused(
                    f"its tensor `{name}` shares memory with `{other}`, which training changes, "
                    f"but an exported program would keep its current values; use `{other}` itself, "
                    "or a copy (clone()) if you mean the initial values"
                )


def one_name(program: Any) -> Any:
    """Give a single name to a buffer with several; PyTorch cannot export it if it changes."""
    import torch

    first: dict[int, Any] = {}
    all_tensors = {**program.state_dict, **program.constants}
    places = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    copies = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind != torch.export.graph_signature.InputKind.BUFFER:
            continue
        tensor, node = all_tensors[spec.target], places[spec.arg.name]
        if (first_node := first.setdefault(id(tensor), node)) is not node:
            node.replace_all_uses_with(first_node)
            copies[spec.target] = tensor.clone()  # nothing reads it any more
    program._state_dict = {k: copies.get(k, t) for k, t in program.state_dict.items()}
    program._constants = {k: copies.get(k, t) for k, t in program.constants.items()}
    program.graph_module.recompile()
    return program


def _attributes(module: Any) -> dict[str, str]:
    """Return a module's plain values, as text, by their position in it."""
    import torch

    inherited = vars(torch.nn.Module())
    visited: set[int] = set()
    return {
        place: text
        for name, part in module.named_modules()
        for key, value in list(vars(part).items())
        if key not in inherited
        for place, text in _plain(f"{name}.{key}".lstrip("."), value, _DEPTH, visited)
    }


def _plain(place: str, value: Any, depth: int, visited: set[int]) -> Iterator[tuple[str, str]]:
    if isinstance(value, bool | int | float | complex | str | np.generic):
        yield place, repr(value)
        return
    if not depth or id(value) in visited:
        return
    visited.add(id(value))
    inside: dict[str, Any] = {}
    if isinstance(value, np.ndarray):
        yield place, repr(value)
    elif isinstance(value, Mapping):
        inside = {f"{place}[{key!r}]": part for key, part in value.items()}
    elif isinstance(value, list | tuple | set | frozenset):
        yield f"len({place})", str(len(value))
        inside = {f"{place}[{number}]": part for number, part in enumerate(value)}
    elif hasattr(value, "__dict__") and not _is_of_torch(value):
        inside = {f"{place}.{key}": part for key, part in vars(value).items()}
    for name, part in list(inside.items())[:_LONG]:
        yield from _plain(name, part, depth - 1, visited)


def _is_of_torch(value: Any) -> bool:
    import torch

    of_torch = type(value).__module__.split(".")[0] == "torch"
    return of_torch or isinstance(value, torch.Tensor | torch.nn.Module | type) or callable(value)


def _line() -> str:
    """Return the module's own line that is running."""
    stack = traceback.extract_stack()
    places = [(frame.filename, frame.name) for frame in stack]
    start = places.index((__file__, check.__name__))
    return refusals.own_line("".join(traceback.format_list(stack[start + 1 :])))


class _Noted:
    """Reads and writes during passes, by the names of the original tensors."""

    def __init__(self, named_tensors: Mapping[str, Any]) -> None:
        self.tensors = dict(named_tensors)
        self.reads: list[tuple[str, frozenset[str]]] = []  # lines, and the origins of the numbers
        self.written: list[dict[str, str]] = []  # in each pass: names, and lines
        self.stale: dict[str, tuple[str, frozenset[str]]] = {}  # attributes read: line, origins
        self.storages = {name: storage(tensor) for name, tensor in named_tensors.items()}
        self._names: dict[int, set[str]] = {}
        for name, (key, _) in self.storages.items():
            self._names.setdefault(key, set()).add(name)
        # Storages are held, so that no other tensor takes their place.
        self._origins: dict[int, tuple[frozenset[str], Any]] = {}
        self._remembered: dict[int, tuple[str, frozenset[str], Any]] = {}  # attributes after a pass
        self._printing = False

    def remember(self, module: Any) -> None:
        """Remember tensors that a pass left in attributes, because a later pass may read them."""
        for place, part in module.named_modules():
            for key, value in list(vars(part).items()):
                for tensor in () if key in ("_parameters", "_buffers") else tensors(value):
                    number, memory = storage(tensor)
                    origins = self._origins.get(number, (frozenset(), None))[0]
                    if origins and number not in self._names:
                        self._remembered[number] = f"{place}.{key}".lstrip("."), origins, memory

    @contextlib.contextmanager
    def passing(self, images: Any) -> Iterator[None]:
        """Record reads and writes inside, during a pass on images."""
        from torch.overrides import TorchFunctionMode
        from torch.utils._python_dispatch import TorchDispatchMode

        noted = self

        class Functions(TorchFunctionMode):  # type: ignore[misc]
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                name = getattr(func, "__name__", "")
                if name in _UNTAGGED:
                    noted.read(args[:1])
                noted._printing = name in _PRINTED
                try:
                    return func(*args, **(kwargs or {}))
                finally:
                    noted._printing = False

        class Operators(TorchDispatchMode):  # type: ignore[misc]
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                result = func(*args, **(kwargs or {}))
                noted.operator(func, args, kwargs or {}, result)
                return result

        self._origins.clear()
        self.written.append({})
        for name, tensor in self.tensors.items():
            self._add([tensor], frozenset([name]))
        self._add([images], frozenset([_IMAGES]))
        with Functions(), Operators():
            yield

    def read(self, values: Any) -> None:
        """Record that tensors are read as plain numbers."""
        origins = self._of(values)
        if origins and not self._printing:
            self.reads.append((_line(), origins))

    def operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record an operator's reads and writes, and what its result depends on."""
        import torch

        name = func._schema.name.removeprefix("aten::")
        origins = self._of((args, kwargs))
        for tensor in tensors(args, kwargs):
            attribute = self._remembered.get(storage(tensor)[0])
            if attribute and attribute[0] not in self.stale:
                self.stale[attribute[0]] = _line(), attribute[1]
        if refusals.is_draw(name):
            origins |= {_IMAGES}
        if torch.Tag.data_dependent_output in func.tags:
            self.read((args, kwargs))
        elif torch.Tag.dynamic_output_shape in func.tags:
            masks = [t for t in tensors(args[1:]) if t.dtype in (torch.bool, torch.uint8)]
            self.read(masks if name.startswith("index") else (args, kwargs))
        changed = [
            value
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in (args[place : place + 1] or [kwargs.get(argument.name)])
        ]
        if name == "native_batch_norm" and args[5]:  # whose schema does not say so
            changed += args[3:5]
        for tensor in tensors(changed):
            written = self.written[-1]
            for of_memory in self._names.get(storage(tensor)[0], set()) - written.keys():
                written[of_memory] = _line()
        if not name.startswith(_OF_SHAPES):
            self._add(tensors(result, changed), origins)

    def _add(self, values: Any, origins: frozenset[str]) -> None:
        for tensor in tensors(values):
            key, memory = storage(tensor)
            old_origins = self._origins.get(key, (frozenset(), None))[0]
            self._origins[key] = old_origins | origins, memory

    def _of(self, values: Any) -> frozenset[str]:
        origins = (self._origins.get(storage(tensor)[0]) for tensor in tensors(values))
        return frozenset().union(*(pair[0] for pair in origins if pair))
