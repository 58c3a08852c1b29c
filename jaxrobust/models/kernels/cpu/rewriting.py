"""Rewrites any network's convolutions and GELUs to be fast on CPU inside attack loops.

XLA's CPU back end computes a convolution of f[B,H,W,in] with f[kh,kw,in,out] by blocked matrix
products, and one in any other layout by plain loops. Its pass that changes layouts visits only a
program's entry computation, not the bodies of loops. Networks in NCHW are slow there, and so is the
gradient of any network: JAX's rule writes its kernel as f[kh,kw,out,in]. Value and gradient in a
loop, microseconds per image on one core, before and after: three 3x3 stride-2 convolutions of CIFAR
images 186 and 48 (NCHW 555 and 51); a residual block of 64 channels at 32x32 8329 and 1628 (NCHW
187500 and 1496); a separable one 2009 and 314.

`jax.nn.gelu` is a product with `erfc`, which computes an exponential, two quotients and three
polynomials for each number. PyTorch's formula uses `erf`, one quotient of two polynomials. The same
three convolutions with GELUs, microseconds per image before and after: value 36 and 24, value and
gradient 62 and 50.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal
from jax.extend.core.primitives import conv_general_dilated_p, erfc_p, jit_p, mul_p, neg_p, remat_p

from jaxrobust.models.kernels import winograd
from jaxrobust.models.kernels.convolutions import depthwise_conv, few_channels, in_tiles
from jaxrobust.models.kernels.windows import column_conv
from jaxrobust.types import Array

Settings = tuple[
    tuple[str, Any], ...
]  # arguments of `lax.conv_general_dilated` other than operands


def _plain(settings: Settings, x: Array, kernel: Array) -> Array:
    last, spatial = x.ndim - 1, range(1, x.ndim - 1)
    image, weights = (0, last, *spatial), (last, last - 1, *range(last - 1))
    numbers = lax.ConvDimensionNumbers(image, weights, image)
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **dict(settings))


def _value(settings: Settings, x: Array, kernel: Array) -> Array:
    p = dict(settings)
    strides, dilations = (
        set(p["window_strides"]),
        {*p["lhs_dilation"], *p["rhs_dilation"]},
    )
    typed = winograd.of_own_type(p["preferred_element_type"], x) and p["precision"] is None
    even = len(strides) == p["feature_group_count"] == 1 and dilations == {1}
    inside = x.ndim == 4 and min(map(min, p["padding"])) >= 0
    if not (typed and even and inside and few_channels(x, kernel)):
        return _plain(settings, x, kernel)
    wider = jnp.pad(x, ((0, 0), *p["padding"], (0, 0)))
    return column_conv(wider, kernel, strides.pop(), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(settings: Settings, x: Array, kernel: Array) -> Array:
    return _value(settings, x, kernel)


def _convolve_backward(settings, residuals, g):
    x, kernel = residuals

    # JAX's own gradients: convolutions in other layouts, which are rewritten in turn.
    def input_gradient(kernel, g):
        return jax.linear_transpose(lambda x: _plain(settings, x, kernel), x)(g)[0]

    def kernel_gradient(x, g):
        return jax.linear_transpose(lambda kernel: _plain(settings, x, kernel), kernel)(g)[0]

    return (
        fast_formulas(input_gradient)(kernel, g),
        fast_formulas(kernel_gradient)(x, g),
    )


_convolve.defvjp(
    lambda settings, x, kernel: (_value(settings, x, kernel), (x, kernel)), _convolve_backward
)


def _types(eqn: JaxprEqn) -> list[Any]:
    return [operand.aval for operand in eqn.invars]


def _windows(eqn: JaxprEqn) -> list[tuple[int, int, int]]:
    """Return start, stop and stride per axis of the `depthwise_conv` outputs that `eqn` keeps."""
    x, kernel = (operand.shape for operand in _types(eqn))
    lhs, rhs, _ = eqn.params["dimension_numbers"]
    windows = []
    for axis, tap, (low, high), stride in zip(
        lhs[2:], rhs[2:], eqn.params["padding"], eqn.params["window_strides"], strict=True
    ):
        start = kernel[tap] // 2 - low
        reach = (x[axis] + low + high - kernel[tap]) // stride * stride
        inside = kernel[tap] % 2 and min(start, reach) >= 0 and start + reach < x[axis]
        windows += [(start, start + reach + 1, stride)] * inside
    return windows


def _depthwise(windows: list[tuple[int, int, int]], x: Array, kernel: Array) -> Array:
    rows, columns = (slice(*window) for window in windows)
    return depthwise_conv(x, kernel)[:, rows, columns]


def _fast_formula(
    eqn: JaxprEqn, tiles: winograd.Formula | None
) -> Callable[[Array, Array], Array] | None:
    """Return a fast formula of `eqn` for f[B,H,W,in] and f[kh,kw,in,out]; None: leave it alone."""
    settings = {k: v for k, v in eqn.params.items() if k != "dimension_numbers"}
    x, kernel = _types(eqn)
    floating = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype == kernel.dtype
    if not (floating and x.ndim in (3, 4) and settings["batch_group_count"] == 1):
        return None
    sharding = settings.get("out_sharding")
    if sharding is not None and any(sharding.spec):  # a mesh with explicit axes
        return None
    lhs, rhs, _ = eqn.params["dimension_numbers"]
    groups, channels = settings["feature_group_count"], x.shape[lhs[1]]
    features = kernel.shape[rhs[0]]
    if 1 < groups == channels == features and x.ndim == 4:
        dilated = {*settings["lhs_dilation"], *settings["rhs_dilation"]} != {1}
        wanted, windows = settings["preferred_element_type"], _windows(eqn)
        if not dilated and len(windows) == 2 and winograd.of_own_type(wanted, x):
            return functools.partial(_depthwise, windows)
    # XLA's blocks are slower than its plain loops for 4 channels per group: 16x32x32x64, 3x3, 15.9
    # and 9.6 ms; faster with 8, 5.1 and 12.4 ms (16x16x16x128), or 32, 6.5 and 112 (8x32x32x64).
    if groups > 1 and min(channels, features) < 8 * groups:
        return None
    if tiles and x.ndim == 4 and winograd.applies(settings, *_in_place(eqn)):
        return functools.partial(tiles, tuple(settings["padding"]))
    return functools.partial(_convolve, tuple(settings.items()))


def _in_place(eqn: JaxprEqn) -> list[jax.ShapeDtypeStruct]:
    """Return the operands' shapes and types as [B,H,W,in] and [kh,kw,in,out]."""
    (batch, channel, *spatial), (to, of, *taps), _ = eqn.params["dimension_numbers"]
    orders = (batch, *spatial, channel), (*taps, of, to)
    return [
        jax.ShapeDtypeStruct([operand.shape[axis] for axis in order], operand.dtype)
        for operand, order in zip(_types(eqn), orders, strict=True)
    ]


