"""Layers as functions, each with an implementation that is fast on its platform.

On CPU an operation is fast when XLA compiles it alone and slow when XLA fuses it into its
neighbors: the sum of 49 shifted products takes 2.5 ms for 8x56x56x96, and 15 ms once the
normalization after it has pulled copies of that sum into its own loops. So every operation here has
a hand-written gradient, keeps only its operands, and is compiled on CPU behind a *wall*: a call
that XLA does not inline. ConvNeXt-T at 224 pixels, batch 8, two cores, before and after: forward
pass 465 and 235 ms, input gradient 965 and 480 ms, adversarial training step with two attack steps
3.6 and 2.0 s (PyTorch 3.4 s), its buffers 2376 and 995 MB. On other platforms, XLA fuses the same
formulas.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxrobust.models.kernels import cuda, tpu
from jaxrobust.models.kernels.primitives import (
    add_bias,
    along,
    by_rows,
    column_sum,
    error_function,
    leading,
    matmul,
    rounded,
    rows,
    takes_xla,
    widened,
    with_gradient,
)

Array = jax.Array
Path = Callable[[Array], Array]  # stochastic depth of a branch f[B,..]
_TILE = 8  # rows in a TPU's tile


# -------------------------------------------------------------------------------------- layer norm


def _normalise(x: Array, eps: Array) -> tuple[Array, Array]:
    (wide,) = widened(x)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    inverse = lax.rsqrt(variance + eps)
    return centred * inverse, inverse


@by_rows
def _norm_forward(x: Array, scale: Array, bias: Array, eps: Array) -> Array:
    scale, bias = widened(along(scale, x), along(bias, x))
    return (_normalise(x, eps)[0] * scale + bias).astype(x.dtype)


@by_rows
def _norm_input_gradient(x: Array, scale: Array, eps: Array, g: Array) -> Array:
    normal, inverse = _normalise(x, eps)
    g, scale = widened(g, along(scale, x))
    g = g * scale
    g = g - g.mean(-1, keepdims=True) - normal * (normal * g).mean(-1, keepdims=True)
    return (inverse * g).astype(x.dtype)


@by_rows
def _norm_scale_gradient(x: Array, eps: Array, g: Array) -> Array:
    return (_normalise(x, eps)[0] * widened(g)[0]).sum(leading(x))


@jax.custom_vjp
def _norm(x: Array, scale: Array, bias: Array, eps: Array) -> Array:
    return _norm_forward(x, scale, bias, eps)


def _norm_backward(residuals, g):
    # Statistics are recomputed: 0.2 ms for 25088x96, less than reading stored ones.
    x, scale, bias, eps = residuals
    return (
        _norm_input_gradient(x, scale, eps, g),
        rounded(_norm_scale_gradient(x, eps, g), scale.dtype),
        rounded(column_sum(g), bias.dtype),
        jnp.zeros_like(eps),
    )


_norm.defvjp(lambda *operands: (_norm_forward(*operands), operands), _norm_backward)


def _token_norm(static, x, affine, needed):
    eps, with_tokens = static
    y = tpu.token_norm.forward(x, *affine, eps=eps)
    # Otherwise XLA may make images the rows of the residual stream, and copy it for each kernel.
    tokens = [with_layout_constraint(x, Layout(tuple(range(x.ndim))))] if with_tokens else []
    return [y, *tokens], x


def _token_norm_backward(static, x, affine, gradients, needed):
    return tpu.token_norm.backward(x, gradients, affine[0], eps=static[0], needed=needed)


_norm_kernel = with_gradient(_token_norm, _token_norm_backward)


def _norm_of(
    x: Array, scale: Array, bias: Array, eps: float, *, plain: bool, with_tokens: bool = False
) -> list[Array]:
    def formula(x, scale, bias):
        y = _norm(x, scale, bias, jnp.asarray(eps, widened(x)[0].dtype))
        return [y, x] if with_tokens else [y]

    def on_tpu(x, *affine):
        return _norm_kernel((eps, with_tokens), x, affine)

    if plain:
        return formula(x, scale, bias)
    return lax.platform_dependent(x, scale, bias, tpu=on_tpu, default=formula)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float = 1e-6) -> Array:
    """Normalize `x` over its last axis (biased variance), then scale and shift it.

    For tokens f[B,N,C], it is a kernel on TPUs. A map's norm precedes a GELU or a convolution, and
    the compiler joins the two in one loop: 5.1 instead of 5.7 ms for the image gradient of a
    ConvStem.
    """
    plain = x.ndim != 3 or bool(tpu.token_norm.refused(x))
    return _norm_of(x, scale, bias, eps, plain=plain)[0]


def norm_and_tokens(x: Array, scale: Array, bias: Array, eps: float = 1e-6) -> tuple[Array, Array]:
    """Return `layer_norm` of f[B,..,N,C] and `x` itself, for the residual that follows.

    On TPUs the kernel of the gradient then sums the gradients of both.
    """
    plain = takes_xla("a LayerNorm over tokens", tpu.token_norm.refused(x))
    y, x = _norm_of(x, scale, bias, eps, plain=plain, with_tokens=True)
    return y, x


# ------------------------------------------------------------------------------ GELU and residual


def _normal_cdf(x: Array, dtype: jnp.dtype) -> Array:
    """Compute the normal distribution function, for a result of type `dtype`."""

    def formula(x: Array, exact: bool = True) -> Array:
        # 2 ms for 25088x384; `erfc`, as in `jax.nn.gelu`, takes 4.7 ms
        return 0.5 + 0.5 * error_function(x, exact)

    if dtype != jnp.bfloat16:
        return formula(x)
    # XLA's `erf` keeps a TPU's vector units busy while its matrix units wait for a GELU.
    return lax.platform_dependent(x, tpu=lambda x: formula(x, exact=False), default=formula)


@by_rows
def _gelu_forward(x: Array, bias: Array) -> Array:
    wide, bias = widened(x, along(bias, x))
    wide = wide + bias
    return (wide * _normal_cdf(wide, x.dtype)).astype(x.dtype)


@by_rows
def _gelu_input_gradient(x: Array, bias: Array, g: Array) -> Array:
    wide, bias, g = widened(x, along(bias, x), g)
    wide = wide + bias
    density = 0.3989422804014327 * jnp.exp(-0.5 * wide * wide)
    return (g * (_normal_cdf(wide, x.dtype) + wide * density)).astype(x.dtype)


@jax.custom_vjp
def _gelu(x: Array, bias: Array) -> Array:
    return _gelu_forward(x, bias)


def _gelu_backward(residuals, g):
    x, bias = residuals
    dx = _gelu_input_gradient(x, bias, g)
    return dx, rounded(column_sum(dx), bias.dtype)


_gelu.defvjp(lambda *operands: (_gelu_forward(*operands), operands), _gelu_backward)


def gelu(x: Array, bias: Array | None = None) -> Array:
    """Compute the exact (erf) GELU of `x + bias`; including the bias saves a pass over `x`."""
    bias = jnp.zeros(x.shape[-1:], x.dtype) if bias is None else bias
    return _gelu(x, bias)


@jax.custom_vjp
def _gelu_with_slopes(x: Array, bias: Array) -> Array:
    return _gelu_forward(x, bias)


def _store_slopes(x, bias):
    slopes = _gelu_input_gradient(x, bias, jnp.ones((), x.dtype))
    # Without the barrier, XLA would compute them where they are multiplied, in a kernel of its own.
    return _gelu_forward(x, bias), (lax.optimization_barrier(slopes), bias)


def _slopes_backward(residuals, g):
    slopes, bias = residuals
    dx = g * slopes
    return dx, rounded(column_sum(dx), bias.dtype)


_gelu_with_slopes.defvjp(_store_slopes, _slopes_backward)


def product_gelu(x: Array, bias: Array) -> Array:
    """Compute `gelu(x + bias)` between two products, in float32 inside."""
    return (_gelu_with_slopes if cuda.hopper.stores_slopes(x) else _gelu)(x, bias)


def relu(x: Array) -> Array:
    """Return the larger of `x` and 0; NaN stays NaN, and the gradient at 0 is 0.

    Not `jax.nn.relu`: where its `maximum` meets a sum, as in pooling, XLA's CPU back end (jaxlib
    0.10.2) turns NaN into 0, and a broken network has logits that look fine.
    """
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


@by_rows
def _residual_forward(x: Array, y: Array, bias: Array, gamma: Array) -> Array:
    return x + (y + along(bias, y)) * along(gamma, y)


@by_rows
def _residual_branch_gradient(gamma: Array, g: Array) -> Array:
    return g * along(gamma, g)


@by_rows
def _product_sum(y: Array, g: Array) -> Array:
    y, g = widened(y, g)
    return (y * g).sum(leading(y))


@jax.custom_vjp
def scaled_residual(x: Array, y: Array, bias: Array, gamma: Array) -> Array:
    """Compute `x + (y + bias) * gamma`, `bias` and `gamma` f[C]: the end of a ConvNeXt block."""
    return _residual_forward(x, y, bias, gamma)


def _residual_backward(residuals, g):
    y, bias, gamma = residuals
    total = column_sum(g)
    wide_bias, wide_gamma = widened(bias, gamma)
    return (
        g,
        _residual_branch_gradient(gamma, g),
        rounded(total * wide_gamma, bias.dtype),
        rounded(_product_sum(y, g) + wide_bias * total, gamma.dtype),
    )


scaled_residual.defvjp(
    lambda x, *branch: (_residual_forward(x, *branch), branch), _residual_backward
)


def residual(x: Array, y: Array, bias: Array, gamma: Array | None, path: Path | None) -> Array:
    """Compute `x + path((y + bias) * gamma)`; None: no layer scale, no path."""
    if gamma is None:
        y = add_bias(y, bias)
        return x + (y if path is None else path(y))
    if path is None:
        return scaled_residual(x, y, bias, gamma)
    return x + path(scaled_residual(jnp.zeros_like(x), y, bias, gamma))


@jax.custom_vjp
def scale(x: Array, gamma: Array) -> Array:
    """Multiply `x` by `gamma` f[C]."""
    return x * along(gamma, x)


def _scale_backward(residuals, g):
    x, gamma = residuals
    return _residual_branch_gradient(gamma, g), rounded(_product_sum(x, g), gamma.dtype)


scale.defvjp(lambda x, gamma: (scale(x, gamma), (x, gamma)), _scale_backward)


# ----------------------------------------------------------------------------------------- linear


def _without_copies(x: Array, kernel: Array) -> Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Compute `x @ kernel + bias` over the last axis; `kernel` is f[in,out].

    TPUs store 197 tokens, or a window's 49, in tiles of 8, and would copy them into rows and back.
    Without these copies, Swin-B's blocks take 9 to 11% fewer cycles in an attack, and a step of
    ViT-S with `scan` 103.1 instead of 106.0 ms.
    """

    def by_rows(x, kernel):
        return matmul(rows(x), kernel).reshape(*x.shape[:-1], kernel.shape[1])

    if x.ndim > 2 and x.shape[-2] % _TILE:
        out = lax.platform_dependent(x, kernel, tpu=_without_copies, default=by_rows)
    else:
        out = by_rows(x, kernel)
    return add_bias(out, bias)


