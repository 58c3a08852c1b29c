"""Building blocks of layers: walls, formulas per platform, products."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.xla_metadata import set_xla_metadata

from jaxrobust.runtime.devices import cpus
from jaxrobust.runtime.text.progress import say

Array = jax.Array
Out = TypeVar("Out")  # an array, or a list or tuple of them


def device_kind() -> str:
    """Return the kind of chips that a program is traced for."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described else jax.devices()[0].device_kind


def takes_xla(layer: str, reason: str | None, platform: str = "tpu") -> bool:
    """Choose XLA's path if no kernel accepts `layer`, and say so once on the kernel's platform."""
    if reason:
        _say_once(f"{layer} falls back to XLA: {reason}", platform)
    return reason is not None


@functools.cache
def _say_once(sentence: str, platform: str) -> None:
    if jax.default_backend() == platform:
        say(sentence)


def static_jit(function: Callable[..., Out], **options: Any) -> Callable[..., Out]:
    """Return `jax.jit` of `function` with its keyword-only parameters static."""
    static = inspect.getfullargspec(inspect.unwrap(function)).kwonlyargs
    return jax.jit(function, static_argnames=static, **options)


def traced_once(function: Callable[..., Out]) -> Callable[..., Out]:
    """Trace `function` once for all operands of the same shapes and types, across layers.

    The compiled program is the same as without. Keyword-only parameters are static.
    """
    return static_jit(function, inline=True)


def walled(function: Callable[..., Out]) -> Callable[..., Out]:
    """Compile `function` as a separate computation: nothing fuses across its boundary.

    Keyword-only parameters of `function` are static.
    """
    compiled = static_jit(function)

    @functools.wraps(function)
    def call(*operands: Array, **settings: Any) -> Out:
        # `optimization_barrier` does not work: it disappears before XLA's CPU back end fuses.
        with set_xla_metadata(inlineable="false"):
            return compiled(*operands, **settings)

    return call


def per_platform(function: Callable[..., Out]) -> Callable[..., Out]:
    """Return `function` with a wall on CPU."""
    on_cpu = walled(function)

    @traced_once
    @functools.wraps(function)
    def call(*operands: Array, **settings: Any) -> Out:
        rules = {"cpu": on_cpu, "default": function}
        rules = {name: functools.partial(rule, **settings) for name, rule in rules.items()}
        return lax.platform_dependent(*operands, **rules)

    return call


def by_rows(function: Callable[..., Array]) -> Callable[..., Array]:
    """Wrap `function` of f[..,C], parameters f[C] and numbers; on CPU, use matrices and a wall.

    The times in `layers.py` are for this form. A TPU stores an image's 197 tokens in tiles of 8, so
    reshaping to a matrix copies them: without that a block of ViT-S takes 2.4 instead of 3.1 M
    cycles on top of its kernels.
    """
    on_cpu = walled(function)

    def flat(*operands: Array) -> Array:
        leading = max((o.shape[:-1] for o in operands), key=len)
        out = on_cpu(*(rows(o) if o.ndim > 2 else o for o in operands))
        return out.reshape(*leading, -1) if out.ndim == 2 else out

    @traced_once
    @functools.wraps(function)
    def call(*operands: Array) -> Array:
        return lax.platform_dependent(*operands, cpu=flat, default=function)

    return call


def along(parameter: Array, x: Array) -> Array:
    """Give f[C] as many axes as `x` f[..,C] has."""
    return parameter.reshape((1,) * (x.ndim - 1) + (-1,))


def leading(x: Array) -> tuple[int, ...]:
    """Return all axes of `x` but the last."""
    return tuple(range(x.ndim - 1))


def widened(*arrays: Array) -> tuple[Array, ...]:
    """Convert `arrays` to float32, leaving float64 alone."""
    return tuple(a if a.dtype == jnp.float64 else a.astype(jnp.float32) for a in arrays)


# Of tanh(x * P(x**2)), which is within 7e-6 of erf(x / sqrt(2)), so the GELU is within 4e-6, where
# bfloat16 has steps of 8e-3 at 1: 10 vector operations and a tanh instead of about 35.
_SERIES = (1.18125479e-06, -3.20649087e-05, -1.13682734e-04, 3.64382789e-02, 7.97852337e-01)


