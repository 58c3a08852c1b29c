"""A trainable PyTorch module: its two programs as one network with parameters and statistics.

Both are flat dicts under the names of the module's state dict, so the package treats them like its
own networks' weights. Nothing here needs PyTorch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.models.interface.classifier import check_images
from jaxrobust.pytorch import blocks
from jaxrobust.pytorch import program as programs
from jaxrobust.pytorch.blocks import Part, Pattern
from jaxrobust.pytorch.operators import DRAWS, TABLE, TRAINING
from jaxrobust.pytorch.program import OperatorCall, OperatorRule, Program
from jaxrobust.types import Array, Classifier, Params

# Operators that PyTorch's autocast computes in float32, whatever the type of the rest.
SINGLE = {
    "aten._native_batch_norm_legit_no_training.default",
    "aten._native_batch_norm_legit_functional.default",
    "aten._native_batch_norm_legit.no_stats",
    "aten.native_layer_norm.default",
    "jaxrobust.norm_and_tokens.default",  # the same, of `torch_fusions`
    "aten.native_group_norm.default",
    "aten._softmax.default",
    "aten._log_softmax.default",
    "aten.linalg_vector_norm.default",
    "aten.cumsum.default",
    "aten.exp.default",
    "aten.log.default",
    "aten.pow.Tensor_Scalar",
    "aten.rsqrt.default",
}
_RULES = TABLE | TRAINING
MEAN, STD = "normalize.mean", "normalize.std"  # of `init.normalize`, before the module


class Trainable(NamedTuple):
    """A module's programs and initial weights."""

    evaluation: Program
    training: Program
    params: dict[str, np.ndarray]  # trained
    stats: dict[str, np.ndarray]  # buffers and frozen parameters
    tied: Mapping[str, str]  # name of a tensor -> name of the tensor that it is tied to
    integers: dict[str, np.ndarray]  # of its state dict: counters, which are stats too, and others
    names: tuple[str, ...]  # of its state dict, in its order
    image: tuple[int, int, int]  # height, width, channels at export
    head: tuple[str, ...] = ()  # the parts that the module declares as its head, as timm's do


# (part, constants of its program) -> its steps, some of them replaced under the same names.
Fusion = Callable[[Part, Mapping[str, Any]], Sequence[OperatorCall]]


def _as_they_are(part: Part, constants: Mapping[str, Any]) -> Sequence[OperatorCall]:
    del constants
    return part.steps


class Faster(NamedTuple):
    """Faster ways to compute a program; the first two return None for what they do not support."""

    kernels: Mapping[str, OperatorRule] = MappingProxyType({})  # rows that are tried first
    patterns: Sequence[Pattern] = ()  # functions for whole blocks
    fused: Fusion = _as_they_are  # replaces several steps by one of `kernels`


_PLAIN = Faster()


def classifier(
    network: Trainable, faster: Faster = _PLAIN, *, remat: bool = False, scan: bool = False
) -> Classifier:
    """Return the module as two pure functions, computing in the type of their parameters.

    In training, `apply` takes keys [B], one for each image, or None if the network does not draw.
    `remat` recomputes the values of a block in its backward pass instead of storing them, and
    `scan` compiles consecutive blocks with the same computation once.
    """
    like = {name: a.shape for name, a in {**network.params, **network.stats}.items()}
    normalises = normalises_itself(network)

    def init(key: Array) -> tuple[Params, Params]:
        del key  # the module's own weights are the initial ones
        params, stats = (
            {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()}
            for arrays in (network.params, network.stats)
        )
        if not normalises:
            stats[MEAN] = jnp.zeros(network.image[2], jnp.float32)
            stats[STD] = jnp.ones(network.image[2], jnp.float32)
        return params, stats

    def apply(
        params: Params, stats: Params, images: Array, *, train: bool = False, key: Any = None
    ) -> tuple[Array, Params]:
        _check(params, stats, images, like, network.image[2])
        if not normalises:
            mean, std = (stats[name].reshape(1, 1, 1, -1) for name in (MEAN, STD))
            images = (images - mean.astype(images.dtype)) / std.astype(images.dtype)
        program = network.training if train else network.evaluation
        values = run(program, params, stats, images, key, faster, remat=remat, scan=scan)
        (name,) = program.results.values()
        logits = programs.plain(values[str(name)])
        logits = logits if logits.dtype.itemsize >= 4 else logits.astype(jnp.float32)
        moved = {
            name: programs.plain(values[value]).astype(stats[name].dtype)
            for name, value in program.moved.items()
        }
        return logits, stats | jax.lax.stop_gradient(moved)

    return Classifier(init, apply)


def normalises_itself(network: Trainable) -> bool:
    """Tell whether mean and std belong to the module, which uses them as it likes."""
    return bool({MEAN, STD} & (network.params.keys() | network.stats.keys()))


def _check(
    params: Params, stats: Params, images: Array, like: Mapping[str, Any], channels: int
) -> None:
    check_images(images, channels)
    arrays = {**params, **stats}
    if missing := like.keys() - arrays.keys():
        raise ValueError(f"these weights do not belong to this network: {sorted(missing)[:8]}")
    for name, shape in like.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, expected {shape}")


