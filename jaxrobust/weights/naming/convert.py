"""Converts PyTorch reference weights to ours and back, using each architecture's rows.

`files.py` reads files into named arrays; the rows are next to each architecture in `models/`.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.models.interface.renaming import Renaming, Transform, channels, conv_oihw, row, same
from jaxrobust.models.published import PUBLISHED
from jaxrobust.runtime.commandline.functions import is_name
from jaxrobust.weights.naming.rename import compared, float_type, matches, rename, targets
from jaxrobust.weights.store import files

Arrays = dict[str, np.ndarray]

# Prefixes that wrappers add to every name: DDP, attack and normalization wrappers, compile.
PREFIXES = ("module.", "base_model.", "model.", "_orig_mod.")
COUNT = "n_averaged"  # from torch.optim.swa_utils.AveragedModel, whose network is `module`
_MODULE = "export the self-contained module (export_torch --layout module)"
# Names of mean and std in networks that hold them without a layer.
_BUFFERS = {
    "mu": ("normalize.mean", channels),
    "sigma": ("normalize.std", channels),
    "normalization.mean": ("normalize.mean", same),
    "normalization.std": ("normalize.std", same),
}
_NORMALIZATION = ("normalize.mean", "normalize.std")
_NORMALIZE = row(r"normalize\.(mean|std)", r"normalize.\1", channels)


def unwrapped(state_dict: Mapping[str, np.ndarray]) -> Arrays:
    """Remove prefixes that wrappers add to all names; `normalize.*` may lack them."""
    names = _without_attacker(state_dict)
    if COUNT in names and all(key.startswith(("module.", COUNT)) for key in names):
        del names[COUNT]
    while shared := [
        prefix
        for prefix in PREFIXES
        if any(key.startswith(prefix) for key in names)
        and all(key.startswith((prefix, "normalize.")) for key in names)
    ]:
        if twice := [key for key in names if shared[0] + key in names]:
            raise ValueError(
                f"{twice[0]} and {shared[0]}{twice[0]} are both present, so the network normalizes "
                "twice; fold one of them into the other"
            )
        names = {key.removeprefix(shared[0]): array for key, array in names.items()}
    return names


def _without_attacker(state_dict: Mapping[str, np.ndarray]) -> Arrays:
    """Extract one of the two networks that MadryLab/robustness stores, with its mean and std."""
    if not any(key.startswith("module.attacker.model.") for key in state_dict):
        return dict(state_dict)
    if "module.normalizer.new_mean" not in state_dict:
        raise ValueError(
            "this checkpoint of MadryLab/robustness has no module.normalizer.new_mean, so its mean "
            "and std are unknown; get the checkpoint again"
        )
    return {
        key.replace("module.normalizer.new_", "normalize."): array
        for key, array in state_dict.items()
        if not key.startswith("module.attacker.")
    }


class StoredNames(NamedTuple):
    """A network's stored arrays, and how their names map to ours."""

    model: str
    rows: Sequence[Renaming]
    arrays: Arrays  # without the prefixes of wrappers
    normalize: tuple[float, float]  # (mean, std) that such files assume but do not store
    stem: str  # a pattern of our names
    head: str  # the same
    # (stored name, its row, our names) for all names matched by exactly one row.
    matched: tuple[tuple[str, Renaming, list[str]], ...]
    our_names: bool = False  # our own names; these always include a normalization


def names(name: str, arrays: Mapping[str, np.ndarray], **overrides: Any) -> StoredNames:
    """Find the rows for a network's arrays, named by us, by the reference or by its authors."""
    if is_name(name) or any(key.endswith(".kernel") for key in arrays):  # torch has no `.kernel`
        # Resized arrays have the same name in both namings.
        resizable = [r for r in models.torch_names(name) if r.resize]
        others = "|".join(r.pattern.pattern for r in resizable) or r"(?!)"
        row_of_others = row(rf"(?!(?:{others})$)(?P<name>.+)", r"\g<name>")
        # An exported module's .pt also holds size-dependent constants that its code cannot compute.
        arrays = {k: a for k, a in arrays.items() if not k.startswith("constants.")}
        return _matched(name, [*resizable, row_of_others], arrays, (0.0, 1.0), our_names=True)
    return _torch_names(name, arrays, overrides)