def _in_layout(formula: Callable, numbers: Any, x: Array, kernel: Array) -> list[Array]:
    (batch, channel, *spatial), (to, of, *taps), out = numbers
    x, kernel = jnp.transpose(x, (batch, *spatial, channel)), jnp.transpose(kernel, (*taps, of, to))
    axes = out[0], *out[2:], out[1]
    return [jnp.transpose(formula(x, kernel), [axes.index(i) for i in range(x.ndim)])]


def _gelu(x: Array) -> Array:
    return x * (0.5 + 0.5 * lax.erf(x * 0.5**0.5))


def _gelus(jaxpr: Any) -> dict[Any, Any]:
    """Map each result of `jax.nn.gelu` in float32, (0.5 * x) * erfc(-x * 0.5**0.5), to its x."""
    makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def operands(primitive: Any, atom: Any) -> Any:
        eqn = None if isinstance(atom, Literal) else makers.get(atom)
        return eqn.invars if eqn and eqn.primitive is primitive else []

    def factors(atom: Any) -> Any:
        pair = operands(mul_p, atom)
        return [pair, pair[::-1]] if pair else []

    def scaled(atom: Any, by: float) -> Any:
        """Return x if `atom` is x * by."""
        for x, y in factors(atom):
            if isinstance(y, Literal) and y.val == np.float32(by):
                return x
        return None

    gelus: dict[Any, Any] = {}
    for result in makers:
        for half, tail in factors(result):
            x, minus = scaled(half, 0.5), [scaled(z, 0.5**0.5) for z in operands(erfc_p, tail)]
            of = [z for negative in minus for z in operands(neg_p, negative)]
            if of and of[0] is x and x.aval.dtype == np.float32:
                gelus[result] = x
    return gelus


