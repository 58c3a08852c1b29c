"""What a module asks its own numbers, and PyTorch, in a forward pass.

`torch.export` traces a module without numbers, so that a question to one (`if (std == 0).any()`,
`scale.item()`) has no answer, although it may be the same for all images. A pass on real numbers
goes before it: there, each question is noted with its answer, and whether what is asked depends on
the images; while the module is written down, those that do not are answered."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxrobust.pytorch.reading import custom_gradients
from jaxrobust.pytorch.reading.custom_gradients import Refused
from jaxrobust.pytorch.reading.drawing import is_draw
from jaxrobust.pytorch.reading.refusals import own_line

_QUESTIONS = {
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
    *("item", "tolist", "numpy", "__array__", "equal", "allclose", "is_nonzero"),
}


class Answer(NamedTuple):
    """What a tensor was asked, and what it said."""

    question: str
    fixed: bool  # neither an image nor a draw has changed it
    answer: Any


class Watched(NamedTuple):
    """What was seen in a pass."""

    answers: list[Answer]
    functions: list[str]  # names of all `torch.autograd.Function`s that were called


def check_hooks(module: Any) -> None:
    """Raise `Refused` for hooks that change gradients, which nothing writes down."""
    import torch

    everywhere = vars(torch.nn.modules.module)
    for name in ("_global_backward_hooks", "_global_backward_pre_hooks"):
        if everywhere.get(name):
            _refuse("torch.nn.modules.module", "of all modules", everywhere[name])
    for name, part in module.named_modules():
        for kind in ("_backward_hooks", "_backward_pre_hooks"):
            if hooks := getattr(part, kind, None):
                _refuse(name or "it", "of its gradients", hooks)


def _refuse(name: str, whose: str, hooks: Any) -> None:
    hook = next(iter(hooks.values()))
    code = getattr(hook, "__code__", None)
    where = f" at {code.co_filename}, line {code.co_firstlineno}" if code else ""
    raise Refused(
        f"{name} has a hook {whose} ({getattr(hook, '__qualname__', type(hook).__name__)}{where}), "
        f"which may change them, and no export writes it down; {_INSTEAD}"
    )


_INSTEAD = (
    "remove it (handle.remove()), or write what it does as the backward pass of a "
    "torch.autograd.Function"
)


def watched(module: Any, images: Any) -> Watched:
    """Record the questions and the calls of a module on some images; it is run twice.

    The first pass is for those that change their weights in it, which is not written down:
    RobustBench's Pang2020Boosting normalises those of its last map.
    """
    seen = Watched([], [])
    images = images.clone().requires_grad_()
    with _around(module, lambda given: _noting([], given)):
        module(images.clone())
    with _calls_noted(seen.functions), _around(module, lambda given: _noting(seen.answers, given)):
        module(images.clone())
    return seen


@contextlib.contextmanager
def answering(module: Any, seen: Watched) -> Iterator[None]:
    """Let a module's forward pass, while it is traced, know what it has asked before."""

    def inside(given: Any) -> Any:
        stack = contextlib.ExitStack()
        stack.enter_context(custom_gradients.written_down())
        stack.enter_context(_answering(seen.answers))
        return stack

    with _around(module, inside):
        yield


@contextlib.contextmanager
def _around(module: Any, context: Callable[[Any], Any]) -> Iterator[None]:
    forward, own = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def within(*args: Any, **kwargs: Any) -> Any:
        with context((args, kwargs)):
            return forward(*args, **kwargs)

    module.forward = within
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


@contextlib.contextmanager
def _calls_noted(names: list[str]) -> Iterator[None]:
    import torch

    base = torch.autograd.Function
    there = vars(base)["apply"]  # a class method of Python's, from PyTorch 2.14 on one of C

    def noted(cls: Any, *operands: Any, **named: Any) -> Any:
        names.append(cls.__qualname__)
        return there.__get__(None, cls)(*operands, **named)

    base.apply = classmethod(noted)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        base.apply = there  # type: ignore[method-assign]


def _tensors(*values: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class _Moved:
    """What depends on the images: all tensors that share memory with what does."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}  # held, so that no other tensor takes its place

    def _storage(self, tensor: Any) -> tuple[int, Any]:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # it has none
            return id(tensor), tensor
        return storage._cdata, storage

    def add(self, *values: Any) -> None:
        self._held.update(map(self._storage, _tensors(*values)))

    def any(self, *values: Any) -> bool:
        return any(self._storage(tensor)[0] in self._held for tensor in _tensors(*values))


def _noting(answers: list[Answer], given: Any) -> Any:
    from torch.overrides import TorchFunctionMode

    answers.clear()
    moved = _Moved()
    moved.add(given)

    class Noting(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs, name = kwargs or {}, getattr(func, "__name__", "")
            # What is drawn is no answer for all passes, though no image changes it.
            moves = moved.any(args, kwargs) or is_draw(name)
            if name == "register_hook" and moves:
                raise Refused(f"{_caller()}a tensor gets a hook of its gradient; {_INSTEAD}")
            result = func(*args, **kwargs)
            if name in _QUESTIONS:
                answers.append(Answer(name, not moves, copy.copy(result)))
            if moves:
                in_place = name.endswith("_")
                moved.add(result, args[:1] if in_place else (), kwargs.get("out"))
            return result

    return Noting()


def _answering(answers: list[Answer]) -> Any:
    from torch.overrides import TorchFunctionMode

    left = iter(answers)

    class Answering(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if (name := getattr(func, "__name__", "")) in _QUESTIONS:
                known = next(left, None)
                if known and known.fixed and known.question == name:
                    return copy.copy(known.answer)
            return func(*args, **(kwargs or {}))

    return Answering()


def _caller() -> str:
    import traceback

    where = own_line("".join(traceback.format_stack()))
    return f"{where}: " if where else ""
