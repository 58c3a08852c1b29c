"""Explains to the author why a PyTorch module is refused, and what to do."""

import contextlib
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxrobust.pytorch.reading import wrappers

_DRAWS = re.compile(
    r"\b(rand|bernoulli|normal|multinomial|exponential|uniform|native_dropout|log_normal|cauchy"
    r"|geometric|poisson)"
)
SIDES = (28, 32, 64, 96, 128, 160, 192, 224, 256, 299, 384)  # common image sizes of networks
_SIZED = ("nonzero", "_unique", "unique_", "repeat_interleave", "masked_select")
_SIZES = ("ge", "le", "eq", "ne", "lt", "gt", "sym_max", "sym_min", "sym_sum", "sym_float")
_QUANTISED = ("quantized", "quantize_per", "quantize_affine", "dequantize", "int_repr", "_packed")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')  # of a stack trace


def line(node: Any) -> str:
    """Return the source line behind a node: FILE, line N (CODE)."""
    return own_line(node.meta.get("stack_trace") or "") or node.name


def own_line(text: str) -> str:
    """Return the innermost line of a stack trace outside PyTorch."""
    import torch

    folders = str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "torch/", "<"
    lines = text.splitlines()
    frames = [(i, match) for i, row in enumerate(lines) if (match := _FRAME.search(row))]
    frames = [(i, match) for i, match in frames if not match[1].startswith(folders)]
    if not frames:
        return ""
    place, match = frames[-1]
    code = lines[place + 1].strip() if place + 1 < len(lines) else ""
    return f"{match[1]}, line {match[2]}" + (f" ({code})" if code else "")


def check(module: Any) -> None:
    """Raise `ValueError` if a module's weights are quantized, before any other check."""
    for name, part in module.named_modules():
        if "quantized" in type(part).__module__.split("."):
            raise ValueError(
                f"{name or 'it'} is {type(part).__module__}.{type(part).__name__}: its weights are "
                "quantized, and integer kernels have no gradient; give the float module that it "
                "was made from"
            )


def is_draw(operator: str) -> bool:
    """Tell from its name whether a PyTorch operator draws random numbers."""
    return bool(_DRAWS.search(operator))


def draws(line: str, operator: str) -> str:
    """Explain why a module with random draws is refused, and what to do."""
    return (
        f"{line}: {operator} draws random numbers in eval mode, so attacks on it prove little; use "
        "a function of the images only. If it is a randomized defense, give --version=rand (in "
        "Python: from_module(..., random=True)), which makes the draws a function of a key"
    )


def no_row(line: str, name: str) -> str:
    """Explain why an operator is not supported; `line` is a line of the module."""
    word = name.removeprefix("aten.")
    stem = word.partition(".")[0]
    unknown_size = "sizes that depend on the images cannot be compiled"
    if word.startswith("bincount"):
        reason = (
            f"bincount returns as many counts as its largest number requires, and {unknown_size}; "
            "fix the size with torch.histc or torch.zeros(n).scatter_add(0, numbers, ones)"
        )
    elif word.startswith(_SIZED):
        reason = (
            f"how many values {stem} returns depends on the images, and {unknown_size}; fix the "
            "size with torch.where or a sum"
        )
    elif word in _SIZES or stem in ("_local_scalar_dense", "item"):
        reason = (
            f"a number or a size is read from tensor values there, and {unknown_size}; compute "
            "with tensors of fixed sizes"
        )
    elif any(part in name for part in _QUANTISED):
        reason = f"{name} has quantized weights; give the float module"
    elif word in ("cond", "while_loop", "scan", "map_impl"):
        reason = (
            f"torch.{word} chooses a function depending on the images; compute both "
            "and choose with torch.where"
        )
    else:
        reason = (
            f"the PyTorch operator {name} is not supported; use other operators, or add a row "
            "for it to jaxrobust/pytorch/operators"
        )
    return f"{line}: {reason}"


def is_for_checks(node: Any, checks: tuple[str, ...]) -> bool:
    """Tell whether a node compares sizes and only `checks` (parts of names) read the result."""
    return getattr(node.target, "__name__", "") in _SIZES and all(
        any(part in str(user.target) for part in checks) for user in node.users
    )


def example(module: Any, image: tuple[int, int, int], count: int) -> Any:
    """Return blank images H, W, C in the type of a module's weights."""
    import torch

    floating = [p.dtype for p in module.parameters() if p.is_floating_point()]
    height, width, channels = image
    dtype = floating[0] if floating else torch.float32
    return torch.zeros(count, channels, height, width, dtype=dtype)


def check_takes(module: Any, image: tuple[int, int, int]) -> None:
    """Refuse a module that does not take images H, W, C, or computes in lower precision."""
    import torch

    types: list[str] = []
    enter = torch.autocast.__enter__

    def entered(self: Any) -> Any:
        if self.device == "cpu" and self._enabled:
            types.append(str(self.fast_dtype).removeprefix("torch."))
        return enter(self)

    torch.autocast.__enter__ = entered  # type: ignore[method-assign]
    try:
        problems = [_problem(module, example(module, image, count)) for count in (2, 1)]
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
    if types:
        raise ValueError(
            f"torch.autocast inside it computes in {types[0]}, but verdicts are in float32; "
            "remove it, or set enabled=False"
        )
    if all(problems):
        raise ValueError(problems[0])


