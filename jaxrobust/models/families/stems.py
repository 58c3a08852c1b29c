"""Stems that several architectures share, from pixels to features, and their weight names.

Source: Singh, Croce, Hein 2023 (arXiv 2303.01870), section 4, and nmndeep/revisiting-at.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from jaxrobust.models.interface.renaming import Renaming, affine, conv_oihw, row
from jaxrobust.models.kernels.stem_layers import stem_layers
from jaxrobust.models.modules.basic import Conv, Gelu, LayerNorm
from jaxrobust.models.modules.draws import Draws, Initializer, normal_02, torch_default
from jaxrobust.types import Array


def patch_stem(v: Any, dim: int, rngs: Draws, init: Initializer) -> list[nnx.Module]:
    """Make a convolution over non-overlapping windows."""
    (stride,) = v.stem_strides
    return [Conv(v.in_channels, dim, stride, stride=stride, init=init, rngs=rngs)]


def stem(
    v: Any, dim: int, rngs: Draws, *, init: Initializer = normal_02, project: bool = False
) -> list[nnx.Module]:
    """Make a variant's stem: with `stem_widths` a ConvStem, else a PatchStem drawn from `init`.

    LN and GELU follow each of a ConvStem's convolutions, 3x3 by default; `project` adds a plain 1x1
    convolution to `dim`.
    """
    if not v.stem_widths:
        return patch_stem(v, dim, rngs, init)
    stem: list[nnx.Module] = []
    ins, kernels = v.in_channels, v.stem_kernels or (3,) * len(v.stem_widths)
    for out, stride, k in zip(v.stem_widths, v.stem_strides, kernels, strict=True):
        options = {"stride": stride, "padding": k // 2, "init": torch_default, "alone": True}
        stem += [Conv(ins, out, k, rngs=rngs, **options), LayerNorm(out), Gelu()]
        ins = out
    if project:
        stem.append(Conv(ins, dim, 1, init=torch_default, alone=True, rngs=rngs))
    return stem


def through(stem: Sequence[Any], x: Array) -> Array:
    """Apply a stem; on TPUs, two initial convolutions of stride 2 are one kernel."""
    layers = list(stem)
    if [type(layer) for layer in layers[:6]] == 2 * [Conv, LayerNorm, Gelu]:
        pairs = layers[0:2], layers[3:5]
        if all((conv.stride, conv.padding) == (2, 1) for conv, _ in pairs):
            parameters = [
                parameter[...]
                for conv, norm in pairs
                for parameter in (conv.kernel, conv.bias, norm.scale, norm.bias)
            ]
            x, layers = stem_layers(x, *parameters), layers[6:]
    for layer in layers:
        x = layer(x)
    return x


def conv_stem_rows(prefix: str, our_prefix: str) -> list[Renaming]:
    """List a ConvStem's rows: convolutions at 0, 3, 6, ..., each followed by norm and GELU."""
    return [
        row(prefix + r"\.(0|3|6|9|12)\.weight", our_prefix + r".\1.kernel", conv_oihw),
        row(prefix + r"\.(1|4|7|10)\.weight", our_prefix + r".\1.scale"),
        row(prefix + r"\.(\d+)\.bias", our_prefix + r".\1.bias"),
    ]


def conv_stem_keys(prefix: str, convolutions: int, *, project: bool = False) -> list[str]:
    """List the reference's names of a ConvStem, in order."""
    slots = [slot for i in range(convolutions) for slot in (3 * i, 3 * i + 1)]
    return affine(*(f"{prefix}.{slot}" for slot in slots + [3 * convolutions] * project))


def check_stem(widths: Sequence[int], strides: Sequence[int], kernels: Sequence[int] = ()) -> None:
    """Raise `ValueError` for an invalid stem; a PatchStem has no widths and one stride."""
    rows = {"stem_widths": widths, "stem_strides": strides, "stem_kernels": kernels}
    for name, values in rows.items():
        if not (isinstance(values, tuple | list) and all(n >= 1 for n in values)):
            raise ValueError(f"{name}={values!r} must be a tuple of positive integers")
    if len(strides) != max(1, len(widths)):
        raise ValueError(
            f"stem_strides={strides} needs {max(1, len(widths))} entries: one for "
            "each ConvStem convolution, or one for a PatchStem"
        )
    if kernels and (len(kernels) != len(widths) or not all(k % 2 for k in kernels)):
        raise ValueError(
            f"stem_kernels={kernels} must be odd numbers, one for each of stem_widths={widths} "
            "(a PatchStem's kernel is as large as its stride)"
        )
