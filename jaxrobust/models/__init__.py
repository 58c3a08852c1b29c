"""Networks: `available()` lists them, `create(name)` makes one.

    kernels/    layers as functions, each with an implementation that is fast on its platform
    modules/    NNX modules that hold the parameters of these functions
    interface/  turns modules into pure functions, and names their weights
    families/   one architecture per file

An architecture's file ends with its `family.Family`: variants, PyTorch names, stem, head,
weight-decay mask and the papers' counts. A new architecture is one file and one line of `names.py`;
it is imported when one of its networks is created.
A name such as `my_nets.py:make` means a user's function, see `foreign`.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, get_type_hints

from jaxrobust.models.interface import foreign
from jaxrobust.models.interface.classifier import OfModule, loaded
from jaxrobust.models.interface.classifier import classifier as as_functions
from jaxrobust.models.interface.family import Family, Member
from jaxrobust.models.interface.renaming import Naming, Renaming
from jaxrobust.models.names import FAMILIES
from jaxrobust.runtime import pytorch, rooms
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.text import spelling
from jaxrobust.types import Classifier, Params

__all__ = ["available", "create", "module"]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def available() -> list[str]:
    """List the names that `create` accepts.

    >>> [name for name in available() if name.startswith("vit")]
    ['vit_b', 'vit_b_cvst', 'vit_m', 'vit_m_cvst', 'vit_s', 'vit_s_cvst']
    """
    return sorted(_entries())


def create(
    name: str, *, num_classes: int = 1000, image_size: int = 224, **overrides: Any
) -> Classifier:
    """Make the network `name` as a pair of pure functions.

    Args:
      name: one of `available()`, timm's name for one (`convnext_tiny`), or your own function, such
        as "my_nets.py:make" (`foreign`).
      num_classes: width of the logits.
      image_size: side of the square input, pixels.
      **overrides: fields of the family's row, e.g. `in_channels=1`, `dtype="bfloat16"`,
        `drop_path=0.1`, `remat=True`, `scan=True`, `stem_strides=(1, 1)`; or a function's options.
    Raises:
      ValueError: unknown name or override, or a size that the network cannot take.

    >>> import jax
    >>> net = create("convnext_n", num_classes=10, image_size=32, depths=(1, 1, 1), dims=(8, 8, 8))
    >>> params, stats = jax.jit(net.init)(jax.random.key(0))
    >>> logits, stats = jax.jit(net.apply)(params, stats, jax.numpy.zeros((2, 32, 32, 3)))
    >>> logits.shape
    (2, 10)
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least 2 classes")
    check_size(image_size)
    sizes = {"num_classes": num_classes, "image_size": image_size}
    is_function = functions.is_name(name)
    options: dict[str, Any] = {"in_channels": 3, "dtype": "float32", "remat": False}
    if is_function:
        options |= sizes | overrides
    else:
        name = known(name)
        row = variant(name, **overrides)
        options |= row._asdict()
    if (dtype := options["dtype"]) not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not a compute type; use one of {DTYPES}")
    if is_function:
        return foreign.create(name, **options)
    for key in _RATES & options.keys():
        if not 0 <= (rate := options[key]) < 1:
            raise ValueError(f"{key}={rate} must be a probability: at least 0 and below 1")
    return as_functions(family(name).maker(row, **sizes), dtype=dtype)


def module(
    name: str,
    *,
    rngs: Any,
    weights: tuple[Params, Params] | None = None,
    num_classes: int = 1000,
    image_size: int = 224,
    **overrides: Any,
) -> Any:
    """Make the network `name` as an `nnx.Module`, to slice, print or replace its head.

    Call it as `module(images, train=False, key=None)`.

    Args:
      name, num_classes, image_size, **overrides: see `create`; one of `available()`.
      rngs: `nnx.Rngs`; seed 0 gives the same weights as `create(...).init(jax.random.key(0))`.
      weights: params and stats to use instead, as returned by `create(...).init`.
    Raises:
      ValueError: see `create`; weights that do not belong to the network.

    >>> import jax
    >>> from flax import nnx
    >>> small = {"image_size": 32, "depths": (1, 1, 1), "dims": (8, 16, 32)}
    >>> net = module("convnext_n", rngs=nnx.Rngs(0), num_classes=10, **small)
    >>> images = jax.numpy.zeros((2, 32, 32, 3))
    >>> net(images).shape
    (2, 10)
    >>> x = net.normalize(images)  # features before the last stage
    >>> for part in (*net.stem, *net.stages[:2]):
    ...     x = part(x)
    >>> x.shape
    (2, 8, 8, 16)
    >>> net.head.fc = nnx.Linear(32, 5, rngs=nnx.Rngs(1))  # another head
    >>> net(images).shape
    (2, 5)
    """
    sizes = {"num_classes": num_classes, "image_size": image_size}
    net = create(known(name), **sizes, **overrides)
    assert isinstance(net, OfModule)
    module = net.make(rngs)
    return module if weights is None else loaded(module, *weights)


