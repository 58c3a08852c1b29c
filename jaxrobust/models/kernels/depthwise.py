"""Depthwise convolution, with an implementation that is fast on each platform."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.primitives import add_bias, add_each, walled, widened, with_gradient

Array = jax.Array
Sizes = tuple[int, ...]  # height and width


def _xla(x: Array, kernel: Array, *, stride: int = 1, dilation: int = 1) -> Array:
    half = (dilation * (kernel.shape[0] // 2), dilation * (kernel.shape[1] // 2))
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(half[0], half[0]), (half[1], half[1])],
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _stretched(g: Array, stride: int, sizes: Sizes) -> Array:
    """Return the gradient of the stride-1 convolution whose outputs this one subsamples."""
    if stride == 1:
        return g
    rests = [(0, size - (n - 1) * stride - 1) for size, n in zip(sizes, g.shape[1:3], strict=True)]
    pads = [(0, 0, 0), *((low, high, stride - 1) for low, high in rests), (0, 0, 0)]
    return lax.pad(g, jnp.zeros((), g.dtype), pads)


def _xla_input_gradient(
    g: Array, kernel: Array, *, stride: int, dilation: int, sizes: Sizes
) -> Array:
    # The forward pass with a flipped kernel, because windows are odd and padding is symmetric.
    return _xla(_stretched(g, stride, sizes), kernel[::-1, ::-1], dilation=dilation)


def _xla_kernel_gradient(x: Array, kernel: Array, g: Array, *, stride: int, dilation: int) -> Array:
    g = _stretched(g, stride, x.shape[1:3])
    return jax.vjp(lambda k: _xla(x, k, dilation=dilation), kernel)[1](g)[0]


def _taps(x: Array, window: Sizes, stride: int, dilation: int) -> list[Array]:
    """Return the pixels that each window entry meets, in float32 or float64."""
    (height, width), half = x.shape[1:3], [dilation * (side // 2) for side in window]
    pads = ((0, 0), (half[0], half[0]), (half[1], half[1]), (0, 0))
    padded, (rows, columns) = jnp.pad(widened(x)[0], pads), map(range, window)
    starts = [(dilation * i, dilation * j) for i in rows for j in columns]
    return [padded[:, i : i + height : stride, j : j + width : stride] for i, j in starts]


@walled
def _shifted(x: Array, kernel: Array, *, stride: int = 1, dilation: int = 1) -> Array:
    (weights,) = widened(kernel.reshape(-1, kernel.shape[3]))
    taps = _taps(x, kernel.shape[:2], stride, dilation)
    products = (tap * weights[i][None, None, None] for i, tap in enumerate(taps))
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _phase(phase: int, window: int, stride: int, dilation: int) -> list[tuple[int, int]]:
    """List the window entries that read the pixels `stride * m + phase`, each with n, where `m + n`
    are the outputs that it contributes to.
    """
    from_entry = [phase + dilation * (window // 2 - i) for i in range(window)]
    return [(i, at // stride) for i, at in enumerate(from_entry) if at % stride == 0]


@walled
def _phases(g: Array, kernel: Array, *, stride: int, dilation: int, sizes: Sizes) -> Array:
    """Compute the input gradient of a strided convolution: per phase of the stride, a sum of
    shifted products with that phase's part of the kernel.
    """
    wide, weights = widened(g, kernel)
    window, grid, channels = kernel.shape[:2], g.shape[1:3], g.shape[3]
    reach = [dilation * (side // 2) // stride + 1 for side in window]
    wide = jnp.pad(wide, ((0, 0), *((r, r) for r in reach), (0, 0)))
    rows, columns = ([_phase(p, side, stride, dilation) for p in range(stride)] for side in window)

    def phase(entries: list[tuple[tuple[int, int], tuple[int, int]]]) -> Array:
        total = jnp.zeros((len(g), *grid, channels), wide.dtype)
        for (i, y), (j, x) in entries:
            row, column = reach[0] + y, reach[1] + x
            part = wide[:, row : row + grid[0], column : column + grid[1]]
            total = total + part * weights[i, j][None, None]
        return total

    lines = [jnp.stack([phase([*itertools.product(y, x)]) for x in columns], 3) for y in rows]
    out = jnp.stack(lines, 2).reshape(len(g), grid[0] * stride, grid[1] * stride, channels)
    return out[:, : sizes[0], : sizes[1]].astype(g.dtype)


def _shifted_input_gradient(
    g: Array, kernel: Array, *, stride: int, dilation: int, sizes: Sizes
) -> Array:
    if stride == 1:
        return _shifted(g, kernel[::-1, ::-1], dilation=dilation)
    return _phases(g, kernel, stride=stride, dilation=dilation, sizes=sizes)


@walled
def _shifted_kernel_gradient(
    x: Array, kernel: Array, g: Array, *, stride: int, dilation: int
) -> Array:
    taps, (g,) = _taps(x, kernel.shape[:2], stride, dilation), widened(g)
    step, sums = 2 * kernel.shape[1], []
    # Two rows of the kernel in one reduction read `g` once for 14 products: 10 ms for 8x56x56x96.
    # One row takes 12 ms, the whole kernel 13, a reduction for each product 31 (PyTorch 34).
    # Summing each image first keeps the rounding error at 1e-6 of the largest entry.
    for group in (taps[start : start + step] for start in range(0, len(taps), step)):
        products = [tap * g for tap in group]
        sums += lax.reduce(products, [jnp.zeros((), g.dtype)] * len(group), add_each, (1, 2))
    return jnp.stack(sums).sum(1).reshape(kernel.shape).astype(kernel.dtype)


# name -> value, input gradient, kernel gradient
IMPLEMENTATIONS = {
    "shifted": (_shifted, _shifted_input_gradient, _shifted_kernel_gradient),
    "xla": (_xla, _xla_input_gradient, _xla_kernel_gradient),
}
# On an H200, 128x56x56x96 in bfloat16: 0.29 ms by cuDNN and 16.6 shifted, a fusion of shifted reads
# without walls 1.29; the kernel's gradient 0.21 and 11.0, a sum for each entry 2.39.
_ON = {"cpu": "shifted", "default": "xla"}


def _rule(part: int, implementation: str | None, *operands: Array, **sizes) -> Array:
    if implementation is not None:
        return IMPLEMENTATIONS[implementation][part](*operands, **sizes)
    # The choice of platform is inside the custom gradient's rules: differentiating through it would
    # keep the residuals of every branch.
    rules = {
        platform: functools.partial(IMPLEMENTATIONS[name][part], **sizes)
        for platform, name in _ON.items()
    }
    return lax.platform_dependent(*operands, **rules)


def _depthwise_forward(static, x, kernel, needed):
    implementation, stride, dilation = static
    return _rule(0, implementation, x, kernel, stride=stride, dilation=dilation), x


def _depthwise_backward(static, x, kernel, g, needed):
    implementation, stride, dilation = static
    sizes = {"stride": stride, "dilation": dilation}
    to_x = _rule(1, implementation, g, kernel, sizes=x.shape[1:3], **sizes)
    # Attacks need no kernel gradient, whose formulas take longer to trace than the others.
    return to_x, _rule(2, implementation, x, kernel, g, **sizes) if needed else None


_depthwise = with_gradient(_depthwise_forward, _depthwise_backward)


def depthwise_conv(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    implementation: str | None = None,
) -> Array:
    """Convolve f[B,H,W,C] depthwise with f[kh,kw,1,C], zero padding `dilation * (k // 2)`.

    kh and kw are odd. `implementation` is a name in `IMPLEMENTATIONS`; None chooses by platform.
    """
    return add_bias(_depthwise((implementation, stride, dilation), x, kernel), bias)