def _torch_names(
    name: str, stored: Mapping[str, np.ndarray], overrides: Mapping[str, Any]
) -> StoredNames:
    arrays = unwrapped(stored)
    for pair in (("mu", "sigma"), ("normalization.mean", "normalization.std")):
        if arrays.keys() >= {*pair}:
            defaults = dict(zip(pair, _NORMALIZATION, strict=True))
            arrays = {defaults.get(key, key): array for key, array in arrays.items()}
    for other in models.other_names(name):
        if any(re.fullmatch(other.marker, key) for key in arrays):
            if not other.fits(models.variant(name, **overrides)):
                raise ValueError(f"weights of {other.of} ({other.origin}), not of a {name}")
            return _matched(name, [*other.rows, _NORMALIZE], arrays, other.normalize)
    return _matched(name, [*models.torch_names(name), _NORMALIZE], arrays, (0.0, 1.0))


def _matched(
    name: str,
    rows: Sequence[Renaming],
    arrays: Arrays,
    normalize: tuple[float, float],
    our_names: bool = False,
) -> StoredNames:
    rules, matched = models.family(name).names, []
    for key in arrays:
        if len(fitting := matches(rows, key)) == 1:
            ((pattern, match),) = fitting
            matched.append(
                (key, pattern, [match.expand(template) for template in targets(pattern)])
            )
    return StoredNames(
        name, rows, arrays, normalize, rules.stem, rules.head, tuple(matched), our_names
    )


def from_torch(
    name: str,
    state_dict: Mapping[str, np.ndarray],
    *,
    num_classes: int = 1000,
    image_size: int = 224,
    **overrides: Any,
) -> tuple[Arrays, Arrays]:
    """Convert a PyTorch state dict of NumPy arrays to params and stats of the network `name`.

    Args:
      name: one of `models.available()`.
      state_dict: timm's names (ConvStem: those of the authors' files, `stem.stem.*`), or those of
        the architecture's first authors; prefixes of wrappers are removed. All float32, or all
        float64, which the result then is too.
      image_size: position embeddings for another size are interpolated to it.
      **overrides: for the network, as in `models.create`.
    Raises:
      ValueError: names, shapes or types that do not fit; one message lists them all.
    Source: names from timm 1.0.9 and the state dicts of RobustBench; parity:
      tests/weights/test_convert.py and the tests of each architecture.

    >>> net = models.create("resnet18", num_classes=10, depths=(1,), small_stem=True)
    >>> params, stats = jax.jit(net.init)(jax.random.key(0))
    >>> options = {"num_classes": 10, "depths": (1,), "small_stem": True}
    >>> state_dict = to_torch("resnet18", params, stats, depths=(1,), small_stem=True)
    >>> params, stats = from_torch("resnet18", state_dict, **options)
    >>> params["fc.kernel"].shape
    (64, 10)
    """
    _, rows, arrays, normalize, *_ = _torch_names(name, state_dict, overrides)
    net = models.create(name, num_classes=num_classes, image_size=image_size, **overrides)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    # Weights without a normalization layer imply raw [0, 1] input, unless their naming differs.
    if not {"normalize.mean", "normalize.std"} & arrays.keys():
        dtype = float_type(arrays)
        for key, value in zip(("normalize.mean", "normalize.std"), normalize, strict=True):
            arrays[key] = np.full(shapes[1][key].shape, value, dtype)
    return filled(shapes, rows, arrays, name=name)


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: array.shape for key, array in arrays.items()}


def filled(
    shapes: tuple[Mapping[str, Any], Mapping[str, Any]],
    rows: Sequence[Renaming],
    arrays: Mapping[str, np.ndarray],
    *,
    name: str | None = None,
) -> tuple[Arrays, Arrays]:
    """Fill params and stats of these shapes from arrays that the rows rename."""
    params, stats = shapes
    renamed = rename(rows, arrays, _shapes({**params, **stats}), name=name)
    return {key: renamed[key] for key in params}, {key: renamed[key] for key in stats}


def in_channels(stored: StoredNames) -> int | None:
    """Return the number of image channels of a stored stem; None if there is no stem."""
    channels = {}
    for key, pattern, our_names in stored.matched:
        for target in our_names if stored.arrays[key].ndim == 4 else ():
            if re.fullmatch(stored.stem, target) and target.endswith(".kernel"):
                place = re.sub(r"\d+", lambda number: number[0].zfill(4), target)
                axis = 1 if pattern.transform is conv_oihw else 2
                channels[place] = stored.arrays[key].shape[axis]
    return channels[min(channels)] if channels else None


