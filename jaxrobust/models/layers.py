"""Layers as functions, each with the implementation that is fast on the platform it runs on.

On CPU an operation is fast when XLA compiles it alone and slow when XLA fuses it into its
neighbours: the sum of 49 shifted products takes 2.5 ms for 8x56x56x96, and 15 ms once the
normalisation behind it has pulled copies of that sum into its own loops. So every operation here
has a gradient of its own, keeps only its operands, and is compiled on CPU behind a *wall*: a call
that XLA does not inline. ConvNeXt-T at 224 pixels, batch 8, two cores, before and after: forward
pass 465 and 235 ms, input gradient 965 and 480 ms, adversarial training step with two attack steps
3.6 and 2.0 s (PyTorch 3.4 s), its buffers 2376 and 995 MB.
Elsewhere the same formulas are left to XLA's fusion.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

Array = jax.Array
_NHWC = ("NHWC", "HWIO", "NHWC")


def _walled(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` compiled as a computation of its own: nothing fuses across its boundary."""
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*operands: Array) -> Array:
        # `optimization_barrier` does not do this: it is gone before XLA's CPU back end fuses.
        with set_xla_metadata(inlineable="false"):
            return compiled(*operands)

    return call


def _per_platform(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, behind a wall on CPU."""
    walled = _walled(function)

    @functools.wraps(function)
    def call(*operands: Array) -> Array:
        return lax.platform_dependent(*operands, cpu=walled, default=function)

    return call


def _wide(*arrays: Array) -> tuple[Array, ...]:
    """`arrays` in float32, or float64 where they are that already."""
    return tuple(a if a.dtype == jnp.float64 else a.astype(jnp.float32) for a in arrays)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


@_per_platform
def _column_sum(g: Array) -> Array:
    return _wide(g)[0].sum(0)


# ---------------------------------------------------------------------------- depthwise convolution


def _xla_depthwise(x: Array, kernel: Array) -> Array:
    half = kernel.shape[0] // 2, kernel.shape[1] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=[(half[0], half[0]), (half[1], half[1])],
        dimension_numbers=_NHWC,
        feature_group_count=x.shape[-1],
    )


def _xla_kernel_gradient(x: Array, kernel: Array, g: Array) -> Array:
    return jax.vjp(lambda k: _xla_depthwise(x, k), kernel)[1](g)[0]


def _padded(x: Array, kernel: Array) -> Array:
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    return jnp.pad(_wide(x)[0], ((0, 0), (rows, rows), (columns, columns), (0, 0)))


@_walled
def _shifted_depthwise(x: Array, kernel: Array) -> Array:
    height, width = x.shape[1:3]
    padded, (weights,) = _padded(x, kernel), _wide(kernel)
    products = (
        padded[:, i : i + height, j : j + width] * weights[i, j][None, None]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _add_each(totals, terms):
    return [total + term for total, term in zip(totals, terms, strict=True)]


@_walled
def _shifted_kernel_gradient(x: Array, kernel: Array, g: Array) -> Array:
    height, width = x.shape[1:3]
    padded, (g,) = _padded(x, kernel), _wide(g)
    shifts = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    step = 2 * kernel.shape[1]
    sums = []
    # Two rows of the kernel in one reduction read `g` once for 14 products: 10 ms for 8x56x56x96.
    # One row takes 12 ms, the whole kernel 13, a reduction for each product 31 (PyTorch 34).
    # Summing each image first keeps the rounding error at 1e-6 of the largest entry.
    for group in (shifts[start : start + step] for start in range(0, len(shifts), step)):
        products = [padded[:, i : i + height, j : j + width] * g for i, j in group]
        sums += lax.reduce(products, [jnp.zeros((), g.dtype)] * len(group), _add_each, (1, 2))
    return jnp.stack(sums).sum(1).reshape(kernel.shape).astype(kernel.dtype)


def _summed_kernel_gradient(x: Array, kernel: Array, g: Array) -> Array:
    height, width = x.shape[1:3]
    padded, (g,) = _padded(x, kernel), _wide(g)
    sums = [
        (padded[:, i : i + height, j : j + width] * g).sum((0, 1, 2))
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


# name -> (forward, gradient of the kernel); the input gradient is the forward pass with a flipped
# kernel because windows are odd and padding is symmetric.
_DEPTHWISE: dict[str, tuple[Callable, Callable]] = {
    "shifted": (_shifted_depthwise, _shifted_kernel_gradient),
    "xla": (_xla_depthwise, _xla_kernel_gradient),
    "mixed": (_xla_depthwise, _summed_kernel_gradient),
}
_DEPTHWISE_ON = {"cpu": "shifted", "cuda": "mixed", "rocm": "mixed", "default": "xla"}


def _depthwise_rule(part: int, implementation: str | None, *operands: Array) -> Array:
    if implementation is not None:
        return _DEPTHWISE[implementation][part](*operands)
    # Inside the rules of the custom gradient: differentiating through a choice of platform would
    # keep the residuals of every branch.
    rules = {platform: _DEPTHWISE[name][part] for platform, name in _DEPTHWISE_ON.items()}
    return lax.platform_dependent(*operands, **rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise(implementation: str | None, x: Array, kernel: Array) -> Array:
    return _depthwise_rule(0, implementation, x, kernel)


def _depthwise_forward(implementation, x, kernel):
    return _depthwise_rule(0, implementation, x, kernel), (x, kernel)


def _depthwise_backward(implementation, residuals, g):
    x, kernel = residuals
    return (
        _depthwise_rule(0, implementation, g, kernel[::-1, ::-1]),
        _depthwise_rule(1, implementation, x, kernel, g),
    )


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_conv(
    x: Array, kernel: Array, bias: Array | None = None, *, implementation: str | None = None
) -> Array:
    """Depthwise convolution of f[B,H,W,C] with f[kh,kw,1,C], stride 1, zero padding `k // 2`.

    kh and kw are odd. `implementation` is a name in `_DEPTHWISE`; None chooses by platform.
    """
    out = _depthwise(implementation, x, kernel)
    return out if bias is None else out + bias[None, None, None]


# -------------------------------------------------------------------------------------- layer norm


def _normalise(x: Array, eps: Array) -> tuple[Array, Array]:
    (wide,) = _wide(x)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    inverse = lax.rsqrt(variance + eps)
    return centred * inverse, inverse


@_per_platform
def _norm_forward(x: Array, scale: Array, bias: Array, eps: Array) -> Array:
    scale, bias = _wide(scale[None], bias[None])
    return (_normalise(x, eps)[0] * scale + bias).astype(x.dtype)


@_per_platform
def _norm_input_gradient(x: Array, scale: Array, eps: Array, g: Array) -> Array:
    normal, inverse = _normalise(x, eps)
    g, scale = _wide(g, scale[None])
    g = g * scale
    g = g - g.mean(-1, keepdims=True) - normal * (normal * g).mean(-1, keepdims=True)
    return (inverse * g).astype(x.dtype)


@_per_platform
def _norm_scale_gradient(x: Array, eps: Array, g: Array) -> Array:
    return (_normalise(x, eps)[0] * _wide(g)[0]).sum(0)


@jax.custom_vjp
def _norm(x: Array, scale: Array, bias: Array, eps: Array) -> Array:
    return _norm_forward(x, scale, bias, eps)


def _norm_backward(residuals, g):
    # Statistics are computed again: 0.2 ms for 25088x96, less than reading stored ones back in.
    x, scale, bias, eps = residuals
    return (
        _norm_input_gradient(x, scale, eps, g),
        _norm_scale_gradient(x, eps, g).astype(scale.dtype),
        _column_sum(g).astype(bias.dtype),
        jnp.zeros_like(eps),
    )


_norm.defvjp(lambda *operands: (_norm_forward(*operands), operands), _norm_backward)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float = 1e-6) -> Array:
    """`x` normalised over its last axis (biased variance), then scaled and shifted."""
    epsilon = jnp.asarray(eps, _wide(x)[0].dtype)
    return _norm(_rows(x), scale, bias, epsilon).reshape(x.shape)


# ------------------------------------------------------------------------------ GELU and residual


def _normal_cdf(x: Array) -> Array:
    # 2 ms for 25088x384; through `erfc`, as `jax.nn.gelu` has it, 4.7 ms.
    return 0.5 + 0.5 * lax.erf(x * 0.5**0.5)


@_per_platform
def _gelu_forward(x: Array, bias: Array) -> Array:
    wide, bias = _wide(x, bias[None])
    wide = wide + bias
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@_per_platform
def _gelu_input_gradient(x: Array, bias: Array, g: Array) -> Array:
    wide, bias, g = _wide(x, bias[None], g)
    wide = wide + bias
    density = 0.3989422804014327 * jnp.exp(-0.5 * wide * wide)
    return (g * (_normal_cdf(wide) + wide * density)).astype(x.dtype)


@jax.custom_vjp
def _gelu(x: Array, bias: Array) -> Array:
    return _gelu_forward(x, bias)


def _gelu_backward(residuals, g):
    x, bias = residuals
    dx = _gelu_input_gradient(x, bias, g)
    return dx, _column_sum(dx).astype(bias.dtype)


_gelu.defvjp(lambda *operands: (_gelu_forward(*operands), operands), _gelu_backward)


def gelu(x: Array, bias: Array | None = None) -> Array:
    """Exact (erf) GELU of `x + bias`; taking the bias along saves a pass over `x`."""
    bias = jnp.zeros(x.shape[-1:], x.dtype) if bias is None else bias
    return _gelu(_rows(x), bias).reshape(x.shape)


@_per_platform
def _residual_forward(x: Array, y: Array, bias: Array, gamma: Array) -> Array:
    return x + (y + bias[None]) * gamma[None]


@_per_platform
def _residual_branch_gradient(gamma: Array, g: Array) -> Array:
    return g * gamma[None]


@_per_platform
def _product_sum(y: Array, g: Array) -> Array:
    y, g = _wide(y, g)
    return (y * g).sum(0)


@jax.custom_vjp
def _residual(x: Array, y: Array, bias: Array, gamma: Array) -> Array:
    return _residual_forward(x, y, bias, gamma)


def _residual_backward(residuals, g):
    y, bias, gamma = residuals
    total = _column_sum(g)
    wide_bias, wide_gamma = _wide(bias, gamma)
    return (
        g,
        _residual_branch_gradient(gamma, g),
        (total * wide_gamma).astype(bias.dtype),
        (_product_sum(y, g) + wide_bias * total).astype(gamma.dtype),
    )


_residual.defvjp(lambda x, *branch: (_residual_forward(x, *branch), branch), _residual_backward)


def scaled_residual(x: Array, y: Array, bias: Array, gamma: Array) -> Array:
    """`x + (y + bias) * gamma` with `bias` and `gamma` f[C]: the end of a ConvNeXt block."""
    return _residual(_rows(x), _rows(y), bias, gamma).reshape(x.shape)


# ---------------------------------------------------------------------- linear and convolution


@jax.custom_vjp
def _matmul(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _matmul_backward(residuals, g):
    x, kernel = residuals
    # XLA's CPU back end copies the operand that it has to transpose, so let that be the narrow one:
    # 6.2 instead of 11.2 ms for the gradient of a 384x96 kernel over 25088 rows.
    narrow = x.shape[1] <= g.shape[1]
    return g @ kernel.T, x.T @ g if narrow else (g.T @ x).T


_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """`x @ kernel + bias` over the last axis; `kernel` is f[in,out]."""
    out = _matmul(_rows(x), kernel).reshape(*x.shape[:-1], kernel.shape[1])
    return out if bias is None else out + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _xla_conv(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    pad = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=_NHWC)


def _patch_conv(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Windows that neither overlap nor leave a rest: one product of matrices."""
    del padding
    batch, height, width, channels = x.shape
    grid = batch, height // stride, width // stride

    @_walled
    def patches(x: Array) -> Array:
        x = x.reshape(*grid[:2], stride, grid[2], stride, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, stride * stride * channels)

    out = _matmul(patches(x), kernel.reshape(-1, kernel.shape[3]))
    return out.reshape(*grid, kernel.shape[3])


def _tap_conv(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """One product of matrices for each entry of the window."""
    rows, columns, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    batch, height, width = x.shape[0], x.shape[1] - rows + 1, x.shape[2] - columns + 1
    products: list[Array] = []
    for i in range(rows):
        for j in range(columns):
            tap = x[:, i : i + height : stride, j : j + width : stride]
            products += _wide(tap.reshape(-1, channels) @ kernel[i, j])
    grid = batch, -(-height // stride), -(-width // stride)
    return functools.reduce(jnp.add, products).reshape(*grid, features).astype(x.dtype)


def _cpu_convs(x: Array, kernel: Array, stride: int, padding: int) -> tuple[Callable, Callable]:
    """The formulas for the value and for the gradients.

    2x2 stride 2, 8x56x56x96 to 192 channels: patches 2.6, input gradient 2.2, kernel gradient 4.0
    ms; XLA's convolution 4.5, 2.6 and 11.2. 3x3 stride 2, 8x112x112x48 to 96: taps 12, 7.6 and 9.3;
    XLA 9.3, 14.4 and 17.2.
    """
    fits = kernel.shape[:2] == (stride, stride) and not (x.shape[1] % stride or x.shape[2] % stride)
    if fits and padding == 0:
        return _patch_conv, _patch_conv
    return _xla_conv, _tap_conv if stride > 1 else _xla_conv


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    def rule(formula):
        return lambda x, kernel: formula(x, kernel, stride, padding)

    value, _ = _cpu_convs(x, kernel, stride, padding)
    return lax.platform_dependent(x, kernel, cpu=rule(value), default=rule(_xla_conv))


def _conv_backward(stride, padding, residuals, g):
    x, kernel = residuals
    _, formula = _cpu_convs(x, kernel, stride, padding)

    def input_rule(formula):
        def gradient(x, kernel, g):
            return jax.vjp(lambda x: formula(x, kernel, stride, padding), x)[1](g)[0]

        return gradient

    def kernel_rule(formula):
        def gradient(x, kernel, g):
            return jax.vjp(lambda kernel: formula(x, kernel, stride, padding), kernel)[1](g)[0]

        return gradient

    return tuple(
        lax.platform_dependent(x, kernel, g, cpu=rule(formula), default=rule(_xla_conv))
        for rule in (input_rule, kernel_rule)
    )


_conv.defvjp(lambda x, kernel, *rest: (_conv(x, kernel, *rest), (x, kernel)), _conv_backward)


def conv(
    x: Array, kernel: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0
) -> Array:
    """Convolution of f[B,H,W,in] with f[kh,kw,in,out], symmetric zero padding."""
    out = _conv(x, kernel, stride, padding)
    return out if bias is None else out + bias[None, None, None]