@jax.custom_vjp
def _linear_residual(x, h, kernel, bias, gamma, factors):
    (wide_kernel, wide_bias, wide_gamma) = widened(kernel, bias, gamma)
    scaled = (wide_kernel * wide_gamma[None]).astype(kernel.dtype)
    (branch,) = widened(lax.dot_general(h, scaled, (((2,), (0,)), ((), ()))))
    branch = branch + along(wide_bias * wide_gamma, branch)
    return (widened(x)[0] + (branch if factors is None else branch * factors)).astype(x.dtype)


def _linear_residual_backward(residuals, g):
    h, kernel, bias, gamma, factors = residuals
    wide_kernel, wide_bias, wide_gamma = widened(kernel, bias, gamma)
    scaled = (wide_kernel * wide_gamma[None]).astype(kernel.dtype)
    of_branch = g if factors is None else (widened(g)[0] * factors).astype(g.dtype)
    to_h = lax.dot_general(of_branch, scaled, (((2,), (1,)), ((), ())))
    # The gradient of the branch's kernel, without its scale.
    summed = lax.dot_general(
        h, of_branch, (((0, 1), (0, 1)), ((), ())), preferred_element_type=wide_kernel.dtype
    )
    total = column_sum(of_branch)
    return (
        g,
        to_h,
        rounded(summed * wide_gamma[None], kernel.dtype),
        rounded(total * wide_gamma, bias.dtype),
        rounded((summed * wide_kernel).sum(0) + total * wide_bias, gamma.dtype),
        None if factors is None else jnp.zeros_like(factors),
    )


