"""PyTorch networks as JAX functions, without rewriting them.

`torch.export` turns a module into a list of PyTorch operators, and `operators.TABLE` computes each
of them in JAX. The conversion needs the extra `torch`; the result does not need PyTorch.

    logits_fn, weights = from_module(module, images)
    logits = logits_fn(images)  # f32[B,H,W,C] in [0, 1] -> f32[B,K]
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.pytorch import agreement
from jaxrobust.pytorch import program as programs
from jaxrobust.pytorch.operators import DRAWS, TABLE
from jaxrobust.pytorch.program import Converted, Program
from jaxrobust.pytorch.reading import exporting, steps, wrappers
from jaxrobust.types import Array


def from_module(
    module: Any,
    example_images: Any,
    *,
    output: str | None = None,
    compare: bool = True,
    random: bool = False,
) -> tuple[jax.tree_util.Partial, dict[str, Array]]:
    """Return a module's network as a JAX function, and its weights.

    Args:
      module: `torch.nn.Module` in eval mode on the CPU, in float32, from images f32[B,C,H,W] in
        [0, 1] to logits f32[B,K]; or its `torch.export.ExportedProgram`.
      example_images: f32[B,H,W,C] as everywhere here, or a tensor [B,C,H,W]. On the first images,
        logits and input gradients are compared with PyTorch's. Images with a single value are
        replaced by random ones.
      output: names the logits among several results: a key, or a position in a tuple such as "0".
        None: the only candidate.
      compare: False: trust the conversion; only the images' shape matters then.
      random: the module may draw random numbers, and `logits_fn` takes keys [B] as its second
        argument. Each image's draws come from its own key, as if it were alone in its batch.
    Returns:
      `logits_fn`, a `jax.tree_util.Partial` over the weights, for images [B,H,W,C] with any B. It
      computes in the floating type of the weights, and its logits are at least f32. And the weights
      by their names in the module; `jax.tree_util.Partial(logits_fn.func, others)` replaces them.
      Values computed from weights alone are weights too, `computed.NAME`.
    Raises:
      ValueError: the module is not supported, has an operator without a row, or disagrees with its
        conversion in logits or gradients; the message names the module's line.
    """
    network = converted(module, _image(example_images), output=output, random=random)
    if compare:
        agreement.check(network, _some(example_images, agreement.FEW))
    return network.logits_fn, network.weights


def from_file(
    path: str | Path, *, output: str | None = None
) -> tuple[jax.tree_util.Partial, dict[str, Array]]:
    """Return the network of a `.pt2` from `torch.export.save`, as `from_module` does."""
    exported, single = exporting.loaded(Path(path))
    network = of_exported(exported, single=single, output=output)
    return network.logits_fn, network.weights


def converted(
    module: Any, image: tuple[int, int, int], *, output: str | None = None, random: bool = False
) -> Converted:
    """Return both sides of a module for images H, W, C; raises like `from_module`."""
    import torch

    if isinstance(module, torch.export.ExportedProgram):
        return of_exported(module, output=output, random=random)
    module = wrappers.inside(module)
    exporting.check(module, random=random)
    with wrappers.uncompiled():
        exported, single = exporting.exported(module, image)
    network = of_exported(exported, single=single, output=output, random=random)
    return network._replace(module=module)


def of_exported(
    exported: Any, *, single: bool = False, output: str | None = None, random: bool = False
) -> Converted:
    """Return both sides of an exported program; `single`: it takes one image at a time."""
    module = exported.module()
    exported = exporting.decomposed(exported)
    program, weights = steps.read(exported, single=single, random=random)
    output = steps.chosen_output(exported, program, output)
    logits_fn = jax.tree_util.Partial(function_of(program, output, random), weights)
    return Converted(logits_fn, weights, program, exported, module, output, random)


def function_of(program: Program, output: str, random: bool = False) -> Callable[..., Array]:
    """Return `logits_fn` of weights and images, and keys if `random`.

    A program that draws runs image by image, so each image has its own draws.
    """
    name, table = str(program.results[output]), TABLE | DRAWS if random else TABLE

    def logits_of(weights: Mapping[str, Array], images: Array, *key: Array) -> Array:
        return programs.plain(programs.run(program, table, weights, images, *key)[name])

    def one(weights: Mapping[str, Array], image: Array, *key: Array) -> Array:
        return logits_of(weights, image[None], *key)[0]

    def computed(weights: Mapping[str, Array], *operands: Array) -> Array:
        function: Any = logits_of
        if program.single or program.draws:
            function = jax.vmap(one, (None, *(0 for _ in operands)))
        images = operands[0]
        if getattr(images, "ndim", 0) != 4 or not isinstance(images, np.ndarray | jax.Array):
            raise ValueError(
                f"images are {type(images).__name__} {getattr(images, 'shape', '')}; pass arrays "
                "[B,H,W,C] of NumPy or JAX: tensor.permute(0, 2, 3, 1).numpy()"
            )
        logits = function(weights, *operands)
        return logits if logits.dtype.itemsize >= 4 else logits.astype(jnp.float32)

    def logits_fn(weights: Mapping[str, Array], images: Array) -> Array:
        return computed(weights, images)

    def keyed(weights: Mapping[str, Array], images: Array, keys: Array) -> Array:
        return computed(weights, images, keys) if program.draws else computed(weights, images)

    return keyed if random else logits_fn


def _some(images: Any, count: int) -> np.ndarray:
    is_array = isinstance(images, np.ndarray | jax.Array)
    rows = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    some = np.asarray(images[rows] if is_array else images[rows].detach(), np.float32)
    some = some if is_array else some.transpose(0, 2, 3, 1)
    if len(some) and some.std((1, 2, 3)).min() > 0:
        return some
    return np.random.default_rng(0).random((count, *some.shape[1:]), np.float32)


def _image(images: Any) -> tuple[int, int, int]:
    shape = tuple(images.shape)
    if len(shape) != 4:
        raise ValueError(f"images have shape {shape}; pass [B,H,W,C], or a tensor [B,C,H,W]")
    if not isinstance(images, np.ndarray | jax.Array):
        return shape[2], shape[3], shape[1]
    return shape[1], shape[2], shape[3]
