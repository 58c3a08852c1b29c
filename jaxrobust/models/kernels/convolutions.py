"""Convolutions as functions, each with an implementation that is fast on its platform."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import winograd
from jaxrobust.models.kernels.depthwise import depthwise_conv
from jaxrobust.models.kernels.primitives import add_bias, matmul, rows, traced_once, walled
from jaxrobust.models.kernels.windows import column_conv, depth_conv, group_conv, taps

Array = jax.Array
_NHWC = ("NHWC", "HWIO", "NHWC")


# XLA's CPU back end computes f[B,H,W,in] with f[kh,kw,in,out] by blocked matrix products. In loop
# bodies it uses plain loops for all other layouts. JAX's own gradients have other layouts: in a
# loop they are 4 (input) to 200 (kernel) times slower, so both are written out here.


def _xla_conv(
    x: Array, kernel: Array, stride: int, padding: int, groups: int = 1, dilation: int = 1
) -> Array:
    pad = [(padding, padding)] * 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pad,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=_NHWC,
        feature_group_count=groups,
    )


def _patches(x: Array, *, window: int, stride: int) -> Array:
    """Return windows that tile the image, as rows of a matrix."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // stride, stride, width // stride, stride, channels)
    x = x[:, :, :window, :, :window].transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window * window * channels)


_walled_patches = walled(_patches)