_linear_residual.defvjp(
    lambda x, *branch: (_linear_residual(x, *branch), branch), _linear_residual_backward
)


def linear_residual(
    x: Array,
    h: Array,
    kernel: Array,
    bias: Array,
    gamma: Array,
    path: Path | None = None,
) -> Array:
    """Compute `x + path((h @ kernel + bias) * gamma)`, `x` f[B,N,D]; `gamma` and `bias` f[D].

    `path` multiplies each image by a number; None: one. On TPUs the product stays on the chip:
    `gamma` scales the kernel, and its gradient comes from the kernel's.
    """
    factors = None if path is None else path(jnp.ones((len(x), 1, 1), widened(x)[0].dtype))

    def plain(x, h, kernel, bias, gamma):
        return residual(x, linear(h, kernel), bias, gamma, path)

    def on_tpu(*operands):
        return _linear_residual(*operands, factors)

    return lax.platform_dependent(x, h, kernel, bias, gamma, tpu=on_tpu, default=plain)


# -------------------------------------------------------------------------- drop path and dropout


def _survives(key: Array, rate: Array | float, shape: tuple[int, ...]) -> Array:
    """Draw bool[B,...], False with probability `rate`; `key`: one for the batch, or keys [B]."""
    if key.ndim:
        return jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, shape[1:]))(key)
    return jax.random.bernoulli(key, 1 - rate, shape)


def drop_path(y: Array, key: Array | None, rate: Array | float) -> Array:
    """Set each image of `y` f[B,...] to zero with probability `rate`, else divide it by `1 - rate`.

    Returns `y` if `key` is None or `rate` is 0. `key`: one for the batch, or one per image.
    """
    if key is None or (isinstance(rate, float) and rate == 0):  # a traced rate draws even if 0
        return y
    keep = _survives(key, rate, y.shape[:1]).reshape(-1, *(1,) * (y.ndim - 1))
    return jnp.where(keep, y / (1 - rate), jnp.zeros((), y.dtype))


def dropout(x: Array, key: Array | None, rate: float) -> Array:
    """Set each entry of `x` f[B,...] to zero with probability `rate`, else divide it by `1 - rate`.

    Returns `x` if `key` is None or `rate` is 0. `key`: one for the batch, or one per image.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(_survives(key, rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))
