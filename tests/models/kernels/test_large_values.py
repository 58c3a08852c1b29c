"""Every kernel at large values: about as close to float64 as XLA's plain operations are.

Attention is given logits of up to 1,000, other kernels activations of that size. In float32 and
bfloat16 the value and each gradient of a kernel for TPUs may be off by twice what XLA's paths in
the same type are: the same formula in `jax.numpy` and `lax`, whose products add up in float32 and
whose norms and softmax are float32, and what other platforms compile. The latter is compared with
the formula alone; where it may be off by more than twice, its case says why.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax import lax

from jaxrobust.models import kernels
from jaxrobust.models.kernels import (
    attention,
    batch_norms,
    channel_attention,
    convnext_layers,
    convolutions,
    depthwise,
    layers,
    local_interaction,
    pooling,
    primitives,
    stem_layers,
    talking_heads,
    windows,
)
from jaxrobust.models.kernels.deformable import operator
from jaxrobust.models.kernels.tpu import batch_stem, conv_stem, convnext_block, norm_halving
from tests.support import sweeps
from tests.support.interpreted import on_tpu

SIZES = (5, 200, 1000)
# Of the norm of an array: sums in another order, and a step of its type.
LEAST = {"float32": 1e-6, "bfloat16": 2**-8}
# On the way back attention has bfloat16 probabilities outside of TPUs, and there for a bias; and
# gradients of bfloat16 for the weights of a mix.
KEPT = 8


class Case(NamedTuple):
    """A kernel, the plain formula, and operands f64 for a size."""

    files: str  # that it covers
    function: Callable[..., Any]
    plain: Callable[..., Any]
    operands: Callable[[float], list[np.ndarray]]
    platform: Callable[[], Any] = contextlib.nullcontext
    limit: float = 2  # times the error of the plain formula, for what XLA compiles


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def wide(*arrays):
    """Arrays as the plain formulas compute with them: at least float32."""
    both = [a if a.dtype == jnp.float64 else a.astype(jnp.float32) for a in arrays]
    return both[0] if len(both) == 1 else both


def einsum(text, *operands):
    """A product that is added up in float32."""
    return jnp.einsum(text, *operands, preferred_element_type=wide(operands[0]).dtype)


# --------------------------------------------------------------------------------- plain formulas


def attend(q, k, v, bias=None, scale=None):
    """Attention of f[B,N,h,d]."""
    logits = einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + wide(bias)[None]
    p = jax.nn.softmax(logits).astype(v.dtype)
    return einsum("bhnm,bmhd->bnhd", p, v).astype(v.dtype).reshape(*q.shape[:2], -1)


def parts(qkv, heads):
    return [part.reshape(*part.shape[:2], heads, -1) for part in jnp.split(qkv, 3, -1)]


def cross(qkv, temperature):
    q, k, v = parts(qkv, len(temperature))
    unit = lambda x: wide(x) / jnp.maximum(jnp.linalg.norm(wide(x), axis=1, keepdims=True), 1e-12)  # noqa: E731
    q, k = (unit(x).astype(v.dtype) for x in (q, k))
    logits = einsum("bnhc,bnhd->bhcd", q, k) * wide(temperature)[None]
    p = jax.nn.softmax(logits).astype(v.dtype)
    return einsum("bhcd,bnhd->bnhc", p, v).astype(v.dtype).reshape(*qkv.shape[:2], -1)


def talk(qkv, *mixes):
    kernel, bias, kernel_after, bias_after = (wide(m) for m in mixes)
    q, k, v = parts(qkv, len(bias))
    mix = lambda x, w, b: jnp.einsum("bhnm,hg->bgnm", x, w) + b[None, :, None, None]  # noqa: E731
    logits = einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    p = mix(jax.nn.softmax(mix(logits, kernel, bias)), kernel_after, bias_after).astype(v.dtype)
    return einsum("bhnm,bmhd->bnhd", p, v).astype(v.dtype).reshape(*qkv.shape[:2], -1)


def convolve(x, kernel, bias=None, *, stride=1, padding=0, groups=1, dilation=1):
    pads = padding if isinstance(padding, list) else [(padding, padding)] * 2
    out = lax.conv_general_dilated(
        *(x, kernel, (stride, stride), pads),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return out if bias is None else (wide(out) + wide(bias)).astype(x.dtype)


def depthwise_conv(x, kernel, bias=None, *, stride=1, dilation=1):
    side = dilation * (kernel.shape[0] // 2)
    how = {"stride": stride, "padding": side, "groups": x.shape[3], "dilation": dilation}
    return convolve(x, kernel, bias, **how)


def norm(x, scale, bias, axis=-1, eps=1e-6):
    y = wide(x)
    y = (y - y.mean(axis, keepdims=True)) * lax.rsqrt(y.var(axis, keepdims=True) + eps)
    return (y * wide(scale) + wide(bias)).astype(x.dtype)


def given_norm(x, scale, bias, mean, var, eps=1e-5):
    y = (wide(x) - wide(mean)) * lax.rsqrt(wide(var) + eps)
    return (y * wide(scale) + wide(bias)).astype(x.dtype)


def train_norm(x, scale, bias):
    return norm(x, scale, bias, tuple(range(x.ndim - 1)), 1e-5)


def gelu(x, bias=None):
    y = wide(x) if bias is None else wide(x) + wide(bias)
    return jax.nn.gelu(y, approximate=False).astype(x.dtype)


def linear(x, kernel, bias=None):
    y = einsum("...i,io->...o", x, kernel)
    return (y if bias is None else y + wide(bias)).astype(x.dtype)


def residual(x, y, bias, gamma):
    return (wide(x) + (wide(y) + wide(bias)) * wide(gamma)).astype(x.dtype)


def block(x, taps, bias, scale, shift, first, first_bias, second, second_bias, gamma):
    y = norm(depthwise_conv(x, taps, bias), scale, shift)
    y = linear(gelu(linear(y, first), first_bias), second)
    return residual(x, y, second_bias, gamma)


def stem(x, *p):
    for taps, bias, scale, shift in (p[:4], p[4:]):
        x = gelu(norm(convolve(x, taps, bias, stride=2, padding=1), scale, shift))
    return x


def batch_layers(x, *p):
    for taps, scale, shift in (p[:3], p[3:]):
        x = gelu(train_norm(convolve(x, taps, stride=2, padding=1), scale, shift))
    return x


def interaction(x, *p, width):
    y = norm(x, p[0], p[1])
    y = gelu(depthwise_conv(y.reshape(len(x), -1, width, x.shape[2]), p[2]), p[3])
    y = depthwise_conv(train_norm(y, p[4], p[5]), p[6]).reshape(x.shape)
    return residual(x, y, p[7], p[8])


def sample(value, offsets, mask, *, groups):
    """Bilinear samples of a map whose outside is 0."""
    batch, height, width, channels = value.shape
    points = wide(offsets).reshape(batch, height, width, groups, 9, 2)
    weights = wide(mask).reshape(batch, height, width, groups, 9)
    count = functools.partial(jnp.arange, dtype=points.dtype)
    x, y = jnp.meshgrid(count(3) - 1, count(3) - 1, indexing="ij")
    rows, columns = count(height)[:, None, None, None], count(width)[:, None, None]
    at = rows + y.reshape(9) + points[..., 1], columns + x.reshape(9) + points[..., 0]
    maps = jnp.moveaxis(wide(value).reshape(batch, height, width, groups, -1), 3, 1)
    total = 0.0
    for corner in np.ndindex(2, 2):
        place = [jnp.floor(a) + c for a, c in zip(at, corner, strict=True)]
        share = weights * (1 - abs(at[0] - place[0])) * (1 - abs(at[1] - place[1]))
        inside = (place[0] >= 0) & (place[0] < height) & (place[1] >= 0) & (place[1] < width)
        row, column = (
            jnp.clip(a, 0, n - 1).astype(int) for a, n in zip(place, (height, width), strict=True)
        )
        b, g = (
            jnp.arange(batch)[:, None, None, None, None],
            jnp.arange(groups)[None, None, None, :, None],
        )
        picked = maps[b, g, row, column]
        total += (picked * jnp.where(inside, share, 0)[..., None]).sum(4)
    return total.reshape(batch, height, width, channels).astype(value.dtype)


def pool(x, side, stride, padding, *, mean=False, counted=True):
    shape, pads = (1, side, side, 1), [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    if not mean:
        return lax.reduce_window(x, -jnp.inf, lax.max, shape, (1, stride, stride, 1), pads)
    y = wide(x)
    add = functools.partial(lax.reduce_window, init_value=0.0, computation=lax.add)
    add = functools.partial(add, window_dimensions=shape, window_strides=(1, stride, stride, 1))
    ones = side**2 if counted else add(jnp.ones_like(y), padding=pads)
    return (add(y, padding=pads) / ones).astype(x.dtype)


# -------------------------------------------------------------------------------------- operands


def qkv(heads, width, tokens=49, batch=2):
    """Queries, keys and values f[B,N,3*h*d] whose largest logit has a size."""

    def make(size):
        x = normal(0, batch, tokens, 3 * heads * width)
        q, k, _ = (np.asarray(part) for part in np.split(x, 3, -1))
        q, k = (a.reshape(batch, tokens, heads, width) for a in (q, k))
        largest = np.abs(np.einsum("bnhd,bmhd->bhnm", q, k)).max() * width**-0.5
        x[..., : heads * width] *= size / largest
        return x

    return make


def scaled(*shapes, first=1, offset=False):
    """Arrays: the `first` ones of a size, or around it, and parameters."""

    def make(size):
        arrays = [normal(i, *shape) for i, shape in enumerate(shapes)]
        for i, shape in enumerate(shapes):
            if i < first:
                arrays[i] = arrays[i] + size if offset else arrays[i] * size
            elif len(shape) > 1:
                arrays[i] = arrays[i] / np.sqrt(np.prod(shape[:-1]))
        return arrays

    return make


def tpu(*modules, free=()):
    """TPU rules, whatever the size of the operands."""

    @contextlib.contextmanager
    def patched():
        with contextlib.ExitStack() as stack:
            for patch in on_tpu(*modules):
                stack.enter_context(patch)
            for kernel in free:
                stack.enter_context(mock.patch.object(kernel, "refused", lambda *_: None))
            yield

    return patched


C = (32,)
MAP = (2, 8, 8, 32)
MIXES = [(4, 4), (4,)] * 2
BLOCK = [(7, 7, 1, 32), *[C] * 3, (32, 128), (128,), (128, 32), C, C]
STEM = [(3, 3, 3, 16), *[(16,)] * 3, (3, 3, 16, 16), *[(16,)] * 3]
BATCH_STEM = [*STEM[:1], *STEM[1:3], *STEM[4:5], *STEM[1:3]]
INTERACTION = [C, C, (3, 3, 1, 32), C, C, C, (3, 3, 1, 32), C, C]
DEFORMABLE = scaled((2, 6, 6, 8), (2, 6, 6, 36), (2, 6, 6, 18))
IN_EIGHTS = scaled((2, 6, 6, 16), (2, 6, 6, 36), (2, 6, 6, 18))


def first(function):
    return lambda *operands: function(*operands)[0]


def mixes(width):
    of = qkv(4, width)
    return lambda size: [of(size), *(normal(i, *shape) for i, shape in enumerate(MIXES, 1))]


def temperature(size):
    return [normal(0, 2, 49, 3 * 96), size * (1 + 0.1 * normal(1, 2, 1, 1))]


def norm_cases(name, files, function, plain, shapes, platform=contextlib.nullcontext, limit=2):
    for offset in (False, True):
        yield (
            f"{name}, {'around' if offset else 'up to'} a value",
            Case(files, function, plain, scaled(*shapes, offset=offset), platform, limit),
        )


def attentions():
    def token(width):
        function = functools.partial(attention.self_attention, heads=2)
        plain = lambda x: attend(*parts(x, 2))  # noqa: E731
        return function, plain, lambda size: [qkv(2, width)(size)]

    for width in (32, 48, 64):
        yield f"attention {width}", Case("attention", *token(width), limit=KEPT)
    for width in (32, 64, 96):
        case = Case("tpu/token_attention", *token(width), tpu(attention))
        yield f"token_attention {width}", case
    with_bias = (
        lambda x, bias: attention.self_attention(x, 2, bias=bias),
        lambda x, bias: attend(*parts(x, 2), bias),
        lambda size: [qkv(2, 32)(size), size * normal(1, 2, 49, 49)],
    )
    yield "attention with a bias", Case("attention", *with_bias, limit=KEPT)
    yield (
        "token_attention with a bias",
        Case("tpu/token_attention", *with_bias, tpu(attention)),
    )
    for width in (16, 48):
        of = lambda x, *m: talking_heads.talking_heads(x, m[:2], m[2:])  # noqa: E731
        yield f"talking_heads {width}", Case("talking_heads", of, talk, mixes(width), limit=KEPT)
        case = Case("tpu/talking_heads", of, talk, mixes(width), tpu(talking_heads))
        yield f"talking_heads on TPUs {width}", case
    of = channel_attention.self_cross_covariance
    yield "channel_attention", Case("channel_attention", of, cross, temperature, limit=KEPT)
    case = Case("tpu/channel_attention", of, cross, temperature, tpu(channel_attention))
    yield "channel_attention on TPUs", case
    large = scaled((2, 49, 3 * 96))
    of = lambda x: channel_attention.self_cross_covariance(x, jnp.ones((2, 1, 1), x.dtype))  # noqa: E731
    plain = lambda x: cross(x, jnp.ones((2, 1, 1), x.dtype))  # noqa: E731
    yield "channel_attention of large channels", Case("channel_attention", of, plain, large)
    case = Case("tpu/channel_attention", of, plain, large, tpu(channel_attention))
    yield "channel_attention of large channels on TPUs", case


def convolving():
    for stride, padding in ((1, 1), (2, 1)):
        name, operands = f"{stride}, {padding}", scaled((2, 9, 9, 16), (3, 3, 16, 24))
        how = {"stride": stride, "padding": padding}
        plain = functools.partial(convolve, **how)
        for of in (windows.column_conv, windows.depth_conv):
            case = Case("windows", functools.partial(of, **how), plain, operands)
            yield f"{of.__name__} {name}", case
        case = Case("convolutions", functools.partial(convolutions.conv, **how), plain, operands)
        yield f"conv {name}", case
    groups, how = scaled((2, 9, 9, 16), (3, 3, 4, 24)), {"stride": 1, "padding": 1, "groups": 4}
    of = functools.partial(windows.group_conv, dilation=1, **how)
    yield "group_conv", Case("windows", of, functools.partial(convolve, **how), groups)
    for stride in (1, 2):
        of, plain = (
            functools.partial(f, stride=stride) for f in (depthwise.depthwise_conv, depthwise_conv)
        )
        case = Case("depthwise", of, plain, scaled((2, 9, 9, 24), (7, 7, 1, 24), (24,)))
        yield f"depthwise {stride}", case

    def in_tiles(x, kernel):
        with convolutions.in_tiles() as made:
            out = convolutions.conv(x, kernel, padding=1)
        assert made or x.dtype == jnp.bfloat16  # which is never in tiles
        return out

    plain = functools.partial(convolve, padding=1)
    # Six times the error of patches at the same sum of squares: attacks only, see winograd.py.
    case = Case("winograd", in_tiles, plain, scaled((4, 16, 16, 48), (3, 3, 48, 48)), limit=20)
    yield "winograd", case

    plain = functools.partial(sample, groups=2)
    of = functools.partial(operator.deformable, groups=2, implementation="gathers")
    yield "deformable gathers", Case("deformable", of, plain, DEFORMABLE)
    args = "tpu/deformable_windows", functools.partial(operator.deformable, groups=2), plain
    yield "deformable kernel", Case(*args, IN_EIGHTS, tpu(operator))


def layer_cases():
    yield "gelu", Case("layers", layers.gelu, gelu, scaled(MAP, C))
    yield "gelu on TPUs", Case("layers", layers.gelu, gelu, scaled(MAP, C), tpu(layers))
    yield "relu", Case("layers", layers.relu, jax.nn.relu, scaled(MAP))
    yield (
        "scale",
        Case("layers", layers.scale, lambda x, g: wide(x).astype(x.dtype) * g, scaled(MAP, C)),
    )
    yield "linear", Case("layers", layers.linear, linear, scaled(MAP, (32, 48), (48,)))
    of = layers.scaled_residual
    yield "scaled_residual", Case("layers", of, residual, scaled(MAP, MAP, C, C, first=2))
    operands = scaled((6, 9, 24), (6, 9, 40), (40, 24), (24,), (24,), first=2)

    def linear_residual(x, h, kernel, bias, gamma):
        return residual(x, einsum("...i,io->...o", h, kernel), bias, gamma)

    of = layers.linear_residual
    yield "linear_residual", Case("layers", of, linear_residual, operands)
    yield "linear_residual on TPUs", Case("layers", of, linear_residual, operands, tpu(layers))
    tokens = [(2, 49, 32), C, C]
    both = lambda x, s, b: (norm(x, s, b), x)  # noqa: E731
    yield from norm_cases("layer_norm", "layers", layers.layer_norm, norm, tokens)
    args = "tpu/token_norm", layers.layer_norm, norm, tokens, tpu(layers)
    yield from norm_cases("layer_norm on TPUs", *args)
    args = "tpu/token_norm", layers.norm_and_tokens, both, tokens, tpu(layers)
    yield from norm_cases("norm_and_tokens on TPUs", *args)
    of = first(batch_norms.batch_norm_train)
    # Its mean is added up in lines, which rounds a mean of 1,000 deviations otherwise.
    yield from norm_cases("batch_norm_train", "batch_norms", of, train_norm, [MAP, C, C], limit=4)

    def statistics(size):
        return [size * normal(0, *MAP), *(normal(i, *C) for i in (1, 2, 3)), np.full(C, size**2)]

    yield "batch_norm", Case("batch_norms", batch_norms.batch_norm, given_norm, statistics)

    odd = scaled((2, 9, 9, 8))
    yield "max_pool", Case("pooling", pooling.max_pool, lambda x: pool(x, 3, 2, 1), odd)
    yield "max_pool_2x2", Case("pooling", pooling.max_pool_2x2, lambda x: pool(x, 2, 2, 0), odd)
    of = pooling.avg_pool_2x2
    yield "avg_pool_2x2", Case("pooling", of, lambda x: pool(x, 2, 2, 0, mean=True), odd)
    for counted in (False, True):
        of = functools.partial(pooling.avg_pool, stride=1, count_padding=counted)
        plain = functools.partial(pool, side=3, stride=1, padding=1, mean=True, counted=counted)
        yield f"avg_pool {counted}", Case("pooling", of, plain, odd)
    of = functools.partial(pooling.adaptive_avg_pool, count=3)
    plain = functools.partial(pool, side=3, stride=3, padding=0, mean=True)
    yield "adaptive_avg_pool", Case("pooling", of, plain, odd)
    yield "matmul", Case("primitives", primitives.matmul, linear, scaled((60, 24), (24, 32)))
    plain = lambda x, b: (wide(x) + wide(b)).astype(x.dtype)  # noqa: E731
    yield "add_bias", Case("primitives", primitives.add_bias, plain, scaled(MAP, C))


def blocks():
    of, plain = (
        convnext_layers.depthwise_norm,
        lambda *p: (norm(depthwise_conv(*p[:3]), *p[3:]), p[0]),
    )
    shapes = [MAP, (7, 7, 1, 32), C, C, C]
    yield from norm_cases("depthwise_norm", "convnext_layers", of, plain, shapes)
    args = "tpu/depthwise_norm", of, plain, shapes, tpu(convnext_layers)
    yield from norm_cases("depthwise_norm on TPUs", *args)
    of = lambda x, *p: convnext_layers.convnext_block(x, convnext_layers.BlockParameters(*p))  # noqa: E731
    yield "convnext_block", Case("convnext_layers", of, block, scaled(MAP, *BLOCK))
    platform = tpu(convnext_layers, free=[convnext_block])
    yield (
        "convnext_block on TPUs",
        Case("tpu/convnext_block", of, block, scaled(MAP, *BLOCK), platform),
    )

    def halving(x, *p):
        return convnext_layers.norm_halving(x, convnext_layers.HalvingParameters(*p), stride=2)

    plain = lambda x, s, b, k, c: convolve(norm(x, s, b), k, c, stride=2)  # noqa: E731
    shapes = [MAP, C, C, (2, 2, 32, 48), (48,)]
    yield from norm_cases("norm_halving", "convnext_layers", halving, plain, shapes)
    args = "tpu/norm_halving", halving, plain, shapes, tpu(convnext_layers, free=[norm_halving])
    yield from norm_cases("norm_halving on TPUs", *args)

    images = (2, 32, 8, 3)
    of = stem_layers.stem_layers
    yield "stem_layers", Case("stem_layers", of, stem, scaled(images, *STEM))
    platform = tpu(stem_layers, free=[conv_stem])
    files = "tpu/conv_stem tpu/stem_blocks"
    yield "stem_layers on TPUs", Case(files, of, stem, scaled(images, *STEM), platform)

    def batches(x, *p):
        both = (stem_layers.BatchLayer(*p[:3]), stem_layers.BatchLayer(*p[3:]))
        return stem_layers.batch_stem_layers(x, both, None)[0]

    operands = scaled(images, *BATCH_STEM)
    yield "batch_stem_layers", Case("stem_layers", batches, batch_layers, operands)
    files, platform = "tpu/batch_stem tpu/stem_blocks", tpu(stem_layers, free=[batch_stem])
    yield "batch_stem_layers on TPUs", Case(files, batches, batch_layers, operands, platform)

    def interact(x, *p):
        how = {"width": 7}
        return local_interaction.local_interaction(
            x, local_interaction.Interaction(*p), None, **how
        )[0]

    plain, shapes = functools.partial(interaction, width=7), [(2, 49, 32), *INTERACTION]
    # Float32 gradients through its batch norm are off by up to 6e-6, plain ones by 5e-7.
    here = "local_interaction", interact, plain, shapes
    yield from norm_cases("local_interaction", *here, limit=16)
    args = "tpu/token_interaction", interact, plain, shapes, tpu(local_interaction)
    yield from norm_cases("local_interaction on TPUs", *args)


CASES = dict([*attentions(), *convolving(), *layer_cases(), *blocks()])
HEADS = [name for name in CASES if "talking_heads" in name]
# No arithmetic of their own, or none that runs here.
OTHERS = {
    "cuda/fused_attention": "is cuDNN's, which test_cuda_kernels.py compares where there is a GPU",
    "cuda/convnext_mlp": "runs under JAX 0.12 and newer: test_hopper_kernels.py",
    "cuda/hopper": "decides which blocks take the kernel",
    "cuda/warpgroups": "starts kernels",
    "cpu/narrowing": "chooses bfloat16 for searches, whose verdicts float32 confirms",
    "cpu/rewriting": "writes other forms of convolutions, as exact: test_rewriting.py",
    "tpu/calls": "starts kernels",
}


def run(function, operands, cotangents):
    """The value, and the gradients of all operands."""
    with jax.numpy_rank_promotion("allow"):
        value, pull = jax.vjp(function, *operands)
        g = jax.tree.map(lambda v, c: c.astype(v.dtype), value, cotangents)
        return value, pull(g)


def compiled(function):
    # Every rounding that is written takes place, as on chips with units for bfloat16.
    options = {"xla_allow_excess_precision": False}
    return jax.jit(functools.partial(run, function), compiler_options=options)


def errors(results, exact):
    """The norm of each array's difference, as a share of its own."""
    norms = [np.linalg.norm(b) for b in exact]
    pairs = zip(results, exact, strict=True)
    apart = [np.linalg.norm(np.asarray(a, np.float64) - b) for a, b in pairs]
    # What is 0, as the gradient for a bias of all logits, is rounding alone.
    shares = zip(apart, norms, strict=True)
    return [a / b if b > 1e-9 * max(norms) else 0.0 for a, b in shares]