def _patch_conv(
    x: Array, kernel: Array, stride: int, padding: int, patches: Callable = _walled_patches
) -> Array:
    del padding
    window, _, _, features = kernel.shape
    out = matmul(patches(x, window=window, stride=stride), kernel.reshape(-1, features))
    return out.reshape(x.shape[0], x.shape[1] // stride, x.shape[2] // stride, features)


def _plain_patch_conv(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return _patch_conv(x, kernel, stride, padding, patches=_patches)


def _canonical_input_gradient(x, kernel, g, stride, padding):
    pad = []
    for size, window, steps in zip(x.shape[1:3], kernel.shape[:2], g.shape[1:3], strict=True):
        leftover = size + 2 * padding - window - (steps - 1) * stride
        pad += [(window - 1 - padding, window - 1 - padding + leftover)]
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    dilation = (stride, stride)
    return lax.conv_general_dilated(
        g, flipped, (1, 1), pad, lhs_dilation=dilation, dimension_numbers=_NHWC
    )


def _interleaved_input_gradient(x, kernel, g, stride, padding):
    """Compute it for few channels: the stride's phases become features of one small convolution."""
    window, _, channels, features = kernel.shape
    taps = -(-window // stride)
    grow = (0, taps * stride - window)
    kernel = jnp.pad(kernel, (grow, grow, (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, stride, taps, stride, channels, features)[::-1, :, ::-1]
    kernel = kernel.transpose(0, 2, 5, 1, 3, 4).reshape(taps, taps, features, -1)
    batch, height, width, _ = x.shape
    grid = [-(-(size + padding) // stride) for size in (height, width)]
    pad = [(taps - 1, n - steps) for n, steps in zip(grid, g.shape[1:3], strict=True)]
    out = lax.conv_general_dilated(g, kernel, (1, 1), pad, dimension_numbers=_NHWC)
    out = out.reshape(batch, *grid, stride, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    out = out.reshape(batch, grid[0] * stride, grid[1] * stride, channels)
    return out[:, padding : padding + height, padding : padding + width]


def _tap_kernel_gradient(x, kernel, g, stride, padding):
    g, narrow = rows(g), kernel.shape[2] <= kernel.shape[3]
    inputs = map(rows, taps(x, kernel.shape[:2], stride, padding))
    products = [tap.T @ g if narrow else (g.T @ tap).T for tap in inputs]
    return jnp.stack(products).reshape(kernel.shape)


def few_channels(x: Any, kernel: Any) -> bool:
    """Return whether XLA copies windows of such shapes (images) slower than `column_conv`.

    7x7 windows are the exception: 224x224x3 to 64, stride 2, 4.3 ms an image against 6.5.
    """
    return x.shape[-1] <= 4 and 1 < max(kernel.shape[:2]) <= 5


def _is_grid(x: Array, kernel: Array, stride: int) -> bool:
    """Return whether the windows tile the image."""
    square = kernel.shape[0] == kernel.shape[1] <= stride
    return square and not (x.shape[1] % stride or x.shape[2] % stride)


def _cpu_conv(x: Array, kernel: Array, stride: int, padding: int) -> tuple[Callable, ...]:
    """Return formulas for the value, the input gradient and the kernel gradient.

    Milliseconds in a loop, batch 8, two cores, XLA's in parentheses: 7x7/2, 224x224x3 to 64, value
    11, input 19 (canonical 40), kernel 16 and 20 times as exact as XLA; 3x3, 56x56x64, 9, 9 (44)
    and 18 (925); 3x3, 7x7x512, 5 (6), 5 and 6; 1x1, 56x56x64 to 256, 3 (5), 4 (9) and 5 (19);
    16x16/16, 224x224x3 to 384, 3 (4), 4 (72) and 3 (5). Values of a first layer, in microseconds an
    image on one core: 3x3, 32x32x3 to 16, 36 (80), with stride 2 10 (20); 3x3/2, 224x224x3 to 48,
    1080 (1550); 5x5, 28x28x1 to 32, 40 (101).
    """
    height, width, channels = x.shape[1:]
    window = kernel.shape[0]
    if padding == 0 and _is_grid(x, kernel, stride):
        return _three(_patch_conv)
    by_columns = _three(column_conv)
    if kernel.size * stride**2 > 4 * x.shape[0] * height * width * kernel.shape[3]:
        return by_columns
    if (
        height * width <= 4 and channels >= 64
    ):  # XLA's plain loops: 2x2x256, batch 256, 650 ms for 25
        return by_columns
    interleaved = stride > 1 and channels < 64 and window == kernel.shape[1]
    return (
        column_conv if few_channels(x, kernel) else _xla_conv,
        _interleaved_input_gradient if interleaved else _canonical_input_gradient,
        by_columns[2] if channels < 16 else _tap_kernel_gradient,
    )


# XLA's CPU back end also computes grouped convolutions by plain loops. Here a kernel with zeros
# between its groups joins as many groups as have at most this many channels in total; the rest are
# parallel convolutions. Milliseconds in a loop for value and input gradient, batch 8, one core, 4
# groups, PyTorch's in parentheses: 32x32x20, all joined, 3.0 (8.9), XLA's own 31.6; 16x16x56,
# pairs, 3.8 (6.4), all 6.7, none 5.4; 8x8x48, pairs, 0.6 (1.4).
_NARROW = 32
_MANY = 8  # above this many parallel groups, each is a matrix product


def _joined(groups: int, ins: int) -> int:
    """Count the groups of `ins` channels that one kernel joins."""
    fitting = [n for n in range(1, groups + 1) if groups % n == 0 and n * ins <= _NARROW]
    return max(fitting, default=1)


def _diagonal(kernel: Array, groups: int) -> Array:
    """Expand f[kh,kw,in//groups,out] to f[kh,kw,in,out] with zeros between the groups."""
    if groups == 1:
        return kernel
    height, width, ins, outs = kernel.shape
    parts = kernel.reshape(height, width, 1, ins, groups, outs // groups)
    diagonal = jnp.eye(groups, dtype=kernel.dtype).reshape(1, 1, groups, 1, groups, 1)
    return (parts * diagonal).reshape(height, width, groups * ins, outs)


def _blocks(kernel: Array, groups: int) -> Array:
    """Return the diagonal blocks of such a kernel, or of its gradient."""
    if groups == 1:
        return kernel
    height, width, ins, outs = kernel.shape
    parts = kernel.reshape(height, width, groups, ins // groups, groups, outs // groups)
    return jnp.concatenate([parts[:, :, i, :, i] for i in range(groups)], -1)


class _Settings(NamedTuple):
    stride: int
    padding: int
    groups: int
    dilation: int


def _on_cpu(part: int, settings: _Settings, *operands: Array) -> Array:
    stride, padding, groups, dilation = settings
    joined, outs = _joined(groups, operands[1].shape[2]), []
    if groups // joined > _MANY or dilation > 1:
        form: Callable = functools.partial(column_conv, dilation=dilation)
        if groups > 1:
            form = functools.partial(group_conv, groups=groups, dilation=dilation)
        return _three(form)[part](*operands, stride, padding)
    parts = (jnp.split(operand, groups // joined, -1) for operand in operands)
    for x, kernel, *g in zip(*parts, strict=True):
        kernel = _diagonal(kernel, joined)
        out = _cpu_conv(x, kernel, stride, padding)[part](x, kernel, *g, stride, padding)
        outs.append(_blocks(out, joined) if part == 2 else out)
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, -1)


def _by_xla(part: int, settings: _Settings, *operands: Array) -> Array:
    stride, padding, groups, dilation = settings
    form = functools.partial(_xla_conv, groups=groups, dilation=dilation)
    return _three(form)[part](*operands, stride, padding)


def _on_tpu(part: int, settings: _Settings, x: Array, kernel: Array, *g: Array) -> Array:
    """Compute adjacent windows as rows of a matrix.

    By the compiler's cycles on a v5e, ViT's 16x16 patches and their image gradient take 15.3 ms for
    16 images and 15.4 ms for 88 as a convolution, and 49 s of CPU time to compile; as a product 0.5
    and 0.8 ms, and 2 s.
    """
    if _apart(x, kernel, settings):
        return _three(_plain_patch_conv)[part](x, kernel, *g, settings.stride, settings.padding)
    return _by_xla(part, settings, x, kernel, *g)


def _on_cuda(part: int, settings: _Settings, x: Array, kernel: Array, *g: Array) -> Array:
    """Compute strided convolutions of images without cuDNN's kernels.

    Those for the matrix units read eight channels at a time, but images have three. Value and image
    gradient of 128 images of 224 px in bfloat16 on an H200, in ms: 16x16 patches to 384 features
    6.15 with cuDNN and 0.11 as a product, 4x4 patches to 96 0.44 and 0.13, 3x3/2 to 48 0.98 and
    0.39 in depth; windows of 2x2 pixels of 96 channels 0.12 and 0.18.
    """
    if x.shape[3] >= 8 or not settings.groups == settings.dilation == 1 < settings.stride:
        return _by_xla(part, settings, x, kernel, *g)
    form = _plain_patch_conv if _apart(x, kernel, settings) else depth_conv
    return _three(form)[part](x, kernel, *g, settings.stride, settings.padding)


def _apart(x: Array, kernel: Array, settings: _Settings) -> bool:
    """Return whether the windows tile the image and are larger than a pixel."""
    stride, padding, groups, dilation = settings
    if not groups == dilation == 1 or padding:
        return False
    return kernel.shape[0] == stride > 1 and _is_grid(x, kernel, stride)


def _three(formula: Callable) -> tuple[Callable, ...]:
    """Return a formula with its gradients for input and kernel."""

    def input_gradient(x, kernel, g, stride, padding):
        return jax.vjp(lambda x: formula(x, kernel, stride, padding), x)[1](g)[0]

    def kernel_gradient(x, kernel, g, stride, padding):
        return jax.vjp(lambda kernel: formula(x, kernel, stride, padding), kernel)[1](g)[0]

    return formula, input_gradient, kernel_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, settings: _Settings, alone: bool) -> Array:
    return _rule(0, settings, x, kernel)


_ON: dict[str, Callable] = {"cpu": _on_cpu, "tpu": _on_tpu, "cuda": _on_cuda, "default": _by_xla}


@functools.cache
def _formulas(part: int, settings: _Settings) -> dict[str, Callable]:
    return {
        platform: traced_once(functools.partial(formula, part, settings))
        for platform, formula in _ON.items()
    }


def _rule(part: int, settings: _Settings, *operands: Array) -> Array:
    return lax.platform_dependent(*operands, **_formulas(part, settings))


def _conv_backward(settings, alone, residuals, g):
    operands = (*residuals, g)
    if alone:
        operands = lax.platform_dependent(
            *operands, tpu=lambda *xs: lax.optimization_barrier(xs), default=lambda *xs: xs
        )
    return tuple(_rule(part, settings, *operands) for part in (1, 2))


_conv.defvjp(lambda x, kernel, *static: (_conv(x, kernel, *static), (x, kernel)), _conv_backward)


_tiles: contextvars.ContextVar[tuple[winograd.Formula, list[Array]] | None] = (
    contextvars.ContextVar("tiles", default=None)
)
_traced_in = jax.make_user_context(default_value=None)  # so that no `jit` reuses another's trace


@contextlib.contextmanager
def in_tiles(form: winograd.Formula = winograd.convolve) -> Iterator[list[Array]]:
    """Compute 3x3 convolutions traced inside this context with `winograd`, where that is faster.

    Yields a list that collects each convolution's kernel. Transform the weights before a loop, see
    `rewriting.ready`.

    Args:
      form: `winograd.convolve`, or `winograd.values` if nothing is differentiated.
    """
    kernels: list[Array] = []
    token = _tiles.set((form, kernels))
    try:
        with _traced_in(form):
            yield kernels
    finally:
        _tiles.reset(token)


def _tiled(x: Array, kernel: Array, settings: _Settings) -> Array | None:
    """Return the convolution by `winograd`; None if outside `in_tiles`, or if it does not apply."""
    stride, padding, groups, dilation = settings
    pads = ((padding, padding),) * 2
    xla_settings = {
        "window_strides": (stride, stride),
        "padding": pads,
        "lhs_dilation": (1, 1),
        "rhs_dilation": (dilation, dilation),
        "feature_group_count": groups,
        "preferred_element_type": None,
    }
    tiles = _tiles.get()
    if tiles is None or not winograd.applies(xla_settings, x, kernel):
        return None
    form, kernels = tiles
    kernels.append(kernel)
    return form(pads, x, kernel)


def conv(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    dilation: int = 1,
    alone: bool = False,
) -> Array:
    """Convolve f[B,H,W,in] with f[kh,kw,in//groups,out], symmetric zero padding.

    `dilation` is the distance between the pixels that adjacent taps read. Output i of `out` reads
    the input channels of its group, one of `groups`. With `alone`, TPUs compute the gradients'
    operands beforehand instead of within each window, which XLA would unroll: those of ViT-S's
    ConvStem then compile in 8 instead of 28 s, and take no more cycles; those of a ResNet-50 with a
    block a stage take 7 to 12% more.
    """
    ins, outs = kernel.shape[2:]
    half = dilation * (kernel.shape[0] // 2)
    if groups > 1 and ins == 1 and outs == groups and padding == half:
        return depthwise_conv(x, kernel, bias, stride=stride, dilation=dilation)
    settings = _Settings(stride, padding, groups, dilation)
    out = _tiled(x, kernel, settings)
    return add_bias(_conv(x, kernel, settings, alone) if out is None else out, bias)