def run(
    program: Program,
    params: Params,
    stats: Params,
    images: Array,
    keys: Array | None,
    faster: Faster,
    *,
    remat: bool = False,
    scan: bool = False,
) -> dict[str, Any]:
    """Compute a program's values for images f[B,H,W,C] that are read between its blocks.

    Norms, softmax and statistics are computed in at least float32. A random draw depends only on
    the image's key in `keys` [B] and on the number of the step.
    """
    dtype = programs.computing(params, images)
    single = dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)
    weights = {name: a.astype(dtype) for name, a in stats.items()} | params
    wide: dict[str, Any] = {
        value: stats[key].astype(single) for value, key in program.weights.items() if key in stats
    }
    values = programs.inputs(program, weights, images, dtype)
    places = {name: place for place, name in enumerate(program.draws)}
    # Steps that update statistics, or are computed from them alone: counters.
    states = {value for value, key in program.weights.items() if key in program.moved}
    for step in programs.needed(program.steps, program.moved.values()):
        inputs = programs.read_by(step)
        if inputs and inputs <= states:
            states.add(step.name)
    states |= {*program.moved.values()}
    if keys is not None:
        keys = jnp.broadcast_to(keys, images.shape[:1])
    compute = _Pass(program, faster, keys, dtype, single, states).part
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return blocks.computed(program, compute, values, wide, places, remat=remat, scan=scan)


class _Pass(NamedTuple):
    """State shared by the steps of one pass."""

    program: Program
    faster: Faster
    keys: Array | None  # [B]
    dtype: Any
    single: Any  # type of norms, softmax and statistics
    states: set[str]  # steps that update statistics, computed in that type

    def part(self, part: Part, values: Mapping, *context: Mapping) -> dict[str, Any]:
        def subset(names: Iterable[str]) -> dict[str, Any]:
            return self.steps(programs.needed(part.steps, names), values, *context)

        for pattern in self.faster.patterns if part.block else ():
            if (results := pattern(part, values, subset)) is not None:
                return results
        results = self.steps(self.faster.fused(part, self.program.constants), values, *context)
        return {name: results[name] for name in part.results}

    def steps(
        self, steps: Sequence[OperatorCall], values: Mapping, wide: Mapping, places: Mapping
    ) -> dict[str, Any]:
        """Compute steps; norms read weights in float32 of `wide`, `places` numbers the draws."""
        values = dict(values)
        for step in steps:
            if step.name not in places:
                values[step.name] = self.value(step, values, wide)
                continue
            if self.keys is None:
                raise ValueError("the network draws random numbers in training; give keys [B]")
            keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, places[step.name])
            values[step.name] = _drawn(step, self.program, keys, values, self.dtype)
        return values

    def value(self, step: OperatorCall, values: Mapping[str, Any], wide: Mapping[str, Any]) -> Any:
        types, is_state = {self.program.dtype: self.dtype}, step.name in self.states
        if step.operator in self.faster.kernels:  # kernels use float32 where necessary
            inputs = {**values, **wide} if step.operator in SINGLE else values
            result = programs.compute(step, self.faster.kernels, inputs, types)
            if result is not None:
                return result
        if step.operator not in SINGLE and not is_state:
            return programs.compute(step, _RULES, values, types)
        inputs = {name: _typed(values[name], self.single) for name in programs.read_by(step)}
        inputs |= {name: wide[name] for name in inputs.keys() & wide.keys()}
        result = programs.compute(step, _RULES, inputs, {self.program.dtype: self.single})
        if is_state or self.single == self.dtype:
            return result
        if isinstance(result, tuple | list) and not isinstance(result, programs.ChannelsLast):
            return [_typed(result[0], self.dtype), *result[1:]]  # others are statistics
        return _typed(result, self.dtype)


def _typed(value: Any, dtype: Any) -> Any:
    def typed(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(getattr(x, "dtype", int), jnp.floating) else x

    return jax.tree.map(typed, value)


def _drawn(
    step: OperatorCall, program: Program, keys: Array, values: Mapping[str, Any], dtype: Any
) -> Any:
    """Compute a step that draws, for each image from its own key along the image axis."""
    axis, count = program.image_axes[step.name], keys.shape[0]

    def parted(array: Array) -> Array:  # the image axis first, then one image's axes
        shape = array.shape
        split = array.reshape(*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :])
        return jnp.moveaxis(split, axis, 0)

    def joined(array: Array) -> Array:
        array = jnp.moveaxis(array, 0, axis)
        shape = array.shape
        return array.reshape(*shape[:axis], -1, *shape[axis + 2 :])

    inputs = {name: programs.plain(values[name]) for name in programs.read_by(step)}
    arrays = {name: parted(a) for name, a in inputs.items() if getattr(a, "ndim", 0) > axis}
    shared = {name: a for name, a in inputs.items() if name not in arrays}
    types, table = {program.dtype: dtype}, {step.operator: DRAWS[step.operator]}
    step = _of_one(step, axis, count, shared)

    def one(key: Array, arrays: Mapping[str, Array]) -> Any:
        return programs.compute(step, table, {**shared, **arrays}, types, key)

    return jax.tree.map(joined, jax.vmap(one)(keys, arrays))


def _of_one(step: OperatorCall, axis: int, count: int, values: Mapping[str, Any]) -> OperatorCall:
    """Replace a step's sizes for all images by those of one image."""

    def of_one(operand: Any) -> Any:
        if not isinstance(operand, tuple) or isinstance(operand, programs.Of):
            return operand
        sizes = [values[n.name] if isinstance(n, programs.Of) else n for n in operand]
        if len(sizes) <= axis or not all(isinstance(n, int) for n in sizes):
            return operand
        return (*sizes[:axis], sizes[axis] // count, *sizes[axis + 1 :])

    return step._replace(operands=tuple(map(of_one, step.operands)))


def state_dict(network: Trainable, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays under the names of the module's state dict, in its types."""
    names = {*network.params, *network.stats}
    state = {name: np.asarray(arrays[name]) for name in names} | network.integers
    for name in names & network.integers.keys():  # num_batches_tracked, averaged meanwhile
        state[name] = np.rint(arrays[name]).astype(network.integers[name].dtype)
    state |= {name: state[first] for name, first in network.tied.items()}
    return {name: state[name] for name in network.names}
