"""Compare a converted network with PyTorch's own: logits, input gradients, time, every operator.

Needs PyTorch, imported inside of functions only.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.interop import program as programs
from jaxrobust.interop import refusals, scripted
from jaxrobust.interop.operators import TABLE
from jaxrobust.interop.torch import Converted

# Of the largest logit, and of the length of the gradient. In float32, rounding in another order of
# the sums may be larger for some weights: then twice PyTorch's own error against its float64, and
# four times for gradients, where a unit at its kink may go to either side.
LOGITS = {"float32": 1e-5, "float64": 1e-9}
GRADIENTS = {"float32": 1e-4, "float64": 1e-7}
FEW = 8  # images to compare, since a pass in float64 may follow, and the engine's slots on a CPU
DISPATCH = 0.01  # seconds: shorter passes measure Python, which the attacks' loops leave out
_CHEAPER = 0.9  # of the seconds that an image takes, beyond what a noisy machine may say
_OPERATOR = 1e-6  # of the largest value of an operator in float64, which differ by 1e-12 or so

Pass = Callable[..., tuple[np.ndarray, np.ndarray]]  # images, dtype -> logits and input gradient


class Agreement(NamedTuple):
    """What is measured on some images."""

    images: int
    logits: float  # largest difference in float32, of the largest logit
    gradients: float  # length of the difference in float32, of the length of the gradient
    seconds: tuple[float, float]  # a pass with gradient here and in PyTorch, in float32
    at_once: int  # images that a pass should have, for each device

    def words(self) -> str:
        """Return this for people."""
        here, there = (f"{1e3 * seconds:.1f} ms" for seconds in self.seconds)
        return (
            f"JAX and PyTorch agree on {self.images} images (logits differ by {self.logits:.1e} of "
            f"the largest, input gradients by {self.gradients:.1e}); a pass with gradient takes "
            f"{here} here, {there} in PyTorch"
            + (f"; {self.at_once} images at once cost less each" if self.at_once > FEW else "")
        )


def compared(
    network: Converted, images: np.ndarray, rewrite: Callable[..., Any] = lambda function: function
) -> Agreement:
    """Return how well both sides agree on images f32[B,H,W,C].

    Args:
      network: see `Converted`.
      images: real ones: few, since a pass in float64 may follow.
      rewrite: what the evaluation does with a network's function on this platform.
    Raises:
      ValueError: they do not; the message names the first operator whose values differ.
    """
    theirs, ours = _torch_pass(network), _jax_pass(network, rewrite)
    logits, gradient = ours(images, "float32")
    rounded = theirs(images, "float32")
    try:
        exact = theirs(images, "float64")
    except RuntimeError:  # code that says float32
        exact = rounded
    bars = [
        max(LOGITS["float32"], 2 * _largest(rounded[0], exact[0])),
        max(GRADIENTS["float32"], 4 * _length(rounded[1], exact[1])),
    ]
    found = [_largest(logits, exact[0]), _length(gradient, exact[1])]
    if not all(value < bar for value, bar in zip(found, bars, strict=True)):  # NaN too
        _check_exactly(network, ours, exact, images, found)
    seconds = _seconds(ours, images), _seconds(theirs, images)
    return Agreement(len(images), found[0], found[1], seconds, _at_once(ours, images, seconds[0]))


def _at_once(one: Pass, images: np.ndarray, seconds: float) -> int:
    """Return how many images a pass should have: twice as many where each then costs less.

    So it is where maps are small and weights large, as in the last stages of a ResNet-18 at 32 px:
    49 ms an image in passes of 8 on one core, 39 in passes of 16, 37 in passes of 32; a ViT's
    tokens take 16 to 17 in either. Short passes, of which most is dispatch, say nothing.
    """
    if len(images) < FEW or seconds < DISPATCH:
        return FEW
    twice = _seconds(one, np.concatenate([images, images]))
    return 2 * FEW if twice < 2 * _CHEAPER * seconds else FEW


def _check_exactly(
    network: Converted, ours: Pass, exact: Any, images: np.ndarray, found: list[float]
) -> None:
    """Raise `ValueError` unless what differs in float32 is equal in float64."""
    logits, gradient = ours(images, "float64")
    off = _largest(logits, exact[0]), _length(gradient, exact[1])
    if off[0] < LOGITS["float64"] and off[1] < GRADIENTS["float64"]:
        return
    first = first_difference(network, images[:2])
    raise ValueError(
        f"JAX and PyTorch differ: logits by {found[0]:.1e} of the largest in float32 and "
        f"{off[0]:.1e} in float64, input gradients by {found[1]:.1e} and {off[1]:.1e}. "
        + (
            f"The first operator whose values differ is {first}"
            if first
            else "Every operator gives the same values, so a gradient differs, or torch.export "
            "wrote down something else than the module computes"
        )
    )


def _largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def _length(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), 1e-30))


def _cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """Return what the logits are weighted with: all of them differently."""
    return np.cos(np.arange(np.prod(shape), dtype=np.float64)).reshape(shape)


def _seconds(one: Pass, images: np.ndarray) -> float:
    """Return the shortest of three passes; the first, which compiles, has been."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        one(images, "float32")
        times.append(time.perf_counter() - start)
    return min(times)


