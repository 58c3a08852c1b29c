"""Modules that draw random numbers: which operators do, and PyTorch's pass on JAX's draws."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_NAMES = re.compile(
    r"\b(rand|bernoulli|normal|multinomial|exponential|uniform|native_dropout|log_normal|cauchy"
    r"|geometric|poisson)"
)


def is_draw(operator: str) -> bool:
    """Tell whether an operator of PyTorch's draws random numbers, by its name."""
    return bool(_NAMES.search(operator))


def draws(node: Any, operator: str) -> bool:
    """Tell whether a node draws random numbers; RReLU does so in training only."""
    return is_draw(operator) or ("rrelu" in operator and node.args[4:5] == (True,))


def drops(node: Any) -> bool:
    """Tell whether a node is attention with dropout, which its row leaves out."""
    if node.op != "call_function" or "scaled_dot_product_attention" not in str(node.target):
        return False
    return node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0) != 0


def refusal(line: str, operator: str) -> str:
    """Explain why a module that draws is refused, and what to do."""
    return (
        f"{line}: {operator} draws random numbers in eval mode, and attacks on what is never the "
        "same twice say little; make it a function of the images, or, where a randomised defence "
        "is meant, give --version=rand (in a program: from_module(..., random=True)), which makes "
        "the draws a function of a key"
    )


@contextlib.contextmanager
def injected(drawn: Sequence[np.ndarray]) -> Iterator[None]:
    """Let PyTorch draw these, in their order; `ValueError` if it draws others, more or fewer."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    left = list(drawn)

    class Drawing(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            value = func(*args, **(kwargs or {}))
            if not is_draw(str(func)):
                return value
            if not left or tuple(left[0].shape) != tuple(value.shape):
                raise ValueError(
                    f"PyTorch's module draws {tuple(value.shape)} ({func}) where its program draws "
                    f"{tuple(left[0].shape) if left else 'nothing more'}; draw the same numbers in "
                    "each pass"
                )
            return value.copy_(torch.from_numpy(np.array(left.pop(0))))

    with Drawing():
        yield
    if left:
        raise ValueError(
            f"PyTorch's module draws {len(drawn) - len(left)} times and its program "
            f"{len(drawn)} times; draw the same numbers in each pass"
        )