def _problem(module: Any, images: Any) -> str | None:
    """Explain why a module refuses images of a shape, and which it takes; None: it takes them."""
    import torch

    inside: list[tuple[str, Any]] = []
    names = {part: name or "it" for name, part in module.named_modules()}
    hooked = [part for part in names if not isinstance(part, torch.jit.ScriptModule)]

    def enter(part: Any, inputs: Any) -> None:
        inside.append((names.get(part, "it"), part))

    def leave(part: Any, inputs: Any, outputs: Any) -> None:
        inside.pop()

    hooks = [part.register_forward_pre_hook(enter) for part in hooked]
    hooks += [part.register_forward_hook(leave) for part in hooked]
    try:
        with torch.no_grad():
            module(images)
        return None
    except RuntimeError as error:
        message = str(error).strip().partition("\n")[0]
        if not any(word in message for word in ("shape", "size", "channels", "dimension")):
            return None
        name, part = inside[-1] if inside else ("it", module)
    finally:
        for hook in hooks:
            hook.remove()
    shape = "[B," + ",".join(map(str, images.shape[1:])) + "]"
    layer = " ".join(str(part).split())
    where = f"its {name}, {layer[:120]}, fails" if part is not module else "it fails"
    taken = _taken(module, images)
    return f"the images are {shape}, but {where} on them; " + (
        f"the module accepts {taken}"
        if taken
        else f"PyTorch reports: {message}; give another image shape, or check that its layers fit"
    )


def _taken(module: Any, images: Any) -> str | None:
    import torch

    channels, height, width = images.shape[1:]
    first = (height, width, channels)  # of NumPy images with their channels first
    sizes = itertools.product(dict.fromkeys([channels, 3, 1]), (height, *SIDES))
    for shape in [first, *((count, side, side) for count, side in sizes)]:
        with contextlib.suppress(Exception), torch.no_grad():
            module(torch.zeros(1, *shape, dtype=images.dtype))
            remedy = f"; give image_size={shape[1]}" if shape[0] == channels else ""
            if shape == first:
                remedy = "; pass NumPy images as [B,H,W,C]: images.transpose(0, 2, 3, 1)"
            return f"[B,{','.join(map(str, shape))}]{remedy}"
    return None


@wrappers.uncompiled()
def without_gradient(module: Any, images: Any, following: Sequence[str]) -> str:
    """Warn about logits without a gradient; `ValueError` if the attacks `following` need one."""
    import torch

    for row in torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).split(1):
        x = row.clone().requires_grad_()
        for result in _tensors(module(x.clone())):
            weights = torch.cos(torch.arange(result.numel())).reshape(result.shape)
            if gradient(result, x, weights.to(result), module).any():
                return ""
    problem = (
        "no gradient reaches the images (rounding, a comparison, argmax, detach or NumPy lies "
        "between them and the logits)"
    )
    if following:
        raise ValueError(
            f"{problem}, so {', '.join(following)} would find nothing and the network would look "
            "robust; make the step straight-through (x + (step(x) - x).detach()), or give "
            "--attack=square, which needs no gradient"
        )
    return f"{problem}; only gradient-free attacks are meaningful here"


def gradient(logits: Any, x: Any, cotangent: Any, again: Callable[[Any], Any]) -> Any:
    """Compute PyTorch's gradient in `x`; if it fails, `again` finds the module's line."""
    import torch

    if not logits.requires_grad:
        return torch.zeros_like(x)
    try:
        (grad,) = torch.autograd.grad(logits, x, cotangent, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        where = _line_without_gradient(again, x)
        raise ValueError(
            f"{where + ': ' if where else ''}PyTorch itself cannot differentiate the module: "
            + (
                "a value that the backward pass of this line reads is changed in place later; use "
                "y = 2 * y instead of y.mul_(2), or change y.clone()"
                if "modified by an inplace operation" in text
                else f"{text[:200]}; use operators that have a gradient, or .detach() values "
                "that need none"
            )
        ) from error
    return torch.zeros_like(x) if grad is None else grad


def _line_without_gradient(again: Callable[[Any], Any], x: Any) -> str:
    """Return the module's line whose backward pass fails, or "" if PyTorch does not know it."""
    import torch

    x = x.detach().clone().requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(Exception), torch.autograd.detect_anomaly(check_nan=False):
            sums = [result.sum() for result in _tensors(again(x.clone()))]
            torch.autograd.grad(sum(sums), x)
    return next(filter(None, (own_line(str(warning.message)) for warning in caught)), "")


def _tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return []
    return [value] if value.is_floating_point() else []