@functools.cache
def exactly(name):
    """The plain formula in float64, for operands of a size in a type."""
    case = CASES[name]
    program = jax.jit(functools.partial(run, case.plain))

    def at(size, dtype):
        with jax.enable_x64(True):
            operands = [jnp.asarray(a, jnp.float32).astype(dtype) for a in case.operands(size)]
            exact = [jnp.asarray(np.asarray(a), jnp.float64) for a in operands]
            with jax.numpy_rank_promotion("allow"):
                shapes = jax.eval_shape(case.plain, *exact)
            draw = lambda s: jnp.asarray(normal(9, *s.shape), jnp.float32).astype(dtype)  # noqa: E731
            g = jax.tree.map(draw, shapes)
            wide_g = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), g)
            return operands, g, jax.device_get(jax.tree.leaves(program(exact, wide_g)))

    return at


def check(test, name, dtype):
    """Compare the errors of a kernel with those of XLA's paths, at all sizes.

    A TPU kernel's paths are the plain formula and what other platforms compile.
    """
    case = CASES[name]
    kernel, *by_xla = (compiled(lambda *p: case.function(*p)), compiled(case.plain))
    if case.platform is not contextlib.nullcontext:
        by_xla.append(compiled(lambda *p: case.function(*p)))
    for size in SIZES:
        operands, g, exact = exactly(name)(size, dtype)
        paths = [errors(jax.tree.leaves(path(operands, g)), exact) for path in by_xla]
        with case.platform():
            results = jax.tree.leaves(kernel(operands, g))
        allowed = [max(of_array) for of_array in zip(*paths, strict=True)]
        for i, (error, most) in enumerate(zip(errors(results, exact), allowed, strict=True)):
            with test.subTest(size=size, array=i):
                test.assertLessEqual(error, max(LEAST[dtype], case.limit * most))


class LargeValuesTest(parameterized.TestCase):
    def test_every_kernel_is_here(self):
        folder = Path(kernels.__file__).parent
        files = {str(f.relative_to(folder).with_suffix("")) for f in folder.rglob("*.py")}
        files = {f.split("/")[0] if f.startswith("deformable") else f for f in files}
        files = {f for f in files if not f.endswith("__init__")}
        covered = {name for case in CASES.values() for name in case.files.split()}
        self.assertEqual(files, covered | {*OTHERS})

    @sweeps.rows(*HEADS)
    def test_heads_in_bfloat16(self, name):
        check(self, name, "bfloat16")


class EveryKernelTest(parameterized.TestCase):
    """Takes minutes, and is therefore in `slow.txt`."""

    @parameterized.parameters(*CASES)
    def test_errors(self, name):
        check(self, name, "float32")
        check(self, name, "bfloat16")
