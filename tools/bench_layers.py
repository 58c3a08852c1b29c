"""Milliseconds per layer of ConvNeXt-T, ResNets, ViT and XCiT, beside PyTorch if installed.

PyTorch gets channels-last arrays: in the layout timm uses, its gradient of a depthwise kernel is
two to three times slower.

python tools/bench_layers.py [--batch 8] [--repeats 7] [--only depthwise] [--json]
"""

import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.models.kernels import (
    attention,
    batch_norms,
    channel_attention,
    convolutions,
    depthwise,
    layers,
    pooling,
)
from jaxrobust.models.kernels.talking_heads import talking_heads
from jaxrobust.runtime.commandline.arguments import Arguments

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

Array = jax.Array
Tensor = Any  # PyTorch's, which may be missing
# name, function, shapes of its operands, the same in PyTorch
Case = tuple[str, Callable[..., Any], list[tuple[int, ...]], Callable[..., Any]]

STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))
# size, channels, features, window, stride, padding
CONVS = (
    (224, 3, 64, 7, 2, 3),  # ResNet
    (56, 64, 64, 3, 1, 1),
    (14, 256, 256, 3, 1, 1),
    (7, 512, 512, 3, 1, 1),
    (56, 128, 128, 3, 2, 1),
    (56, 64, 256, 1, 1, 0),
    (56, 256, 512, 1, 2, 0),
    (224, 3, 48, 3, 2, 1),  # ConvStem
    (112, 48, 96, 3, 2, 1),
    (224, 3, 384, 16, 16, 0),  # PatchStem
)


def _of_images(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *rest, **how: function(x.permute(0, 3, 1, 2), *rest, **how).permute(0, 2, 3, 1)


conv = _of_images(
    lambda x, kernel, **how: torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), **how)
)
pool = _of_images(lambda x: torch.nn.functional.max_pool2d(x, 3, 2, 1))
norm = _of_images(lambda x, s, b: torch.nn.functional.batch_norm(x, None, None, s, b, True))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


def _talk(qkv: Tensor, before: Tensor, after: Tensor) -> Tensor:
    parts = qkv.reshape(*qkv.shape[:2], 3, len(before), -1)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).permute(0, 2, 3, 1)
    weights = ((logits @ before).softmax(2) @ after).permute(0, 3, 1, 2)
    return (weights @ v).transpose(1, 2).flatten(2)


def _cross(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    weights = (q @ k.transpose(2, 3) * temperature).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2).flatten(2)


def _talking_heads(qkv: Array, before: Array, after: Array) -> Array:
    zeros = jnp.zeros(before.shape[0])
    return talking_heads(qkv, (before, zeros), (after, zeros))


def _other_cases(batch: int) -> Iterator[Case]:
    for size, ins, outs, window, stride, padding in CONVS:
        how: dict[str, Any] = {"stride": stride, "padding": padding}
        ours, theirs = (functools.partial(f, **how) for f in (convolutions.conv, conv))
        shapes: list[tuple[int, ...]] = [(batch, size, size, ins), (window, window, ins, outs)]
        yield f"conv {window}x{window}/{stride}", ours, shapes, theirs
    yield "max_pool", pooling.max_pool, [(batch, 112, 112, 64)], pool
    image, vector = (batch, 56, 56, 64), (64,)
    yield (
        "batch_norm",
        lambda *a: batch_norms.batch_norm_train(*a)[0],
        [image, vector, vector],
        norm,
    )
    tokens, windows, channels = (batch, 197, 6, 64), (16 * batch, 49, 8, 32), (batch, 196, 8, 48)
    yield "attention", attention.attention, [tokens] * 3, _attend
    yield (
        "attention bias",
        lambda q, k, v, bias: attention.attention(q, k, v, bias=bias),
        [windows] * 3 + [(8, 49, 49)],
        _attend,
    )
    yield "talking_heads", _talking_heads, [(batch, 196, 1152), (8, 8), (8, 8)], _talk
    yield "cross", channel_attention.cross_covariance, [channels] * 3 + [(8, 1, 1)], _cross


