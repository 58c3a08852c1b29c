"""A module of PyTorch's that trains: its two programs as one network of parameters and statistics.

Both are flat dicts under the names of the module's state dict, so that whatever the package does
with its own networks' weights it does with these. Nothing here needs PyTorch.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.pytorch import blocks
from jaxrobust.pytorch import program as programs
from jaxrobust.pytorch.blocks import Part, Pattern
from jaxrobust.pytorch.operators import DRAWS, TABLE, TRAINING
from jaxrobust.pytorch.program import OperatorCall, OperatorRule, Program
from jaxrobust.types import Array, Classifier, Params

# What PyTorch's autocast computes in float32, whatever the type of the rest.
SINGLE = {
    "aten._native_batch_norm_legit_no_training.default",
    "aten._native_batch_norm_legit_functional.default",
    "aten._native_batch_norm_legit.no_stats",
    "aten.native_layer_norm.default",
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
_ROWS = TABLE | TRAINING
MEAN, STD = "normalize.mean", "normalize.std"  # of `init.normalize`, before the module


class Trainable(NamedTuple):
    """A module's programs and the weights that it starts with."""

    evaluation: Program
    training: Program
    params: dict[str, np.ndarray]  # what is trained
    stats: dict[str, np.ndarray]  # buffers, and parameters that the module froze
    tied: Mapping[str, str]  # name of a tensor -> of the one whose numbers it shares
    integers: dict[str, np.ndarray]  # of its state dict: counters, which are stats too, and others
    names: tuple[str, ...]  # of its state dict, in its order
    image: tuple[int, int, int]  # height, width, channels of those that it was written down for
    head: tuple[str, ...] = ()  # the parts that the module says are its head, as timm's do


# (part, constants of its program) -> its steps, some of them written otherwise under their names.
Fusion = Callable[[Part, Mapping[str, Any]], Sequence[OperatorCall]]


def _as_they_are(part: Part, constants: Mapping[str, Any]) -> Sequence[OperatorCall]:
    del constants
    return part.steps


def classifier(
    network: Trainable,
    kernels: Mapping[str, OperatorRule] = MappingProxyType({}),
    patterns: Sequence[Pattern] = (),
    fused: Fusion = _as_they_are,
    *,
    remat: bool = False,
    scan: bool = False,
) -> Classifier:
    """Return the module as two pure functions, in the type of the parameters that they are given.

    `apply` takes in training keys [B], one for each image; of a network that draws nothing, None.
    `kernels` are rows of operators that are tried first, and `patterns` functions of whole blocks;
    both return None for what they do not take. `fused` writes several steps as one of `kernels`.
    `remat` computes the values of a block again in its backward pass instead of keeping them, and
    `scan` compiles one block for all that follow each other and compute the same.
    """
    like = {name: a.shape for name, a in {**network.params, **network.stats}.items()}
    own = normalises_itself(network)

    def init(key: Array) -> tuple[Params, Params]:
        del key  # the module's own weights are the start
        params, stats = (
            {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()}
            for arrays in (network.params, network.stats)
        )
        if not own:
            stats[MEAN] = jnp.zeros(network.image[2], jnp.float32)
            stats[STD] = jnp.ones(network.image[2], jnp.float32)
        return params, stats

    def apply(
        params: Params, stats: Params, images: Array, *, train: bool = False, key: Any = None
    ) -> tuple[Array, Params]:
        _check(params, stats, images, like, network.image[2])
        x = images if own else _normalised(images, stats[MEAN], stats[STD])
        program = network.training if train else network.evaluation
        known = kernels, patterns, fused
        values = run(program, params, stats, x, key, *known, remat=remat, scan=scan)
        logits = programs.plain(values[_logits(program)])
        logits = logits if logits.dtype.itemsize >= 4 else logits.astype(jnp.float32)
        moved = {
            name: programs.plain(values[value]).astype(stats[name].dtype)
            for name, value in program.moved.items()
        }
        return logits, stats | jax.lax.stop_gradient(moved)

    return Classifier(init, apply)


def normalises_itself(network: Trainable) -> bool:
    """Tell whether mean and std are the module's own, which it uses where it likes."""
    return bool({MEAN, STD} & (network.params.keys() | network.stats.keys()))


def _logits(program: Program) -> str:
    (name,) = program.results.values()
    return str(name)


