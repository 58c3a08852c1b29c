"""Compare a converted network with PyTorch's own: logits, input gradients, time, every operator."""

import contextlib
import functools
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.pytorch import program as programs
from jaxrobust.pytorch.operators import DRAWS, TABLE
from jaxrobust.pytorch.program import Converted
from jaxrobust.pytorch.reading import exporting, refusals, scripted, wrappers
from jaxrobust.pytorch.reading.drawing import injected
from jaxrobust.pytorch.reading.folding import COMPUTED
from jaxrobust.pytorch.reading.results import chosen
from jaxrobust.types import unmasked

# Of the largest logit, and of the length of the gradient. In float32, rounding in another order of
# the sums may be larger for some weights: then twice PyTorch's own error against its float64, and
# four times for gradients, where a unit at its kink may go to either side; but no more than the
# widest, beyond which float64 decides.
LOGITS = {"float32": 1e-5, "float64": 1e-9, "widest": 1e-4}
GRADIENTS = {"float32": 1e-4, "float64": 1e-7, "widest": 1e-2}
_AGAIN = (1e-6, 1e-5)  # the same of two passes on the same images, which are most often equal
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
    """Measure the agreement and the times of both sides on a few real images f32[B,H,W,C].

    `rewrite` is what the evaluation does with a network's function on this platform.
    """
    theirs, ours = _torch_pass(network), _jax_pass(network, rewrite)
    errors = _checked(network, images, theirs, ours)
    seconds = _seconds(ours, images), _seconds(theirs, images)
    return Agreement(len(images), *errors, seconds, _at_once(ours, images, seconds[0]))


def check(network: Converted, images: np.ndarray) -> tuple[float, float]:
    """Measure how much logits and input gradients differ; `ValueError`: too much, and where."""
    return _checked(network, images, _torch_pass(network), _jax_pass(network, lambda f: f))


def _checked(
    network: Converted, images: np.ndarray, theirs: Pass, ours: Pass
) -> tuple[float, float]:
    rounded, before = theirs(images, "float32"), _generators()
    _check_again(rounded, theirs(images, "float32"), before)
    here = ours(images, "float32")
    try:
        exact = theirs(images, "float64")
    except RuntimeError:  # code that says float32
        exact = rounded
    own = _apart(rounded, exact)
    bars = _bar(LOGITS, 2 * own[0]), _bar(GRADIENTS, 4 * own[1])
    errors = _apart(here, exact)
    if not all(value < bar for value, bar in zip(errors, bars, strict=True)):  # NaN too
        _check_exactly(network, ours, exact, images, errors)
    _check_alone(images, rounded, theirs, bars)
    if network.program.single and not network.program.draws:
        with contextlib.suppress(RuntimeError):  # it cannot take several at once
            _check_alone(images, rounded, _torch_pass(network, at_once=True), bars)
    return errors


def _bar(limits: dict[str, float], own: float) -> float:
    return max(limits["float32"], min(own, limits["widest"]))


def _generators() -> tuple[Any, ...]:
    name, numbers, *rest = np.random.get_state()
    return random.getstate(), name, np.asarray(numbers).tobytes(), rest


def _check_again(first: Any, second: Any, before: Any) -> None:
    apart, drawn = _apart(second, first), _generators() != before
    if drawn or any(value > limit for value, limit in zip(apart, _AGAIN, strict=True)):
        raise ValueError(
            "two passes of PyTorch's module on the same images differ"
            f"{' in what they draw' if drawn else ''}: logits by {apart[0]:.1e} "
            f"of the largest, input gradients by {apart[1]:.1e}. It draws random numbers that "
            "torch.export does not see (NumPy's, or Python's), or keeps something from pass to "
            "pass; draw with PyTorch (torch.randn_like) and give --version=rand if the draws are "
            "the defence, else make it a function of the images"
        )


