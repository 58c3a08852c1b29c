"""Questions that a module asks about its own numbers in a forward pass.

`torch.export` traces a module without numbers, so a question about one (`if (std == 0).any()`,
`scale.item()`) has no answer, even if the answer is the same for all images. So a pass on real
numbers comes first. It records each question, its answer, and whether it depends on the images.
During the export, questions that do not are answered."""

import contextlib
import copy
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxrobust.pytorch.reading import custom_gradients
from jaxrobust.pytorch.reading.custom_gradients import Refused
from jaxrobust.pytorch.reading.refusals import is_draw, own_line

_QUESTIONS = {
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
    *("item", "tolist", "numpy", "__array__", "equal", "allclose", "is_nonzero"),
}
_INSTEAD = (
    "remove it (handle.remove()), or write what it does as the backward pass of a "
    "torch.autograd.Function"
)


class Answer(NamedTuple):
    """A question about a tensor, and its answer."""

    question: str
    fixed: bool  # neither an image nor a draw has changed it
    answer: Any


class Watched(NamedTuple):
    """What happened in a pass."""

    answers: list[Answer]
    functions: list[str]  # names of all `torch.autograd.Function`s that were called


def check_hooks(module: Any) -> None:
    """Raise `Refused` for hooks that change gradients, because the export would lose them."""
    import torch

    hooked = [
        ("torch.nn.modules.module", "on all modules", vars(torch.nn.modules.module).get(name))
        for name in ("_global_backward_hooks", "_global_backward_pre_hooks")
    ]
    hooked += [
        (name or "it", "on its gradients", getattr(part, kind, None))
        for name, part in module.named_modules()
        for kind in ("_backward_hooks", "_backward_pre_hooks")
    ]
    for name, whose, hooks in hooked:
        if not hooks:
            continue
        hook = next(iter(hooks.values()))
        code = getattr(hook, "__code__", None)
        where = f" at {code.co_filename}, line {code.co_firstlineno}" if code else ""
        raise Refused(
            f"{name} has a hook {whose} ({getattr(hook, '__qualname__', type(hook).__name__)}"
            f"{where}), which may change gradients and is not exported; {_INSTEAD}"
        )


def watched(module: Any, images: Any) -> Watched:
    """Record the questions and the calls of a module on some images; it is run twice.

    The first pass is for modules that change their weights in it, which the export would miss:
    RobustBench's Pang2020Boosting normalizes the weights of its last layer.
    """
    import torch

    base, functions = torch.autograd.Function, []
    images = images.clone().requires_grad_()
    answers: list[Answer] = []
    with _around(module, lambda inputs: _noting(answers, inputs)):
        module(images.clone())
        apply = vars(base)["apply"]  # a class method of Python's, from PyTorch 2.14 on one of C

        def noted(cls: Any, *operands: Any, **keywords: Any) -> Any:
            functions.append(cls.__qualname__)
            return apply.__get__(None, cls)(*operands, **keywords)

        base.apply = classmethod(noted)  # type: ignore[assignment, method-assign]
        try:
            module(images.clone())
        finally:
            base.apply = apply  # type: ignore[method-assign]
    return Watched(answers, functions)


@contextlib.contextmanager
def answering(module: Any, watched: Watched) -> Iterator[None]:
    """Answer a module's recorded questions while its forward pass is traced."""

    @contextlib.contextmanager
    def inside(inputs: Any) -> Iterator[None]:
        with custom_gradients.written_down(), _answering(watched.answers):
            yield

    with _around(module, inside):
        yield


@contextlib.contextmanager
def _around(module: Any, context: Callable[[Any], Any]) -> Iterator[None]:
    forward, is_overridden = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def within(*args: Any, **kwargs: Any) -> Any:
        with context((args, kwargs)):
            return forward(*args, **kwargs)

    module.forward = within
    try:
        yield
    finally:
        if is_overridden:
            module.forward = forward
        else:
            del module.forward


def tensors(*values: Any) -> list[Any]:
    """Return the tensors among values."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage(tensor: Any) -> tuple[int, Any]:
    """Return a number for a tensor's memory, unique while the second result is alive."""
    try:
        memory = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # it has none
        return id(tensor), tensor
    return memory._cdata, memory


def _noting(answers: list[Answer], inputs: Any) -> Any:
    from torch.overrides import TorchFunctionMode

    answers.clear()
    moved = dict(map(storage, tensors(inputs)))  # memory that depends on the images

    class Noting(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs, name = kwargs or {}, getattr(func, "__name__", "")
            # A random draw is not an answer for all passes, although no image changes it.
            moves = is_draw(name) or any(storage(t)[0] in moved for t in tensors(args, kwargs))
            if name == "register_hook" and moves:
                where = own_line("".join(traceback.format_stack()))
                start = f"{where}: " if where else ""
                raise Refused(f"{start}a tensor gets a hook on its gradient; {_INSTEAD}")
            result = func(*args, **kwargs)
            if name in _QUESTIONS:
                answers.append(Answer(name, not moves, copy.copy(result)))
            if moves:
                in_place = args[:1] if name.endswith("_") else ()
                moved.update(map(storage, tensors(result, in_place, kwargs.get("out"))))
            return result

    return Noting()


def _answering(answers: list[Answer]) -> Any:
    from torch.overrides import TorchFunctionMode

    following = iter(answers)

    class Answering(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if (name := getattr(func, "__name__", "")) in _QUESTIONS:
                noted = next(following, None)
                if noted and noted.fixed and noted.question == name:
                    return copy.copy(noted.answer)
            return func(*args, **(kwargs or {}))

    return Answering()