def _check(
    params: Params, stats: Params, images: Array, like: Mapping[str, Any], channels: int
) -> None:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; divide by 255 for floats in [0, 1]")
    if images.ndim != 4 or images.shape[3] != channels:
        raise ValueError(f"images have shape {images.shape}, expected [B, H, W, {channels}]")
    given = {**params, **stats}
    if missing := like.keys() - given.keys():
        raise ValueError(f"these weights do not belong to this network: {sorted(missing)[:8]}")
    for name, shape in like.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} has shape {given[name].shape}, expected {shape}")


class _Computing(NamedTuple):
    """What the steps of one pass share."""

    program: Program
    kernels: Mapping[str, OperatorRule]
    patterns: Sequence[Pattern]
    fused: Fusion
    keys: Array | None  # [B]
    images: int  # how many
    dtype: Any
    single: Any  # of norms, softmax and statistics
    states: frozenset[str]  # steps that move statistics, which are computed in that


def _states(program: Program) -> frozenset[str]:
    """Choose the steps that give moved statistics, or are computed of these alone: counters."""
    alone = {value for value, key in program.weights.items() if key in program.moved}
    for step in blocks.needed(program.steps, program.moved.values()):
        read = programs.read_by(step)
        if read and read <= alone:
            alone.add(step.name)
    return frozenset(alone) | {*program.moved.values()}


def run(
    program: Program,
    params: Params,
    stats: Params,
    images: Array,
    keys: Array | None,
    kernels: Mapping[str, OperatorRule],
    patterns: Sequence[Pattern] = (),
    fused: Fusion = _as_they_are,
    *,
    remat: bool = False,
    scan: bool = False,
) -> dict[str, Any]:
    """Compute the values of a program, of images f[B,H,W,C], that are read between its blocks.

    Norms, softmax and statistics are computed in at least float32. A step that draws does so for
    each image from its own key of `keys` [B], and the number of the step.
    """
    dtype = programs.computing(params, images)
    single = dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)
    held = {name: a.astype(dtype) for name, a in stats.items()} | params
    wide: dict[str, Any] = {
        value: stats[key].astype(single) for value, key in program.weights.items() if key in stats
    }
    values: dict[str, Any] = {
        name: a.astype(dtype) if a.dtype.name == program.dtype else jnp.asarray(a)
        for name, a in program.constants.items()
    }
    values |= {name: held[key] for name, key in program.weights.items()}
    values[program.images] = programs.ChannelsLast(images.astype(dtype))
    places = {name: place for place, name in enumerate(program.draws)}
    how = _Computing(
        program, kernels, patterns, fused, keys, images.shape[0], dtype, single, _states(program)
    )
    compute = functools.partial(_part, how)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return blocks.computed(program, compute, values, wide, places, remat=remat, scan=scan)


def _part(how: _Computing, part: Part, known: Mapping, *rest: Mapping) -> dict[str, Any]:
    def subset(names: Iterable[str]) -> dict[str, Any]:
        return _steps(how, blocks.needed(part.steps, names), known, *rest)

    for pattern in how.patterns if part.block else ():
        if (made := pattern(part, known, subset)) is not None:
            return made
    found = _steps(how, how.fused(part, how.program.constants), known, *rest)
    return {name: found[name] for name in part.kept}


def _steps(
    how: _Computing,
    steps: Sequence[OperatorCall],
    known: Mapping[str, Any],
    wide: Mapping[str, Any],
    places: Mapping[str, Any],
) -> dict[str, Any]:
    """Compute some steps of values that are known.

    `wide` has those weights in float32 that norms read so, `places` the number of each draw.
    """
    values = dict(known)
    for step in steps:
        if step.name in places:
            if how.keys is None:
                raise ValueError("the network draws random numbers in training; give keys [B]")
            keys = _keys(how.keys, places[step.name], how.images)
            values[step.name] = _drawn(step, how.program, keys, values, how.dtype)
        else:
            values[step.name] = _value(how, step, values, wide)
    return values