def _check_alone(images: np.ndarray, all_of: Any, theirs: Pass, bars: tuple[float, float]) -> None:
    """Refuse logits or gradients of an image that depend on its batch: half of it, or twice one."""
    some = max(1, len(images) // 2)
    other = images[:some] if len(images) > 1 else np.concatenate([images, images[:, ::-1]])
    few = theirs(other, "float32")
    apart = _apart([part[:some] for part in few], [part[:some] for part in all_of])
    if not all(value < bar for value, bar in zip(apart, bars, strict=True)):
        raise ValueError(
            f"what PyTorch's module gives for an image depends on the others of its batch: of "
            f"{len(images)} images and of {len(other)}, the same have logits that differ by "
            f"{apart[0]:.1e} of the largest, and input gradients by {apart[1]:.1e}. An attack "
            "fills its batches otherwise than a defender; compute each image by itself"
        )


def _at_once(one: Pass, images: np.ndarray, seconds: float) -> int:
    """Choose the number of images of a pass: twice as many where each then costs less.

    So it is where maps are small and weights large. Short passes, mostly dispatch, say nothing.
    """
    if len(images) < FEW or seconds < DISPATCH:
        return FEW
    twice = _seconds(one, np.concatenate([images, images]))
    return 2 * FEW if twice < 2 * _CHEAPER * seconds else FEW


def _check_exactly(
    network: Converted, ours: Pass, exact: Any, images: np.ndarray, errors: tuple[float, float]
) -> None:
    off = _apart(ours(images, "float64"), exact)
    if off[0] < LOGITS["float64"] and off[1] < GRADIENTS["float64"]:
        return
    unlike = ", for one has NaN or an infinity where the other has none" if np.inf in off else ""
    # What is drawn is PyTorch's own there.
    first = None if network.program.draws else first_difference(network, images[:2])
    raise ValueError(
        f"JAX and PyTorch differ: logits by {errors[0]:.1e} of the largest in float32 and "
        f"{off[0]:.1e} in float64, input gradients by {errors[1]:.1e} and {off[1]:.1e}{unlike}. "
        + (
            f"The first operator whose values differ is {first}"
            if first
            else "Every operator gives the same values, so a gradient differs, or torch.export "
            "wrote down something else than the module computes"
        )
    )


def _apart(ours: Any, theirs: Any) -> tuple[float, float]:
    """Compare logits, to the largest one, and input gradients, to their length.

    Infinite: one side has a number where the other has none.
    """
    (logits, of_logits), (gradients, of_gradients) = map(_differences, ours, theirs)
    answers = unmasked(theirs[0])
    largest = logits.max() / max(of_logits[:, answers].max(), 1e-30)
    length = np.linalg.norm(gradients) / max(float(np.linalg.norm(of_gradients)), 1e-30)
    return float(largest), float(length)


def _differences(ours: Any, theirs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return sizes of differences, none between equal infinities or NaNs, and of finite numbers."""
    ours, theirs = (np.asarray(value, np.float64) for value in (ours, theirs))
    finite = np.isfinite(ours) & np.isfinite(theirs)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    apart = np.abs(np.subtract(ours, theirs, where=finite, out=np.full(theirs.shape, np.inf)))
    return np.where(same, 0, apart), np.where(np.isfinite(theirs), np.abs(theirs), 0)


def _cotangent(shape: tuple[int, ...]) -> np.ndarray:
    return np.cos(np.arange(np.prod(shape), dtype=np.float64)).reshape(shape)


def _seconds(one: Pass, images: np.ndarray) -> float:
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
        given = _keys(network, len(images))
        logits, back = jax.vjp(lambda x: function(weights, x, *given), images)
        return logits, back(cotangent)[0]

    @functools.cache
    def weights(dtype: str) -> Any:
        return _weights(network, dtype)

    def one(images: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        with jax.enable_x64(dtype == "float64"):
            operands = weights(dtype), jnp.asarray(images, dtype)
            given = _keys(network, len(images))
            shape = jax.eval_shape(function, *operands, *given)
            results = both(*operands, jnp.asarray(_cotangent(shape.shape), shape.dtype))
            return jax.device_get(results)

    return one


def _keys(network: Converted, count: int) -> tuple[Any, ...]:
    if not network.keyed:
        return ()
    return (jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(count)),)


def _drawing(network: Converted) -> Callable[[np.ndarray, str], list[list[np.ndarray]]]:
    """Build the function that draws, for each image, the network's random numbers in its order."""
    program = network.program

    def one(weights: Any, image: Any, key: Any) -> Any:
        values = programs.run(program, {**TABLE, **DRAWS}, weights, image[None], key)
        # Dropout gives what it keeps, and where.
        drawn = (values[name] for name in program.draws)
        return [value[-1] if isinstance(value, tuple | list) else value for value in drawn]

    each = jax.jit(jax.vmap(one, (None, 0, 0)))

    def drawn(images: np.ndarray, dtype: str) -> list[list[np.ndarray]]:
        with jax.enable_x64(dtype == "float64"):
            operands = _weights(network, dtype), jnp.asarray(images, dtype)
            draws = jax.device_get(each(*operands, *_keys(network, len(images))))
            return [[np.asarray(draw[i]) for draw in draws] for i in range(len(images))]

    return drawn


def _weights(network: Converted, dtype: str) -> dict[str, Any]:
    """Return weights in a type; what is computed of them is computed anew in float64."""
    if dtype == "float64" and any(key.startswith(COMPUTED) for key in network.weights):
        single, random = network.program.single, network.keyed
        return exporting.read(network.exported, single=single, random=random, double=True)[1]
    floating = {k for k, a in network.weights.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    cast = {key: jnp.asarray(np.asarray(network.weights[key]), dtype) for key in floating}
    return network.weights | cast


def _torch_pass(network: Converted, at_once: bool = False) -> Pass:
    """Build PyTorch's pass: of one image at a time where the program takes one, or `at_once`."""
    import torch

    drawing = _drawing(network)

    @functools.cache
    def module(dtype: str) -> Any:
        return network.module if dtype == "float32" else scripted.in_float64(network.module)

    def logits_of(net: Any, x: Any, images: np.ndarray, dtype: str) -> Any:
        if network.program.draws:
            logits = []
            for row, drawn in zip(x, drawing(images, dtype), strict=True):
                with injected(drawn):
                    logits.append(chosen(net(row[None]), network.output))
            return torch.cat(logits)
        if network.program.single and not at_once:
            return torch.cat([chosen(net(row[None]), network.output) for row in x])
        return chosen(net(x), network.output)

    @wrappers.uncompiled()
    def one(images: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        x = torch.from_numpy(nchw).to(getattr(torch, dtype)).requires_grad_()
        # A module may change its images in place.
        logits = logits_of(module(dtype), x.clone(), images, dtype)
        cotangent = torch.from_numpy(_cotangent(tuple(logits.shape))).to(logits.dtype)
        again = functools.partial(logits_of, module(dtype), images=images, dtype=dtype)
        gradient = refusals.gradient(logits, x, cotangent, again)
        return logits.detach().numpy(), gradient.numpy().transpose(0, 2, 3, 1)

    return one


def first_difference(network: Converted, images: np.ndarray) -> str | None:
    """Find the first operator whose values differ in float64, with its line; None: none does."""
    theirs = _torch_values(network, images)
    with jax.enable_x64(True):
        weights = _weights(network, "float64")
        ours = programs.run(network.program, TABLE, weights, jnp.asarray(images, "float64"))
        for step in network.program.steps:
            off = _off(programs.plain(ours[step.name]), theirs[step.name])
            if not off < _OPERATOR:
                return f"{step.operator} at {step.line}, by {off:.1e} of its largest value"
    return None


def _off(ours: Any, theirs: Any) -> float:
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
    apart, size = _differences(ours, value)
    return float(apart.max() / max(size.max(), 1e-30))


def _torch_values(network: Converted, images: np.ndarray) -> dict[str, Any]:
    import torch

    exported, values = network.exported, {}
    arrays = {**exported.state_dict, **exported.constants}

    class Recording(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            if "_assert" in n.name:  # of types, which are float32
                return None
            values[n.name] = super().run_node(n)
            return values[n.name]

    def double(tensor: Any) -> Any:
        return tensor.detach().double() if tensor.is_floating_point() else tensor

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).double()
    user = torch.export.graph_signature.InputKind.USER_INPUT
    specs = exported.graph_signature.input_specs
    inputs = [x if spec.kind == user else double(arrays[spec.target]) for spec in specs]
    with torch.no_grad():
        Recording(exported.graph_module).run(*inputs)
    return values