def error_function(x: Array, exact: bool) -> Array:
    """Compute erf(x / sqrt(2)), exactly or from the series above."""
    if exact:
        return lax.erf(x * 0.5**0.5)
    square, total = x * x, cast(Array, _SERIES[0])
    for coefficient in _SERIES[1:]:
        total = total * square + coefficient
    return jnp.tanh(x * total)


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def with_gradient(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `call(static, x, parameters)`, the output of `forward`, with the gradient `backward`.

    Attacks need only the gradient of `x`; the parameters' gradients are computed on demand.

    Args:
      forward: `(static, x, parameters, needed) -> (out, residuals)`; `static` is hashable, `x` and
        `parameters` are pytrees of arrays. `needed` says whether `backward` must return gradients
        of the parameters; None: nothing is differentiated.
      backward: `(static, residuals, parameters, g, needed) -> (gradient of x, of parameters)`. The
        latter are rounded to the parameters' types, or None if they are not needed.
    """

    def value(static, x, parameters):
        return forward(static, x, parameters, None)[0]

    def forward_rule(static, x, parameters):
        # Residuals can hold only arrays, so their structure, () or None, informs the backward rule.
        needed = () if any(o.perturbed for o in jax.tree.leaves(parameters)) else None
        x, parameters = jax.tree.map(lambda operand: operand.value, (x, parameters))
        out, residuals = forward(static, x, parameters, needed is not None)
        return out, (residuals, parameters, needed)

    def backward_rule(static, saved, g):
        residuals, parameters, needed = saved
        g = jax.tree.map(as_array, g, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
        to_x, sums = backward(static, residuals, parameters, g, needed is not None)
        if sums is None:
            return to_x, jax.tree.map(lambda _: None, parameters)
        return to_x, jax.tree.map(lambda s, p: rounded(s, p.dtype), sums, parameters)

    value.__name__ = forward.__name__.removesuffix("_forward")  # compiled programs show it
    call = jax.custom_vjp(value, nondiff_argnums=(0,))
    call.defvjp(forward_rule, backward_rule, symbolic_zeros=True)
    return call


def as_array(g: Array | SymbolicZero) -> Array:
    """Convert a gradient that may be a symbolic zero to an array."""
    return jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g


def add_each(totals: Iterable[Array], terms: Iterable[Array]) -> list[Array]:
    """Return pairwise sums, for a `lax.reduce` of several arrays in one pass."""
    return [total + term for total, term in zip(totals, terms, strict=True)]


def rows(x: Array) -> Array:
    """Reshape `x` to a matrix by merging all axes but the last."""
    return x.reshape(-1, x.shape[-1])


@by_rows
def column_sum(g: Array) -> Array:
    """Sum f[..,C] over all axes but the last, in float32 or float64."""
    return widened(g)[0].sum(leading(g))


def rounded(total: Array, dtype: jnp.dtype) -> Array:
    """Return a sum in `dtype`, rounded once.

    A plain conversion would let XLA's TPU compiler sum in the narrower type.
    """
    if total.dtype == dtype:
        return total
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(total, kind.nexp, kind.nmant).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _repeated(count: int, row: Array) -> Array:
    return jnp.broadcast_to(row[None], (count, row.size))


_repeated.defvjp(
    lambda count, row: (_repeated(count, row), None),
    lambda count, _, g: (rounded(column_sum(g), g.dtype),),
)


def spread(parameter: Array, shape: Sequence[int]) -> Array:
    """Repeat `parameter`, whose axes are the last of `shape`, along the other axes.

    JAX's own gradient sums in the array's type: in bfloat16 the sum over 25,088 pixels stops
    growing after some hundreds, 36 to 97% too small. This one uses `column_sum`.
    """
    count = math.prod(shape) // parameter.size
    return _repeated(count, parameter.reshape(-1)).reshape(shape)


def add_bias(x: Array, bias: Array | None) -> Array:
    """Add a parameter of the last axes to `x`: a bias f[C], or positions f[1,N,C]."""
    return x if bias is None else x + spread(bias, x.shape)


def _in_pieces(row: Array, kernel: Array) -> Array:
    pieces = largest_divisor(row.shape[1], math.isqrt(row.shape[1]))
    parts = row.reshape(pieces, 1, -1) @ kernel.reshape(pieces, -1, kernel.shape[1])
    return parts.sum(0)


def _as_convolution(x: Array, kernel: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    one_pixel = x[:, None, None], kernel[None, None]
    out = lax.conv_general_dilated(*one_pixel, (1, 1), "VALID", dimension_numbers=numbers)
    return out[:, 0, 0]


def _product(x: Array, kernel: Array) -> Array:
    cpu: Callable[[Array, Array], Array] | None = None
    if x.dtype.itemsize >= 4 and len(x) == 1:
        # XLA's CPU back end sums a single row's terms one by one: 4,032 terms have an error of
        # 1.1e-6 (rms, relative), 63 pieces one of 1.7e-7, in no more time.
        cpu = _in_pieces
    elif x.dtype.itemsize >= 4 and kernel.size <= cpus.kind().own_products:
        cpu = _as_convolution  # XLA makes it a product after YNNPACK has taken its own
    return lax.platform_dependent(x, kernel, cpu=cpu, default=jnp.matmul) if cpu else x @ kernel


def _transposed_product(x: Array, y: Array) -> Array:
    """Compute `x.T @ y`, where `x` has no more columns than `y`."""

    def plain(x: Array, y: Array) -> Array:
        return x.T @ y

    def transposed_first(x: Array, y: Array) -> Array:
        return lax.optimization_barrier(x.T) @ y

    largest = cpus.kind().own_products
    if not largest or x.shape[1] * y.shape[1] <= largest or x.dtype.itemsize < 4:
        return plain(x, y)
    # YNNPACK skips products whose first operand must be transposed: 71 instead of 41 GFLOP/s.
    return lax.platform_dependent(x, y, cpu=transposed_first, default=plain)


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """Compute `x @ kernel` of two matrices."""
    return _product(x, kernel)


def _matmul_backward(residuals, g):
    x, kernel = residuals
    # XLA's CPU back end copies an operand that it must transpose, so transpose the narrow one: 6.2
    # instead of 11.2 ms for the gradient of a 384x96 kernel over 25088 rows.
    narrow = x.shape[1] <= g.shape[1]
    return _product(g, kernel.T), _transposed_product(x, g) if narrow else (g.T @ x).T


matmul.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _matmul_backward)
