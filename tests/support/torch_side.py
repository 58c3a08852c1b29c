"""A converted network next to PyTorch's own, in float64 and float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxrobust.models.kernels.cpu.rewriting import fast_formulas
from jaxrobust.pytorch.reading import exporting
from jaxrobust.pytorch.torch import Converted, of_exported
from jaxrobust.runtime.devices import cpus

EXACT = (1e-12, 1e-10)  # logits and gradients in float64, of the largest
FLOOR = 4 * 2**-23  # of logits in float32: PyTorch's own error is at times below one unit
Values = tuple[np.ndarray, np.ndarray]  # logits [B,K] and input gradient [B,H,W,C]


class Errors(NamedTuple):
    """How far results are from PyTorch's in float64."""

    logits: float  # ours in float64: largest difference, of the largest logit
    gradients: float  # ours in float64: largest difference, of the largest of all gradients
    # Ours and PyTorch's in float32: length of the difference, of the reference's length. The
    # largest error of few logits is luck: of images of one network, 0.7 to 2.5 times PyTorch's.
    logits32: tuple[float, float]


def converted(net: torch.nn.Module, image: tuple[int, int, int]) -> Converted:
    """Convert a network in float64 for images H, W, C."""
    floating = [array for array in net.parameters() if array.is_floating_point()]
    if floating:
        exported, single = exporting.exported(net, image)
    else:  # its images say that it is in float64
        example, single = torch.zeros(2, image[2], *image[:2], dtype=torch.float64), False
        sizes = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(net, (example,), dynamic_shapes=sizes, strict=False)
    with jax.enable_x64(True):
        return of_exported(exported, single=single)._replace(module=net)


def theirs(net: torch.nn.Module, images: np.ndarray, at_once: int | None = None) -> Values:
    """Return PyTorch's logits and input gradient, in the type of the images."""
    return _in_turns(lambda part: _theirs(net, part), images, at_once)


def _theirs(net: torch.nn.Module, images: np.ndarray) -> Values:
    x = _channels_first(images).requires_grad_()
    logits = net(x.clone())  # which a module may change in place
    (gradient,) = torch.autograd.grad(logits, x, torch.from_numpy(cotangent(logits)).to(logits))
    return logits.detach().numpy(), gradient.numpy().transpose(0, 2, 3, 1)


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def ours(network: jax.tree_util.Partial, images: np.ndarray, at_once: int | None = None) -> Values:
    """Return the same of a converted network.

    With its convolutions as the evaluator rewrites them, and compiled as there: XLA computes
    depthwise ones in float64 as dense ones, which of ConvNeXt-L takes more than 24 GB.
    """

    @as_evaluated
    def both(network: Any, images: Any) -> Any:
        logits, back = jax.vjp(fast_formulas(network), images)
        return logits, back(jnp.asarray(cotangent(logits), logits.dtype))[0]

    with jax.enable_x64(images.dtype == np.float64):
        network = _cast(network, images.dtype)
        return _in_turns(
            lambda part: jax.device_get(both(network, jnp.asarray(part))), images, at_once
        )


def as_evaluated(function: Any) -> Any:
    """Return a function compiled as the evaluator compiles networks."""
    return jax.jit(function, compiler_options=cpus.search_options(jax.default_backend()))


def _in_turns(
    values: Callable[[np.ndarray], Values], images: np.ndarray, at_once: int | None
) -> Values:
    size = at_once or len(images)
    parts = [values(images[i : i + size]) for i in range(0, len(images), size)]
    logits, gradients = (np.concatenate(part) for part in zip(*parts, strict=True))
    return logits, gradients


def _cast(network: Any, dtype: Any) -> Any:
    """Return a network's weights in the type of images; they come in float64."""
    if dtype == np.float64:
        return network

    def cast(weights: Any) -> Any:
        floating = jnp.issubdtype(weights.dtype, jnp.floating)
        return jnp.asarray(np.asarray(weights), dtype) if floating else weights

    return jax.tree.map(cast, network)


def cotangent(logits: Any) -> np.ndarray:
    """Return what the logits are weighted with: all of them differently."""
    return np.cos(np.arange(np.prod(logits.shape))).reshape(logits.shape)


def differences(network: Converted, images: np.ndarray) -> Values:
    """Per result |difference| / max|reference|, and the same of all gradients."""
    pairs = zip(ours(network.logits_fn, images), theirs(network.module, images), strict=True)
    logits, gradients = (np.abs(here - there) / np.abs(there).max() for here, there in pairs)
    return logits, gradients


def errors(net: torch.nn.Module, images: np.ndarray, at_once: int | None = None) -> Errors:
    """Return how well both sides of a network agree, which is taken apart: few hold its weights.

    Logits in float32 are of all images, and of 16 at least: PyTorch's products of matrices of fewer
    rows, such as a head's, round 0.4 to 0.5 times as much as those of any size that attacks have.
    The rest is of the first two. `at_once` is the number of images in a pass of float64, where
    memory holds no more; default: all.
    """
    assert len(images) >= 16
    single = images.astype(np.float32)
    wide = single.astype(np.float64)
    # Some normalize their weights in each pass, and keep what float32 rounds.
    state = {name: array.clone() for name, array in net.state_dict().items()}
    exact = theirs(net, wide[:2], at_once)
    reference = _their_logits(net, wide, at_once or len(wide))
    net.load_state_dict(state)
    rounded = _their_logits(net.float(), single, len(single))
    net.double().load_state_dict(state)
    del state
    network = converted(net, images.shape[1:]).logits_fn
    del net
    double = ours(network, wide[:2], at_once)
    here = _our_logits(network, single)
    return Errors(
        *(float(np.abs(o - e).max() / np.abs(e).max()) for o, e in zip(double, exact, strict=True)),
        (_length(here, reference), _length(rounded, reference)),
    )


@torch.no_grad()
def _their_logits(net: torch.nn.Module, images: np.ndarray, at_once: int) -> np.ndarray:
    parts = [images[i : i + at_once] for i in range(0, len(images), at_once)]
    return np.concatenate([net(_channels_first(part)).numpy() for part in parts])


def _our_logits(network: Any, images: np.ndarray) -> np.ndarray:
    @as_evaluated
    def logits(network: Any, images: Any) -> Any:
        return fast_formulas(network)(images)

    return jax.device_get(logits(_cast(network, images.dtype), images))


def check_errors(test: Any, found: Errors, bars: tuple[float, ...]) -> None:
    """Fail a test unless a network is PyTorch's; `bars` are those of logits and gradients.

    Gradients in float32 are not compared: where a unit of ReLU is at its kink, rounding sends it to
    either side, here or in PyTorch, and the gradient is another one by a thousandth.
    """
    test.assertLess(found.logits, bars[0])
    test.assertLess(found.gradients, bars[1])
    here, there = found.logits32
    test.assertLess(here, max(2 * there, FLOOR))


def _length(value: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(value - exact) / np.linalg.norm(exact))