def origin(name: str, **options: Any) -> dict[str, Any] | None:
    """Describe a user's function, its sizes and options for a record; None for our networks."""
    if pytorch.is_name(name):
        return pytorch.find("origin")(name, **options)
    return functions.find(foreign.KEY, name).record() if functions.is_name(name) else None


def variant(name: str, **overrides: Any) -> Any:
    """Return the family's row of `name` with fields replaced; `ValueError` for unknown ones."""
    row = family(name).variants[name if functions.is_name(name) else known(name)]
    unknown = overrides.keys() - set(row._fields)
    if unknown:
        raise ValueError(
            f"unknown option {sorted(unknown)} for {name}; it accepts {list(row._fields)}"
        )
    types = get_type_hints(type(row))
    for key, value in overrides.items():
        words, fits = _TYPES[types[key]]
        if not fits(value):
            raise ValueError(f"{key}={value!r} of {name} must be {words}")
    return row._replace(**{k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()})


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# Types of row fields: the wording of messages, and a check of the value.
_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    tuple[int, ...]: (
        "a tuple of integers",
        lambda value: isinstance(value, tuple | list) and all(map(_is_integer, value)),
    ),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("an integer", _is_integer),
    float: ("a finite number", _is_number),
    float | None: (
        "a finite number or None",
        lambda value: value is None or _is_number(value),
    ),
    str: ("a string", lambda value: isinstance(value, str)),
}
_RATES = {"drop_path", "dropout", "attention_dropout"}
# Fields that do not affect what fixed weights compute in evaluation.
_FREE = {"dtype", "remat", "scan", "bn_group", "bn_momentum", "in_channels", "scale_init"} | _RATES
_FREE |= {"padded"}  # only rejects sizes


def computed(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's fields, with `options`, that decide what weights compute in evaluation."""
    if functions.is_name(name):
        return dict(options)
    fields = {k: v for k, v in variant(name, **options)._asdict().items() if k not in _FREE}
    if "gamma_init" in fields:  # only the presence of a layer scale matters
        fields["gamma_init"] = fields["gamma_init"] is not None
    return fields


def essential(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that change what the row's weights compute; tuples as lists, for JSON."""
    fields, defaults = computed(name, options), computed(name, {})
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in sorted(options.items())
        if key in fields and (key not in defaults or fields[key] != defaults[key])
    }


def check_size(image_size: int) -> None:
    """Raise `ValueError` for a side below 1 pixel or above 8192 (0.8 GB per color image)."""
    if image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1")
    if image_size > 8192:
        raise ValueError(
            f"image_size={image_size} must be at most 8192; give the side of the images in pixels"
        )


def words(name: str, options: Mapping[str, Any]) -> str:
    """Describe a network for a message: its name and its `essential` options."""
    fields = [f"{key}={value}" for key, value in essential(name, options).items()]
    return f"{name} with {', '.join(fields)}" if fields else f"{name} without options"


def family(name: str) -> Family:
    """Look up the architecture of a name; for a user's function it is `foreign.FAMILY`."""
    if functions.is_name(name):
        return foreign.FAMILY
    name = known(name)
    entry = _entries()[name]
    resolved = rooms.resolve(entry)
    if name not in resolved.variants:
        raise ValueError(f"{entry} has no network {name!r}; correct its line in names.py")
    return resolved


@lru_cache
def _entries() -> dict[str, str]:
    """Map the names of all networks to the entries of their architectures."""
    rows = FAMILIES | rooms.entries("FAMILIES")
    return {name: entry for names, entry in rows.items() for name in names.split()}


def member(name: str) -> Member:
    """Look up the facts about a variant that its row does not contain."""
    return family(name).members[name if functions.is_name(name) else known(name)]


def decay_mask(name: str) -> str:
    """Return the parameters that the references decay, as a key of `optim.DECAY_MASKS`."""
    architecture = family(name)
    variant = architecture.members.get(spelling.network(name))
    return (variant and variant.decay_mask) or architecture.decay_mask


def torch_names(name: str) -> Sequence[Renaming]:
    """List the rows that convert the reference's weight names to ours."""
    return family(name).names.torch


def other_names(name: str) -> Sequence[Naming]:
    """List other namings of the same weights, such as the first authors'."""
    return family(name).names.others


def torch_keys(name: str, **overrides: Any) -> list[str]:
    """List the reference's names of all weights, in the reference's order."""
    return family(name).names.keys(variant(name, **overrides))


def known(name: str) -> str:
    """Return our name for a network, also from timm's; `ValueError` suggests the nearest names."""
    name = spelling.network(name)
    if functions.is_name(name):
        raise ValueError(
            f"{name} is your own function, but this needs one of the package's networks; "
            "`jaxrobust models` lists them"
        )
    if name.endswith(".py"):
        raise ValueError(f"unknown model {name!r}; name a function in the file too: {name}:make")
    if name not in _entries():
        near = difflib.get_close_matches(name, available(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`jaxrobust models` lists them"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return name