def _replacement(eqn: JaxprEqn, tiles: winograd.Formula | None) -> Callable[..., list[Any]] | None:
    """Rewrite `eqn` with faster formulas; None if it contains nothing to replace."""
    if eqn.primitive is conv_general_dilated_p:
        formula = _fast_formula(eqn, tiles)
        numbers = eqn.params["dimension_numbers"]
        return None if formula is None else functools.partial(_in_layout, formula, numbers)
    if eqn.primitive is jit_p or (eqn.primitive is remat_p and not eqn.params["differentiated"]):
        jaxpr = eqn.params["jaxpr"]
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        if not _improves(jaxpr, tiles):
            return None
        inner = functools.partial(_evaluate, jaxpr, consts, tiles=tiles)
        if eqn.primitive is jit_p:
            return inner
        options = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
        return jax.checkpoint(inner, **options)
    return None


def _improves(jaxpr: Any, tiles: winograd.Formula | None) -> bool:
    return bool(_gelus(jaxpr)) or any(_replacement(eqn, tiles) for eqn in jaxpr.eqns)


def _evaluate(jaxpr: Any, consts: Any, *operands: Any, tiles: winograd.Formula | None) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *operands], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    gelus = _gelus(jaxpr)
    for eqn in jaxpr.eqns:
        arguments, replacement = map(read, eqn.invars), _replacement(eqn, tiles)
        if of := [gelus[var] for var in eqn.outvars if var in gelus]:
            arguments, replacement = map(read, of), lambda x: [_gelu(x)]
        with eqn.ctx.manager:  # XLA metadata, such as the barriers of `models.layers`
            results = replacement(*arguments) if replacement else _bound(eqn, arguments)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bound(eqn: JaxprEqn, arguments: Iterable[Any]) -> list[Any]:
    parameters = eqn.primitive.get_bind_params(eqn.params)
    results = eqn.primitive.bind(*arguments, **parameters)
    return results if eqn.primitive.multiple_results else [results]


def fast_formulas(
    function: Callable[..., Any], *, tiles: winograd.Formula | None = None
) -> Callable[..., Any]:
    """Return `function` with convolutions, GELUs and gradients that are fast in a loop on CPU.

    One- and two-dimensional convolutions change their layout, depthwise ones become
    `models.convolutions.depthwise_conv`, and `jax.nn.gelu` in float32 is computed as in PyTorch.
    Values and gradients change only by rounding. It rewrites inside `jit` and `jax.checkpoint`, but
    not in `scan`, `while_loop`, `cond`, `shard_map` and functions with custom gradients, and does
    nothing if `function` has effects. A replaced convolution has no forward-mode derivative. Do not
    use it on other platforms: XLA chooses layouts well there.

    Args:
      function: takes and returns pytrees of arrays, e.g. a `LogitsFn`; it may close over tracers.
      tiles: a formula for 3x3 convolutions, ours included. Its transformed weights pay off only if
        many steps use them, see `before_a_loop`; they are not used if `too_large`. None: use no
        other formula.
    """

    def traced(tiles: winograd.Formula | None, operands: Any) -> Any:
        def new(*operands):  # JAX caches traces by function
            return function(*operands)

        context: Any = in_tiles(tiles) if tiles else contextlib.nullcontext([])
        with context as kernels:
            return kernels, *jax.make_jaxpr(new, return_shape=True)(*operands)

    @functools.wraps(function)
    def fast(*operands):
        kernels, closed, shapes = traced(tiles, operands)
        if too_large(kernels):
            kernels, closed, shapes = traced(None, operands)
        if closed.effects or not (kernels or _improves(closed.jaxpr, tiles)):
            return function(*operands)
        leaves = jax.tree.leaves(operands)
        results = _evaluate(closed.jaxpr, closed.consts, *leaves, tiles=tiles)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return fast


