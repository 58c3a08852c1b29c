"""The golden updates' small residual networks, with the golden arrays' own names and layouts."""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.models.kernels import batch_norms, layers
from jaxrobust.types import Classifier

STRIDES = (1, 2, 2)
Block = Callable[..., jax.Array]


def _conv(x, kernel, stride=1, groups=1):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(kernel.shape[0] // 2,) * 2] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip


def basic(x, weights, norm, activation, stride):
    """Two 3x3 convolutions behind their norms; the shortcut's sees the first norm too."""
    active = activation(norm("bn1", x))
    y = _conv(active, weights["conv1.weight"], stride)
    y = _conv(activation(norm("bn2", y)), weights["conv2.weight"])
    return y + _conv(active, weights["shortcut.0.weight"], stride)


def robust(x, weights, norm, activation, stride):
    """RobustResBlock as released: 8 splits of 4 groups each, and a squeeze-excitation beside."""
    shortcut = x
    if "shortcut.0.weight" in weights:
        shortcut = _conv(activation(norm("bn1", x)), weights["shortcut.0.weight"], stride)
    h = activation(norm("bn2", _conv(x, weights["conv1.weight"])))
    *parts, last = jnp.split(h, 8, axis=-1)
    outputs = []
    for i, part in enumerate(parts):
        if stride == 1 and i:
            part = part + outputs[-1]
        y = _conv(part, weights[f"conv2.{i}.weight"], stride, groups=4)
        outputs.append(activation(norm(f"bn3.{i}", y)))
    if stride > 1:
        window, around = (1, 3, 3, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]
        zero = np.zeros((), last.dtype)
        last = lax.reduce_window(last, zero, lax.add, window, (1, stride, stride, 1), around) / 9
    z = _conv(jnp.concatenate([*outputs, last], axis=-1), weights["conv3.weight"])
    u = norm("se_bn", z)
    gate = jax.nn.relu(u.mean((1, 2)) @ weights["se.fc.0.weight"]) @ weights["se.fc.2.weight"]
    return z + shortcut + u * jax.nn.sigmoid(gate)[:, None, None]


def network(block: Block, activation=jax.nn.relu, momentum: float = 0.1) -> Classifier:
    """One block a stage; of momentum 1 the running statistics are those of the last images."""

    def apply(params, stats, images, *, train=False, key=None):
        moved = dict(stats)

        def norm(name, x):
            running = [f"{name}.running_mean", f"{name}.running_var"]
            affine = params[f"{name}.weight"], params[f"{name}.bias"]
            if not train:
                return batch_norms.batch_norm(x, *affine, *(stats[key] for key in running))
            out, *new = batch_norms.batch_norm_train(x, *affine)
            for key, value in zip(running, new, strict=True):
                moved[key] = (1 - momentum) * stats[key] + momentum * value
            return out

        x = _conv(images, params["stem_conv.weight"])
        for i, stride in enumerate(STRIDES):
            prefix = f"blocks.{i}.layer.0."
            own = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
            x = block(x, own, lambda name, x, p=prefix: norm(p + name, x), activation, stride)
        x = activation(norm("norm1", x)).mean((1, 2))
        return layers.linear(x, params["fc.weight"], params["fc.bias"]), moved

    return Classifier(lambda key: ({}, {}), apply)


def seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The golden set's first weights: a draw that belongs to the array's name."""
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    r = draw.standard_normal(int(np.prod(shape))).reshape(shape)
    if name.endswith("running_var"):
        r = 1 + 0.1 * np.abs(r)
    elif len(shape) > 1:
        r = r / np.sqrt(r[0].size)
    elif name.endswith(".weight"):
        r = 1 + 0.1 * r
    else:
        r = 0.1 * r
    r = r.astype(np.float32).astype(np.float64)
    return 0.25 * r if name == "fc.weight" else r


def ours(array: np.ndarray) -> jax.Array:
    """A reference's array in our layout."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return jnp.asarray(array.transpose(axes) if axes else array)


def first_weights(shapes: dict[str, tuple[int, ...]]):
    """Parameters and running statistics before the first update, of their shapes in PyTorch."""
    arrays = {name: ours(seeded(name, shape)) for name, shape in shapes.items()}
    stats = {name: arrays.pop(name) for name in list(arrays) if "running" in name}
    return arrays, stats


def torch_apply(arrays, x, train):
    """The network of basic blocks in PyTorch; in training the running statistics move in place."""
    from torch.nn import functional as f

    def norm(name, x):
        keys = ("running_mean", "running_var", "weight", "bias")
        return f.batch_norm(x, *(arrays[f"{name}.{key}"] for key in keys), training=train)

    x = f.conv2d(x, arrays["stem_conv.weight"], padding=1)
    for i, stride in enumerate(STRIDES):
        p = f"blocks.{i}.layer.0."
        active = f.relu(norm(f"{p}bn1", x))
        y = f.conv2d(active, arrays[f"{p}conv1.weight"], stride=stride, padding=1)
        y = f.conv2d(f.relu(norm(f"{p}bn2", y)), arrays[f"{p}conv2.weight"], padding=1)
        x = y + f.conv2d(active, arrays[f"{p}shortcut.0.weight"], stride=stride)
    x = f.relu(norm("norm1", x)).mean((2, 3))
    return f.linear(x, arrays["fc.weight"], arrays["fc.bias"])