def _cases(batch: int, size: int, channels: int) -> Iterator[Case]:
    image, wide = (batch, size, size, channels), (batch, size, size, 4 * channels)
    vector = (channels,)
    theirs = functools.partial(conv, padding=3, groups=channels)
    for name in sorted(depthwise.IMPLEMENTATIONS):
        ours = functools.partial(convolutions.depthwise_conv, implementation=name)
        yield f"depthwise {name}", ours, [image, (7, 7, 1, channels)], theirs
    yield (
        "layer_norm",
        layers.layer_norm,
        [image, vector, vector],
        lambda x, s, b: torch.nn.functional.layer_norm(x, vector, s, b, 1e-6),
    )
    yield "gelu", layers.gelu, [wide], lambda x: torch.nn.functional.gelu(x)
    yield "linear up", layers.linear, [image, (channels, 4 * channels)], lambda x, k: x @ k
    yield "linear down", layers.linear, [wide, (4 * channels, channels)], lambda x, k: x @ k
    if size > 7:
        ours, theirs = (functools.partial(f, stride=2) for f in (convolutions.conv, conv))
        yield "conv 2x2/2", ours, [image, (2, 2, channels, 2 * channels)], theirs


def best(call: Callable[[], Any], repeats: int) -> list[float]:
    """Least (wall, processor) milliseconds of one call, after a first one."""
    call()
    times = []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    return [round(1e3 * min(column), 2) for column in zip(*times, strict=True)]


def time_jax(
    function: Callable[..., Array], operands: list[Array], g: Array, repeats: int
) -> dict[str, list[float]]:
    """Return times of the value, of the input gradient and of the parameter gradients."""
    parameters = operands[1:]
    value = jax.jit(function)
    to_input = jax.jit(lambda x, p, g: jax.vjp(lambda x: function(x, *p), x)[1](g))
    to_parameters = jax.jit(lambda x, p, g: jax.vjp(lambda *p: function(x, *p), *p)[1](g))
    x = operands[0]
    return {
        "forward": best(lambda: jax.block_until_ready(value(*operands)), repeats),
        "input": best(lambda: jax.block_until_ready(to_input(x, parameters, g)), repeats),
        "parameters": best(lambda: jax.block_until_ready(to_parameters(x, parameters, g)), repeats)
        if parameters
        else [],
    }


def time_torch(
    function: Callable[..., Tensor], operands: list[Array], g: Array, repeats: int
) -> dict[str, list[float]]:
    """Return the same three in PyTorch; gradients reuse one forward pass."""
    tensors = [torch.tensor(np.asarray(a)).requires_grad_() for a in operands]
    out, along = function(*tensors), torch.tensor(np.asarray(g))

    def gradient(wanted):
        return lambda: torch.autograd.grad(out, wanted, along, retain_graph=True)

    with torch.no_grad():
        forward = best(lambda: function(*tensors), repeats)
    return {
        "forward": forward,
        "input": best(gradient(tensors[:1]), repeats),
        "parameters": best(gradient(tensors[1:]), repeats) if tensors[1:] else [],
    }


def main() -> None:
    parser = Arguments(__doc__)
    parser.flag("batch", type=int, default=8, help="Batch size; default: %(default)s.")
    parser.flag("repeats", type=int, default=7, help="Number of repetitions; default: %(default)s.")
    parser.flag("only", default="", help="Text that the layer's name contains.")
    parser.flag("json", action="store_true", help="Print one JSON record for each line.")
    args = parser.parse_args()
    if not args.json:
        print("wall/processor ms: JAX forward, input gradient, parameter gradient | PyTorch")
    stages = [_cases(args.batch, size, channels) for size, channels in STAGES]
    for stage in [*stages, _other_cases(args.batch)]:
        for name, function, shapes, reference in stage:
            if args.only not in name:
                continue
            rng = np.random.default_rng(0)
            operands = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
            g = jax.jit(function)(*operands)
            record: dict[str, Any] = {"layer": name, "shape": shapes[0]}
            record["jax"] = time_jax(function, operands, g, args.repeats)
            if torch is not None:
                record["torch"] = time_torch(reference, operands, g, args.repeats)
            if args.json:
                print(json.dumps(record), flush=True)
                continue
            sides = [record[side].values() for side in ("jax", "torch") if side in record]
            cells = [["/".join(f"{t:.1f}" for t in pair) for pair in side] for side in sides]
            columns = [" ".join(cell.rjust(13) for cell in side) for side in cells]
            shape = "x".join(map(str, shapes[0]))
            print(f"{name:18s} {shape:14s} {' | '.join(columns)}", flush=True)


if __name__ == "__main__":
    main()
