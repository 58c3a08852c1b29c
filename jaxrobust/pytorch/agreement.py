"""Compare a converted network with PyTorch's own: logits, input gradients, time, every operator."""

import contextlib
import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.pytorch import program as programs
from jaxrobust.pytorch.operators import DRAWS, TABLE
from jaxrobust.pytorch.program import Converted, differences
from jaxrobust.pytorch.reading import exporting, refusals, steps, wrappers
from jaxrobust.types import unmasked

# Relative to the largest logit, and to the length of the gradient. In float32, summing in another
# order may round more for some weights. Then twice PyTorch's own error against its float64 is
# allowed, and four times for gradients, where a unit at its kink may go to either side, but no more
# than the widest tolerance, beyond which float64 decides.
LOGITS = {"float32": 1e-5, "float64": 1e-9, "widest": 1e-4}
GRADIENTS = {"float32": 1e-4, "float64": 1e-7, "widest": 1e-2}
_AGAIN = (1e-6, 1e-5)  # the same for two passes on the same images, which are usually equal
FEW = 8  # images to compare, because a float64 pass may follow; also the engine's slots on a CPU
DISPATCH = 0.01  # seconds; shorter passes measure Python overhead, which attacks do not have
_CHEAPER = 0.9  # of the seconds per image; more than timing noise
_OPERATOR = 1e-6  # of an operator's largest value in float64; agreement is about 1e-12

Pass = Callable[..., tuple[np.ndarray, np.ndarray]]  # images, dtype -> logits and input gradient


class Agreement(NamedTuple):
    """Measurements on some images."""

    images: int
    logits: float  # largest difference in float32, relative to the largest logit
    gradients: float  # length of the difference in float32, relative to the gradient's
    seconds: tuple[float, float]  # of a pass with gradient, here and in PyTorch, in float32
    at_once: int  # best number of images per pass and device

    def words(self) -> str:
        """Describe the measurements in one line."""
        here, there = (f"{1e3 * seconds:.1f} ms" for seconds in self.seconds)
        return (
            f"JAX and PyTorch agree on {self.images} images (relative difference of the logits "
            f"{self.logits:.1e}, of the input gradients {self.gradients:.1e}); a forward and "
            f"backward pass on them takes {here} in JAX, {there} in PyTorch"
            + (f"; batches of {self.at_once} cost less per image" if self.at_once > FEW else "")
        )


def compared(
    network: Converted, images: np.ndarray, rewrite: Callable[..., Any] = lambda function: function
) -> Agreement:
    """Measure agreement and run times of both sides on a few real images f32[B,H,W,C].

    `rewrite` is the evaluation's transformation of a network's function on this platform.
    """
    torch_pass, jax_pass = passes = _torch_pass(network), _jax_pass(network, rewrite)
    errors = check(network, images, passes)
    seconds = _seconds(jax_pass, images)
    # Double the number if each image then costs less, as for small maps and large weights. Short
    # passes are mostly dispatch and tell nothing.
    at_once = FEW
    if len(images) >= FEW and seconds >= DISPATCH:
        twice = _seconds(jax_pass, np.concatenate([images, images]))
        at_once = 2 * FEW if twice < 2 * _CHEAPER * seconds else FEW
    return Agreement(len(images), *errors, (seconds, _seconds(torch_pass, images)), at_once)


def check(
    network: Converted, images: np.ndarray, passes: tuple[Pass, Pass] | None = None
) -> tuple[float, float]:
    """Measure differences of logits and input gradients; `ValueError`: too large, and where.

    `passes` are PyTorch's and JAX's; None: the network's own.
    """
    torch_pass, jax_pass = passes or (_torch_pass(network), _jax_pass(network, lambda f: f))
    rounded, generators = torch_pass(images, "float32"), _generators()
    again = _apart(torch_pass(images, "float32"), rounded)
    _check_again(again, _generators() != generators)
    values = jax_pass(images, "float32")
    try:
        exact = torch_pass(images, "float64")
    except RuntimeError:  # code that fixes float32
        exact = rounded
    rounding = _apart(rounded, exact)
    bars = (
        max(LOGITS["float32"], min(2 * rounding[0], LOGITS["widest"])),
        max(GRADIENTS["float32"], min(4 * rounding[1], GRADIENTS["widest"])),
    )
    errors = _apart(values, exact)
    if not _within(errors, bars):
        wide = _apart(jax_pass(images, "float64"), exact)
        if not _within(wide, (LOGITS["float64"], GRADIENTS["float64"])):
            raise ValueError(_difference(network, images, errors, wide))
    _check_alone(images, rounded, torch_pass, bars)
    if network.program.single and not network.program.draws:
        with contextlib.suppress(RuntimeError):  # the module cannot process several at once
            _check_alone(images, rounded, _torch_pass(network, at_once=True), bars)
    return errors


