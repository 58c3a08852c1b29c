"""Many small computations of PyTorch's next to ours, by one export and one compilation."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxrobust.pytorch import program as programs
from jaxrobust.pytorch.operators import TABLE
from jaxrobust.pytorch.reading import exporting, steps
from jaxrobust.pytorch.reading.wrappers import quietly
from tests.support import torch_operators
from tests.support.torch_operators import CHANNELS, SIDE
from tests.support.torch_side import as_evaluated, cotangent

BATCH = 3


class Outcome(NamedTuple):
    """How far one computation is from PyTorch's, of its largest number."""

    values: float
    gradients: float
    operators: frozenset[str]  # of the program that it was part of
    ties: tuple[str, ...]  # of which kinds of tied images values or gradients are others


class Beside(torch.nn.Module):
    """Several computations, each of images of its own, which lie next to each other as channels."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.parts = torch.nn.ModuleList(map(torch_operators.module, names))

    def forward(self, x):
        images = x.split(CHANNELS, 1)
        return tuple(part(image) for part, image in zip(self.parts, images, strict=True))


def images(names: Sequence[str]) -> np.ndarray:
    """Return f64[B,H,W,C] for each of them, with channels next to each other."""
    x = np.random.default_rng(0).random((BATCH, SIDE, SIDE, CHANNELS))
    parts = [torch_operators.prepared(name, x) for name in names]
    return np.concatenate(parts, -1)


@functools.cache
def _exported(names: tuple[str, ...], dynamic: bool, dtype: str) -> Any:
    """Return several computations in PyTorch's core operators."""
    net = Beside(names).to(getattr(torch, dtype))
    sizes = ({0: torch.export.Dim("batch")},) if dynamic else None
    example = _channels_first(images(names).astype(dtype))
    with quietly():  # an LSTM lists its weights anew, and logs cost a third of the time
        exported = torch.export.export(net, (example,), dynamic_shapes=sizes, strict=False)
    return exporting.decomposed(exported)


def together(
    names: Sequence[str], *, dynamic: bool = False, dtype: str = "float64"
) -> dict[str, Outcome]:
    """Return how far each is from PyTorch's in the same type, by one program for all.

    Args:
      names: of `torch_operators`.
      dynamic: the program takes any number of images, as those of users do; it is dearer to write.
      dtype: that of weights and images.
    """
    return _begun(names, lambda compiled: compiled, dynamic=dynamic, dtype=dtype)()


def _begun(
    names: Sequence[str],
    compiling: Callable[[Callable[[], Any]], Callable[[], Any]],
    *,
    dynamic: bool = False,
    dtype: str = "float64",
) -> Callable[[], dict[str, Outcome]]:
    """Return what gives the outcomes; `compiling` may compile meanwhile, for it takes and returns
    what gives the compiled program.
    """
    net = Beside(names).to(getattr(torch, dtype))
    x = images(names).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        program, weights = steps.read(_exported(tuple(names), dynamic, dtype))
        given = weights, jnp.asarray(x)
        compiled = compiling(_values_and_gradient(program).lower(*given).compile)
    used = frozenset(step.operator for step in program.steps)

    def both(x: np.ndarray) -> Any:
        """Yield the values and the gradients of each, ours and theirs."""
        theirs = _theirs(net, _channels_first(x))
        with jax.enable_x64(dtype == "float64"):
            ours = jax.device_get(compiled()(weights, jnp.asarray(x)))
        parts = [np.split(gradient, len(names), -1) for _, gradient in (ours, theirs)]
        return zip(zip(ours[0], theirs[0], strict=True), zip(*parts, strict=True), strict=True)

    def outcomes() -> dict[str, Outcome]:
        off: dict[str, list[str]] = {name: [] for name in names}
        for kind, tied in _tied(names).items():
            for name, (values, gradients) in zip(names, both(tied.astype(dtype)), strict=True):
                if not (_equal(*values, dtype) and _equal(*gradients, dtype)):
                    off[name].append(kind)
        return {
            name: Outcome(_apart(*values), _apart(*gradients), used, tuple(off[name]))
            for name, (values, gradients) in zip(names, both(x), strict=True)
        }

    return outcomes


def _tied(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return tied images f64[B,H,W,C] by their kind, for each of the names next to each other."""
    each = [torch_operators.tied(name, (BATCH, SIDE, SIDE, CHANNELS)) for name in names]
    kinds = dict.fromkeys(kind for images in each for kind in images)
    return {
        kind: np.concatenate([images.get(kind, images["zeros"]) for images in each], -1)
        for kind in kinds
    }


def _equal(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> bool:
    """Tell whether numbers are PyTorch's, infinities and NaNs too."""
    if ours.shape != theirs.shape:
        return False
    finite = np.abs(theirs[np.isfinite(theirs)])
    bar = (1e-9 if dtype == "float64" else 1e-4) * max(1.0, float(finite.max(initial=0)))
    with np.errstate(invalid="ignore"):
        return bool(np.isclose(ours, theirs, rtol=0, atol=bar, equal_nan=True).all())


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _values_and_gradient(program: Any) -> Any:
    names = [str(name) for name in program.results.values()]

    def function(weights: Any, x: Any) -> Any:
        values = programs.run(program, TABLE, weights, x)
        return [programs.plain(values[name]) for name in names]

    @as_evaluated
    def both(weights: Any, x: Any) -> Any:
        found, back = jax.vjp(lambda x: function(weights, x), x)
        return found, back([jnp.asarray(cotangent(value), value.dtype) for value in found])[0]

    return both


def _theirs(net: Any, example: Any) -> tuple[list[np.ndarray], np.ndarray]:
    x = example.clone().requires_grad_()
    found = net(x.clone())  # which a part may change in place
    weights = [torch.from_numpy(cotangent(value)).to(value) for value in found]
    (gradient,) = torch.autograd.grad(found, x, weights)
    return [value.detach().numpy() for value in found], gradient.numpy().transpose(0, 2, 3, 1)


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return |difference| / max|theirs|, which is infinite for other shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):  # of infinities, which tied images compare
        return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def each(names: Sequence[str], **how: Any) -> dict[str, Outcome | Exception]:
    """Return the same, and what was raised for those that cannot be computed at all."""
    try:
        return {**together(names, **how)}
    except Exception as error:
        if len(names) == 1:
            return {names[0]: error}
        half = len(names) // 2
        return each(names[:half], **how) | each(names[half:], **how)


def in_turn(groups: Sequence[Sequence[str]], **how: Any) -> list[dict[str, Outcome | Exception]]:
    """Return `each` of several groups, of which one compiles while the next one is exported: XLA
    works without Python's lock, and of a group both take about as long.
    """
    begun: list[Callable[[], dict[str, Outcome]] | None] = []
    with ThreadPoolExecutor(1, "compiling") as worker:
        for names in groups:
            try:
                begun.append(_begun(names, lambda compiled: worker.submit(compiled).result, **how))
            except Exception:
                begun.append(None)  # one of them cannot be computed at all: by halves, below
    found: list[dict[str, Outcome | Exception]] = []
    for names, outcomes in zip(groups, begun, strict=True):
        try:
            found.append({**outcomes()} if outcomes else each(names, **how))
        except Exception:
            found.append(each(names, **how))
    return found