def head_width(stored: StoredNames) -> int | None:
    """Return the number of classes of stored weights; None if they have no head."""
    head = re.compile(stored.head)
    biases = [
        stored.arrays[key]
        for key, _, targets in stored.matched
        if any(head.fullmatch(t) and t.endswith(".bias") for t in targets)
    ]
    if not biases:
        return None
    if biases[0].ndim != 1 or not biases[0].size:
        raise ValueError(f"its head is damaged: the bias has shape {biases[0].shape}")
    return biases[0].size


def to_torch(
    name: str,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    *,
    layout: str = "timm",
    image_size: int | None = None,
    **overrides: Any,
) -> Arrays:
    """Convert our weights to a PyTorch reference network's state dict, with its names and order.

    Args:
      name: one of `models.available()`.
      params, stats: of the network; all float32, or all float64, which the result then is too.
      layout: "timm" (ConvStem: the names of the authors' files), or a RobustBench id in
        `models.published.PUBLISHED`, which determines whether there is a normalization layer.
      image_size: of the network; None: the size in its table row, usually 224.
      **overrides: those that the network was created with.
    Raises:
      ValueError: an unknown layout, one for another architecture, weights that do not belong to the
        network, or a normalization that the layout cannot store.
    Source: names of timm 1.0.9 and RobustBench's files; parity: tests/weights/test_convert.py.

    >>> net = models.create("resnet18", num_classes=10, depths=(1,))
    >>> params, stats = jax.jit(net.init)(jax.random.key(0))
    >>> state_dict = to_torch("resnet18", params, stats, depths=(1,))
    >>> list(state_dict)[:2], state_dict["conv1.weight"].shape
    (['conv1.weight', 'bn1.weight'], (64, 3, 7, 7))
    """
    arrays = {**params, **stats}
    wrapped = _holds_normalisation(name, arrays, layout, overrides)
    net = PUBLISHED.get(layout)
    buffers = net.buffers if net and net.buffers else ()
    wrapped = wrapped and (net is None or net.buffers is None)
    size = {"image_size": image_size or models.member(name).counted_at}
    try:
        renamed = reference_names(name, arrays, wrapped=wrapped, **overrides)
    except ValueError as error:
        if cause := _cause(name, arrays, size | overrides):
            raise ValueError(f"{error}: {cause}") from error
        raise
    _check_shapes(name, arrays, layout, size | overrides)
    for old, new in net.renamed if net else ():
        renamed = {key.replace(old, new): array for key, array in renamed.items()}
    if net and net.unused:
        part, copy = net.unused
        read = [*renamed.items()]
        copied = [(key.replace(part, copy), array) for key, array in read if key.startswith(part)]
        end = 1 + max(i for i, (key, _) in enumerate(read) if key.startswith(part))
        renamed = dict(read[:end] + copied + read[end:])
    inside = {key: _buffer(arrays, key, net.buffer_axes) for key in buffers if net}
    names = models.family(name).names
    if net and net.made and names.made:
        row = models.variant(name, **overrides)
        renamed |= names.made(row, net.board.image_size)
    return inside | renamed


def _buffer(arrays: Mapping, key: str, axes: int) -> np.ndarray:
    name, transform = _BUFFERS[key]
    array = _out(arrays[name], transform, float_type(arrays), name)
    return array[0] if array.ndim > axes else array


def reference_names(name: str, arrays: Mapping, *, wrapped: bool, **overrides: Any) -> Arrays:
    """Put our arrays under the reference's names, in its order, for a row with any options."""
    rows, used, dtype = models.torch_names(name), {*_NORMALIZATION}, float_type(arrays)
    inside = _NORMALIZATION if wrapped else ()
    renamed = {key: _out(arrays[key], channels, dtype, key) for key in inside}
    for key in models.torch_keys(name, **overrides):
        ((renaming, match),) = matches(rows, key)
        full = f"model.{key}" if wrapped else key
        if renaming.target is None:
            array = renaming.make(arrays, match) if renaming.make else np.zeros((), np.int64)
            renamed[full] = array.astype(dtype) if array.dtype.kind == "f" else array
            continue
        (target,) = (match.expand(template) for template in targets(renaming))
        if target not in arrays:
            raise ValueError(f"{target} is missing: these are not the weights of {name}")
        renamed[full] = _out(arrays[target], renaming.transform, dtype, target)
        used.add(target)
    if extra := arrays.keys() - used:
        raise ValueError(f"{sorted(extra)[:8]} do not fit {name}: check the weights and options")
    return renamed


def _cause(name: str, arrays: Mapping, overrides: dict) -> str:
    overrides = {"num_classes": 2, "in_channels": arrays["normalize.mean"].size} | overrides
    params, stats = jax.eval_shape(models.create(name, **overrides).init, jax.random.key(0))
    skip = re.compile(models.family(name).names.head)
    shapes = {key: shape for key, shape in _shapes(arrays).items() if not skip.fullmatch(key)}
    return compared(name, shapes, _shapes(params | stats))