def _value(
    how: _Computing, step: OperatorCall, values: Mapping[str, Any], wide: Mapping[str, Any]
) -> Any:
    kinds, states = {how.program.dtype: how.dtype}, how.states
    if step.operator in how.kernels:  # which compute in float32 what has to be
        made = programs.compute(step, how.kernels, {**values, **wide}, kinds)
        if made is not None:
            return made
    if step.operator not in SINGLE and step.name not in states:
        return programs.compute(step, _ROWS, values, kinds)
    read = {name: _typed(values[name], how.single) for name in programs.read_by(step)}
    read |= {name: wide[name] for name in read.keys() & wide.keys()}
    made = programs.compute(step, _ROWS, read, {how.program.dtype: how.single})
    return made if step.name in states else _narrow(made, how.single, how.dtype)


def _keys(keys: Array, place: Any, count: int) -> Array:
    keys = jnp.broadcast_to(keys, (count,)) if keys.ndim == 0 else keys
    return jax.vmap(lambda key: jax.random.fold_in(key, place))(keys)


def _typed(value: Any, dtype: Any) -> Any:
    floating = getattr(value, "dtype", None) is not None and jnp.issubdtype(
        value.dtype, jnp.floating
    )
    if isinstance(value, programs.ChannelsLast):
        return programs.ChannelsLast(_typed(value.array, dtype))
    if isinstance(value, list | tuple):
        return type(value)(_typed(each, dtype) for each in value)
    return value.astype(dtype) if floating else value


def _narrow(made: Any, single: Any, dtype: Any) -> Any:
    """Give the type of the rest to the first result of a step: others are statistics."""
    if single == dtype:
        return made
    if isinstance(made, tuple | list) and not isinstance(made, programs.ChannelsLast):
        return [_typed(made[0], dtype), *made[1:]]
    return _typed(made, dtype)


def _drawn(
    step: OperatorCall, program: Program, keys: Array, values: Mapping[str, Any], dtype: Any
) -> Any:
    """Compute a step that draws, for each image from its key along the axis that holds images."""
    axis, kinds = program.image_axes[step.name], {program.dtype: dtype}
    count = keys.shape[0]

    def parted(array: Array) -> Array:  # the images in front, then what one of them has
        shape = array.shape
        split = array.reshape(*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :])
        return jnp.moveaxis(split, axis, 0)

    def joined(array: Array) -> Array:
        array = jnp.moveaxis(array, 0, axis)
        shape = array.shape
        return array.reshape(*shape[:axis], -1, *shape[axis + 2 :])

    read = {name: programs.plain(values[name]) for name in programs.read_by(step)}
    arrays = {name: parted(a) for name, a in read.items() if getattr(a, "ndim", 0) > axis}
    rest = {name: a for name, a in read.items() if name not in arrays}
    row = DRAWS[step.operator]

    def one(key: Array, arrays: Mapping[str, Array]) -> Any:
        step_of_one = _of_one(step, axis, count, rest)
        return programs.compute(step_of_one, {step.operator: row}, {**rest, **arrays}, kinds, key)

    return jax.tree.map(joined, jax.vmap(one)(keys, arrays))


def _of_one(step: OperatorCall, axis: int, count: int, known: Mapping[str, Any]) -> OperatorCall:
    """Write the sizes of one image where a step's sizes are of all."""

    def of_one(operand: Any) -> Any:
        if not isinstance(operand, tuple) or isinstance(operand, programs.Of):
            return operand
        sizes = [known[n.name] if isinstance(n, programs.Of) else n for n in operand]
        if len(sizes) <= axis or not all(isinstance(n, int) for n in sizes):
            return operand
        return (*sizes[:axis], sizes[axis] // count, *sizes[axis + 1 :])

    return step._replace(operands=tuple(map(of_one, step.operands)))


def state_dict(network: Trainable, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays under the names of the module's state dict, in its types."""
    whole = {**network.params, **network.stats}
    known = {name: np.asarray(arrays[name]) for name in whole} | network.integers
    counters = {name: a for name, a in network.integers.items() if name in whole}
    for name, counter in counters.items():  # such as num_batches_tracked, averaged meanwhile
        known[name] = np.rint(arrays[name]).astype(counter.dtype)
    known |= {name: known[of] for name, of in network.tied.items()}
    return {name: known[name] for name in network.names}


def _normalised(images: Array, mean: Array, std: Array) -> Array:
    mean, std = (jnp.reshape(a, (1, 1, 1, -1)).astype(images.dtype) for a in (mean, std))
    return (images - mean) / std
