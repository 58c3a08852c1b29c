"""A converted network beside PyTorch's own, in float64 and float32."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxrobust.evaluation.convolutions import canonical_convolutions
from jaxrobust.evaluation.slots import COMPILER_OPTIONS
from jaxrobust.interop import exporting
from jaxrobust.interop.torch import Converted, of_exported

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
    gradients32: tuple[float, float]


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
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    logits = net(x.clone())  # which a module may change in place
    (gradient,) = torch.autograd.grad(logits, x, torch.from_numpy(_cotangent(logits)).to(logits))
    return logits.detach().numpy(), gradient.numpy().transpose(0, 2, 3, 1)


def ours(network: jax.tree_util.Partial, images: np.ndarray, at_once: int | None = None) -> Values:
    """Return the same of a converted network, in the type of the images.

    With its convolutions as the evaluator rewrites them, and compiled as there: XLA computes
    depthwise ones in float64 as dense ones, which of ConvNeXt-L takes more than 24 GB.
    """

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))
    def both(network: Any, images: Any) -> Any:
        logits, back = jax.vjp(canonical_convolutions(network), images)
        return logits, back(jnp.asarray(_cotangent(logits), logits.dtype))[0]

    with jax.enable_x64(images.dtype == np.float64):
        if images.dtype != np.float64:
            network = jax.tree.map(lambda weights: _cast(weights, images.dtype), network)
        return _in_turns(
            lambda part: jax.device_get(both(network, jnp.asarray(part))), images, at_once
        )


def _in_turns(
    values: Callable[[np.ndarray], Values], images: np.ndarray, at_once: int | None
) -> Values:
    size = at_once or len(images)
    parts = [values(images[i : i + size]) for i in range(0, len(images), size)]
    logits, gradients = (np.concatenate(part) for part in zip(*parts, strict=True))
    return logits, gradients


def _cast(weights: Any, dtype: Any) -> Any:
    floating = jnp.issubdtype(weights.dtype, jnp.floating)
    return jnp.asarray(np.asarray(weights), dtype) if floating else weights


def _cotangent(logits: Any) -> np.ndarray:
    """Return what the logits are weighted with: all of them differently."""
    return np.cos(np.arange(np.prod(logits.shape))).reshape(logits.shape)


def differences(network: Converted, images: np.ndarray) -> Values:
    """Per result |difference| / max|reference|, and the same of all gradients."""
    pairs = zip(ours(network.logits_fn, images), theirs(network.module, images), strict=True)
    logits, gradients = (np.abs(here - there) / np.abs(there).max() for here, there in pairs)
    return logits, gradients


def errors(net: torch.nn.Module, images: np.ndarray, at_once: int | None = None) -> Errors:
    """Return how well both sides of a network agree, which is taken apart: few hold its weights.

    `at_once` is the number of images in a pass, where memory holds no more; default: all.
    """
    single = images.astype(np.float32)
    # Some normalise their weights in each pass, and keep what float32 rounds.
    state = {name: array.clone() for name, array in net.state_dict().items()}
    exact = theirs(net, single.astype(np.float64), at_once)
    net.load_state_dict(state)
    rounded = theirs(net.float(), single, at_once)
    net.double().load_state_dict(state)
    del state
    network = converted(net, images.shape[1:]).logits_fn
    del net
    double, here = (ours(network, single.astype(t), at_once) for t in (np.float64, np.float32))
    return Errors(
        *(float(np.abs(o - e).max() / np.abs(e).max()) for o, e in zip(double, exact, strict=True)),
        *((_length(o, e), _length(t, e)) for o, t, e in zip(here, rounded, exact, strict=True)),
    )


def check_errors(test: Any, found: Errors, bars: tuple[float, ...]) -> None:
    """Fail a test unless a network is PyTorch's; `bars` are those of logits and gradients.

    Gradients in float32 have no bar: where a unit of ReLU is at its kink, rounding sends it to
    either side, here or in PyTorch, and the gradient is another one by a thousandth.
    """
    test.assertLess(found.logits, bars[0])
    test.assertLess(found.gradients, bars[1])
    here, there = found.logits32
    test.assertLess(here, max(2 * there, FLOOR))


def _length(value: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(value - exact) / np.linalg.norm(exact))