_LARGER = 4  # times its inputs' size, above which a result is left in the loop


def before_a_loop(
    function: Callable[..., Array], *operands: Any
) -> tuple[Callable[[], list[Array]], Callable[..., Array]]:
    """Split `function` for a loop: what depends only on its weights, and the rest.

    XLA leaves in the loop whatever is larger than its inputs, so each step would transform all
    weights again. Much larger results, such as a bias for all pixels, do stay inside, where they
    are fused with their users.

    Args:
      function: returns one array; closes over arrays and tracers.
      *operands: the loop's operands, or their shapes; the result is for these shapes.
    Returns:
      A function that makes the arrays, and a function of these and the operands for the loop.
    """
    closed: Any = jax.make_jaxpr(function)(*operands)  # types of its parts depend on JAX's version
    jaxpr, constants = closed.jaxpr, dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    sizes = {var: math.prod(var.aval.shape) for var in jaxpr.constvars}
    outside, inside = [], []
    for eqn in jaxpr.eqns:
        sources = [sizes.get(v, 0) for v in eqn.invars if not isinstance(v, Literal)]
        largest = sum(math.prod(v.aval.shape) for v in eqn.outvars)
        if eqn.effects or min(sources, default=0) == 0 or largest > _LARGER * max(sources):
            inside.append(eqn)
        else:
            outside.append(eqn)
            sizes |= dict.fromkeys(eqn.outvars, max(sources))
    read = {v for eqn in inside for v in eqn.invars if not isinstance(v, Literal)}
    read |= {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    shared = [v for eqn in outside for v in eqn.outvars if v in read]
    loop = jaxpr.replace(eqns=inside, constvars=[*constants, *shared])

    def make() -> list[Array]:
        values = dict(constants)
        for eqn in outside:
            with eqn.ctx.manager:
                arguments = (v.val if isinstance(v, Literal) else values[v] for v in eqn.invars)
                values.update(zip(eqn.outvars, _bound(eqn, arguments), strict=True))
        return [values[v] for v in shared]

    def body(arrays: list[Array], *operands: Any) -> Array:
        leaves = jax.tree.leaves(operands)
        return _evaluate(loop, [*constants.values(), *arrays], *leaves, tiles=None)[0]

    return make, body


SHARE = 4  # transformed weights may take one part in this many of the machine's memory


def too_large(kernels: Sequence[Array]) -> bool:
    """Return whether transformed kernels take more than a quarter of the machine's memory.

    Each device of the process holds its own copy.
    """
    times = max(winograd.growth(m) for m in winograd.TILES) * jax.local_device_count()
    transformed = times * sum(k.size * k.dtype.itemsize for k in kernels)
    return transformed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / SHARE


def ready(function: Callable[[Array], Array], images: Array) -> Callable[[Array], Array]:
    """Return a network, as a function of images of this shape, that is fast in attacks on CPU.

    The weights of its 3x3 convolutions are transformed here, once, if that pays off. Values and
    gradients change only by rounding, 2e-6 of the largest. Do not use it on other platforms.
    """

    def new(x):  # JAX caches traces by function
        return function(x)

    with in_tiles() as kernels:
        make, body = before_a_loop(new, jax.ShapeDtypeStruct(images.shape, images.dtype))
    if not kernels or too_large(kernels):
        return function
    arrays, usual = make(), (images.shape, images.dtype)
    return lambda x: body(arrays, x) if (x.shape, x.dtype) == usual else function(x)