def _check_shapes(name: str, arrays: Mapping, layout: str, overrides: dict) -> None:
    if layout == "timm":
        rows = [r for r in models.torch_names(name) if r.resize]
        ours_of = [re.sub(r"\\\d", ".+", str(r.target)) for r in rows]
        resizable = [r.pattern.pattern for r in rows] + ours_of
        skip = re.compile("|".join([models.family(name).names.head, *resizable]))
        overrides = {"in_channels": arrays["normalize.mean"].size} | overrides
        net = models.create(name, **overrides)
    else:
        board = PUBLISHED[layout].board
        sizes = {"num_classes": board.num_classes, "image_size": board.image_size}
        published = PUBLISHED[layout]
        skip, net = (
            re.compile(r"(?!)"),
            models.create(published.model, **published.options, **sizes),
        )
        expected = f"{board.num_classes} classes, {board.image_size} px, 3 channels"
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    for key, array in (params | stats).items():
        if not skip.fullmatch(key) and arrays[key].shape != array.shape:
            layout_name = name if layout == "timm" else f"{layout} ({expected})"
            remedy = _cause(name, arrays, overrides) if layout == "timm" else ""
            raise ValueError(
                f"{layout_name} has {key} {array.shape}, but here it is {arrays[key].shape}; "
                f"{remedy or _MODULE}"
            )


def _out(array: Any, transform: Transform, dtype: np.dtype, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype != dtype:
        raise ValueError(
            f"weights are {array.dtype}, expected all float32 or all float64; cast them first"
        )
    if transform.to_torch is None:
        raise ValueError(
            f"{name} cannot be exported: its row in the architecture's file has no inverse; give "
            "renaming.Transform(to_ours, to_torch)"
        )
    return np.ascontiguousarray(transform.to_torch(array))


def _holds_normalisation(name: str, arrays: Mapping, layout: str, overrides: dict) -> bool:
    if layout != "timm" and layout not in PUBLISHED:
        near = difflib.get_close_matches(layout, PUBLISHED, n=3) or sorted(PUBLISHED)
        raise ValueError(f"unknown layout {layout!r}; use one of timm, {', '.join(near)}")
    net = PUBLISHED.get(layout)
    if net and models.computed(net.model, net.options) != models.computed(name, overrides):
        raise ValueError(f"{layout} is a {net.model}, not a {name} (or not with these options)")
    wrapped = net is not None and net.normalised
    if missing := {"normalize.mean", "normalize.std"} - arrays.keys():
        raise ValueError(f"{sorted(missing)} missing in stats: give both results of `init`")
    mean, std = (np.asarray(arrays[f"normalize.{k}"]) for k in ("mean", "std"))
    if net and net.buffers:
        return wrapped  # the file stores them
    fixed = np.array(net.inside if net and wrapped else ((0,), (1,)))
    # For float64, check both the stored value and its rounding to float32.
    if not all(
        any(np.array_equal(have, np.broadcast_to(w, have.shape)) for w in (want, np.float32(want)))
        for have, want in zip((mean, std), fixed, strict=True)
    ):
        has = f"normalizes with mean {mean.tolist()} and std {std.tolist()}"
        whose = net and ("its own" if net.moments else net.board.normalisation)
        rule = (
            f"RobustBench's loader builds this id with {whose} mean and std and ignores others"
            if wrapped
            else "this layout has no normalization layer"
        )
        raise ValueError(
            f"{name} {has}, but {rule}, so the exported network would compute something different; "
            f"{_MODULE}"
        )
    return wrapped


def load(
    name: str, path: Path, *, weights_kind: str | None = None, **options: Any
) -> tuple[Arrays, Arrays]:
    """Read a network's params and stats from a file with our names or the reference's."""
    arrays = files.read(path, weights_kind=weights_kind)
    if float_type(arrays) == np.float64:
        raise ValueError(f"{path}: weights are float64, expected float32; cast them first")
    row_options = {key: options[key] for key in options.keys() - {"num_classes", "image_size"}}
    try:
        stored = names(name, arrays, **row_options)
        options = {"in_channels": in_channels(stored) or 3} | options
        if not stored.our_names:
            return from_torch(name, arrays, **options)
        shapes = jax.eval_shape(models.create(name, **options).init, jax.random.key(0))
        return filled(shapes, stored.rows, arrays, name=name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