def _within(errors: tuple[float, float], bars: tuple[float, float]) -> bool:
    return errors[0] < bars[0] and errors[1] < bars[1]  # NaN is not


def _generators() -> tuple[Any, ...]:
    name, numbers, *others = np.random.get_state()
    return random.getstate(), name, np.asarray(numbers).tobytes(), others


def _check_again(errors: tuple[float, float], draws: bool) -> None:
    if draws or errors[0] > _AGAIN[0] or errors[1] > _AGAIN[1]:
        raise ValueError(
            "two passes of the PyTorch module on the same images differ"
            f"{' in their random draws' if draws else ''}: logits by {errors[0]:.1e} "
            f"of the largest, input gradients by {errors[1]:.1e}. It draws NumPy or Python random "
            "numbers, which torch.export does not see, or keeps state between passes. If the "
            "draws are the defense, draw with PyTorch (torch.randn_like) and give --version=rand; "
            "otherwise, make the module a function of the images only"
        )


def _check_alone(
    images: np.ndarray, batch: Any, torch_pass: Pass, bars: tuple[float, float]
) -> None:
    """Refuse logits or gradients of an image that change with half the batch or another image."""
    some = max(1, len(images) // 2)
    other = images[:some] if len(images) > 1 else np.concatenate([images, images[:, ::-1]])
    few = torch_pass(other, "float32")
    errors = _apart([part[:some] for part in few], [part[:some] for part in batch])
    if not _within(errors, bars):
        raise ValueError(
            "the output of the PyTorch module for an image depends on the other images of its "
            f"batch: with {len(images)} and with {len(other)} images, logits of the same image "
            f"differ by {errors[0]:.1e} of the largest, and input gradients by {errors[1]:.1e}. "
            "Attacks use different batches; compute each image independently"
        )


def _difference(
    network: Converted,
    images: np.ndarray,
    errors: tuple[float, float],
    wide: tuple[float, float],
) -> str:
    unlike = ", because only one of them has NaN or infinity" if np.inf in wide else ""
    # Random draws come from PyTorch itself here.
    first = None if network.program.draws else first_difference(network, images[:2])
    return (
        f"JAX and PyTorch differ: logits by {errors[0]:.1e} of the largest in float32 and "
        f"{wide[0]:.1e} in float64, input gradients by {errors[1]:.1e} and {wide[1]:.1e}{unlike}. "
        + (
            f"The first operator whose values differ is {first}"
            if first
            else "All operators return the same values, so either a gradient differs, or "
            "torch.export did not record what the module computes"
        )
    )


def _apart(values: Any, expected: Any) -> tuple[float, float]:
    """Compare logits relative to the largest, and input gradients relative to their length."""
    # Infinite if only one side has a finite number somewhere.
    (logits, sizes), (gradients, of_gradients) = map(differences, values, expected)
    largest = logits.max() / max(sizes[:, unmasked(expected[0])].max(), 1e-30)
    length = np.linalg.norm(gradients) / max(float(np.linalg.norm(of_gradients)), 1e-30)
    return float(largest), float(length)


def _cotangent(shape: tuple[int, ...]) -> np.ndarray:
    return np.cos(np.arange(np.prod(shape), dtype=np.float64)).reshape(shape)


def _seconds(one_pass: Pass, images: np.ndarray) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        one_pass(images, "float32")
        times.append(time.perf_counter() - start)
    return min(times)


def _jax_pass(network: Converted, rewrite: Callable[..., Any]) -> Pass:
    function = rewrite(network.logits_fn.func)
    weights = functools.cache(functools.partial(_weights, network))

    @jax.jit
    def both(weights: Any, images: Any, cotangent: Any) -> Any:
        keys = _keys(network, len(images))
        logits, back = jax.vjp(lambda x: function(weights, x, *keys), images)
        return logits, back(cotangent)[0]

    def one_pass(images: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        with jax.enable_x64(dtype == "float64"):
            operands = weights(dtype), jnp.asarray(images, dtype)
            shape = jax.eval_shape(function, *operands, *_keys(network, len(images)))
            results = both(*operands, jnp.asarray(_cotangent(shape.shape), shape.dtype))
            return jax.device_get(results)

    return one_pass


def _keys(network: Converted, count: int) -> tuple[Any, ...]:
    if not network.keyed:
        return ()
    return (jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(count)),)


def _drawing(network: Converted) -> Callable[[np.ndarray, str], list[list[np.ndarray]]]:
    """Build the function that draws the network's random numbers in order, for each image."""
    program = network.program

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def draw(weights: Any, image: Any, key: Any) -> Any:
        values = programs.run(program, {**TABLE, **DRAWS}, weights, image[None], key)
        # Dropout returns the kept values and their mask.
        draws = (values[name] for name in program.draws)
        return [value[-1] if isinstance(value, tuple | list) else value for value in draws]

    def drawn(images: np.ndarray, dtype: str) -> list[list[np.ndarray]]:
        with jax.enable_x64(dtype == "float64"):
            operands = _weights(network, dtype), jnp.asarray(images, dtype)
            draws = jax.device_get(draw(*operands, *_keys(network, len(images))))
            return [[np.asarray(value[i]) for value in draws] for i in range(len(images))]

    return drawn


@contextlib.contextmanager
def injected(draws: Sequence[np.ndarray]) -> Iterator[None]:
    """Make PyTorch draw these in order; `ValueError` if it draws other shapes, more or fewer."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    following = list(draws)

    class Drawing(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            value = func(*args, **(kwargs or {}))
            if not refusals.is_draw(str(func)):
                return value
            if not following or tuple(following[0].shape) != tuple(value.shape):
                raise ValueError(
                    f"the PyTorch module draws numbers of shape {tuple(value.shape)} ({func}), but "
                    f"its program draws {tuple(following[0].shape) if following else 'no more'}; "
                    "draw the same numbers in each pass"
                )
            return value.copy_(torch.from_numpy(np.array(following.pop(0))))

    with Drawing():
        yield
    if following:
        raise ValueError(
            f"the PyTorch module draws {len(draws) - len(following)} times, but its program draws "
            f"{len(draws)} times; draw the same numbers in each pass"
        )


def _weights(network: Converted, dtype: str) -> dict[str, Any]:
    """Return weights in a type; values computed from them are recomputed in float64."""
    if dtype == "float64" and any(key.startswith(steps.COMPUTED) for key in network.weights):
        single, random = network.program.single, network.keyed
        return steps.read(network.exported, single=single, random=random, double=True)[1]
    return {
        key: jnp.asarray(np.asarray(a), dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
        for key, a in network.weights.items()
    }


def _torch_pass(network: Converted, at_once: bool = False) -> Pass:
    """Build PyTorch's pass over `at_once` images, or one at a time if the program takes one."""
    import torch

    drawing = _drawing(network)

    @functools.cache
    def module(dtype: str) -> Any:
        return network.module if dtype == "float32" else exporting.in_float64(network.module)

    def logits_of(x: Any, images: np.ndarray, dtype: str) -> Any:
        def chosen(x: Any) -> Any:
            return steps.chosen(module(dtype)(x), network.output)

        if network.program.draws:
            logits = []
            for row, draws in zip(x, drawing(images, dtype), strict=True):
                with injected(draws):
                    logits.append(chosen(row[None]))
            return torch.cat(logits)
        if network.program.single and not at_once:
            return torch.cat([chosen(row[None]) for row in x])
        return chosen(x)

    @wrappers.uncompiled()
    def one_pass(images: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        x = torch.from_numpy(nchw).to(getattr(torch, dtype)).requires_grad_()
        again = functools.partial(logits_of, images=images, dtype=dtype)
        logits = again(x.clone())  # a module may change its input in place
        cotangent = torch.from_numpy(_cotangent(tuple(logits.shape))).to(logits.dtype)
        gradient = refusals.gradient(logits, x, cotangent, again)
        return logits.detach().numpy(), gradient.numpy().transpose(0, 2, 3, 1)

    return one_pass


def first_difference(network: Converted, images: np.ndarray) -> str | None:
    """Find the first operator whose values differ in float64, with its line, or None."""
    expected = _torch_values(network, images)
    with jax.enable_x64(True):
        weights = _weights(network, "float64")
        values = programs.run(network.program, TABLE, weights, jnp.asarray(images, "float64"))
        for step in network.program.steps:
            error = _error(programs.plain(values[step.name]), expected[step.name])
            if not error < _OPERATOR:
                return f"{step.operator} at {step.line}, by {error:.1e} of its largest value"
    return None


def _error(value: Any, expected: Any) -> float:
    if isinstance(expected, list | tuple):
        pairs = [(v, e) for v, e in zip(value, expected, strict=True) if v is not None]
        return max((_error(programs.plain(v), e) for v, e in pairs), default=0.0)
    if not hasattr(expected, "detach"):
        return 0.0
    array = expected.detach().numpy()
    if array.shape != value.shape:
        return float("inf")
    apart, sizes = differences(value, array)
    return float(apart.max(initial=0) / max(sizes.max(initial=0), 1e-30))


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