def _jax_pass(network: Converted, rewrite: Callable[..., Any]) -> Pass:
    function = rewrite(network.logits_fn.func)

    @jax.jit
    def both(weights: Any, images: Any, cotangent: Any) -> Any:
        logits, back = jax.vjp(lambda x: function(weights, x), images)
        return logits, back(cotangent)[0]

    @functools.cache
    def weights(dtype: str) -> Any:
        return {key: _cast(array, dtype) for key, array in network.weights.items()}

    def one(images: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        with jax.enable_x64(dtype == "float64"):
            operands = weights(dtype), jnp.asarray(images, dtype)
            shape = jax.eval_shape(function, *operands)
            found = both(*operands, jnp.asarray(_cotangent(shape.shape), shape.dtype))
            return jax.device_get(found)

    return one


def _cast(array: Any, dtype: str) -> Any:
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.asarray(np.asarray(array), dtype) if floating else array


def _torch_pass(network: Converted) -> Pass:
    import torch

    @functools.cache
    def module(dtype: str) -> Any:
        if dtype == "float32":
            return network.module
        return scripted.in_float64(network.module)

    def logits_of(net: Any, x: Any) -> Any:
        if network.program.single:
            return torch.cat([_chosen(net(row[None]), network.output) for row in x])
        return _chosen(net(x), network.output)

    def one(images: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        x = torch.from_numpy(nchw).to(getattr(torch, dtype)).requires_grad_()
        logits = logits_of(module(dtype), x.clone())  # which a module may change in place
        cotangent = torch.from_numpy(_cotangent(tuple(logits.shape))).to(logits.dtype)
        gradient = refusals.gradient(logits, x, cotangent)
        return logits.detach().numpy(), gradient.numpy().transpose(0, 2, 3, 1)

    return one


def _chosen(result: Any, output: str) -> Any:
    """Return the logits among what a module returns, by the path that `exporting` gives them."""
    for key in output.split(".") if output else ():
        if isinstance(result, dict):
            result = result[key]
        elif isinstance(result, list | tuple) and key.isdigit():
            result = result[int(key)]
        else:
            result = getattr(result, key)
    return result


def first_difference(network: Converted, images: np.ndarray) -> str | None:
    """Return the first operator whose values differ in float64, with its line; None: none does.

    Both sides are run operator by operator, each on its own values.
    """
    theirs = _torch_values(network, images)
    with jax.enable_x64(True):
        weights = {key: _cast(array, "float64") for key, array in network.weights.items()}
        ours = programs.run(network.program, TABLE, weights, jnp.asarray(images, "float64"))
        for step in network.program.steps:
            off = _off(programs.plain(ours[step.name]), theirs[step.name])
            if not off < _OPERATOR:
                return f"{step.operator} at {step.line}, by {off:.1e} of its largest value"
    return None


def _off(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two values, or of two lists of them; of sizes, none."""
    if isinstance(theirs, list | tuple):
        pairs = [(programs.plain(o), t) for o, t in zip(ours, theirs, strict=True) if o is not None]
        return max((_off(*pair) for pair in pairs), default=0.0)
    if not hasattr(theirs, "detach"):
        return 0.0
    value = theirs.detach().numpy()
    if value.shape != ours.shape:
        return float("inf")
    if not value.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        apart = np.abs(np.asarray(ours, np.float64) - value.astype(np.float64))
    same = np.asarray(ours) == value  # infinities
    return float(np.where(same, 0, apart).max() / max(np.abs(value).max(), 1e-30))


def _torch_values(network: Converted, images: np.ndarray) -> dict[str, Any]:
    """Return the values of PyTorch's graph in float64, by the names of its nodes."""
    import torch

    exported, found = network.exported, {}
    arrays = {**exported.state_dict, **exported.constants}

    class Recording(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            if "_assert" in n.name:  # of types, which are float32
                return None
            found[n.name] = super().run_node(n)
            return found[n.name]

    def double(tensor: Any) -> Any:
        return tensor.detach().double() if tensor.is_floating_point() else tensor

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).double()
    user = torch.export.graph_signature.InputKind.USER_INPUT
    specs = exported.graph_signature.input_specs
    inputs = [x if spec.kind == user else double(arrays[spec.target]) for spec in specs]
    with torch.no_grad():
        Recording(exported.graph_module).run(*inputs)
    return found
