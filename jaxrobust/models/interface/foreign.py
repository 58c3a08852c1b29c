"""User-defined networks: a function, named `my_package.nets:make` or `my_nets.py:make`, makes one;
see `runtime.pytorch` for PyTorch's.

The function gets, as far as its signature accepts them, the keyword arguments `num_classes`,
`image_size` (pixels), `in_channels`, `dtype` (compute type, "float32" or "bfloat16") and `remat`,
plus the options of the config. It returns

- a `types.Classifier`: `init(key)` returns params and stats, two flat dicts of float arrays without
  common names; `apply(params, stats, images, *, train=False, key=None)` returns logits and stats.
  Update and attack pass parameters in the compute type, and keys [B], one per image;
- or an `nnx.Module` (or its class): see `classifier.of_foreign`. If its signature has `rngs`, it
  gets `nnx.Rngs`, so the seed of a run decides the initial weights.

The family of such a name is `FAMILY`: weight decay for matrices only, no PyTorch names, no stem or
head to redraw.
"""

import functools
import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.interface.classifier import of_foreign
from jaxrobust.models.interface.family import Family, Names
from jaxrobust.models.interface.network_inputs import cast
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.commandline.functions import Named
from jaxrobust.types import Classifier

KEY = "model.name"  # the config key, for messages
_IMAGES = 2  # batch size for tracing a network
_NOTHING = r"(?!)"


def create(name: str, **options: Any) -> Classifier:
    """Make a network from a user's function.

    Args:
      name: MODULE:FUNCTION or FILE.py:FUNCTION.
      **options: the arguments above and the config's options; plain values, lists become tuples.
    Raises:
      ValueError: a one-sentence error about the name, the function or its network.
    """
    if pytorch.is_name(name):
        net = pytorch.find("create")(name, **options)
        if options["dtype"] != "float64":  # for a certificate, after the network was checked
            _check(name, net, options)
        return net
    try:
        text = json.dumps(options, sort_keys=True, default=functions.as_dict)
    except TypeError as error:
        raise ValueError(f"{KEY}={name}: options must be plain values; {error}") from error
    return _create(functions.find(KEY, name), text)


@functools.lru_cache(maxsize=8)  # a run requests the same network repeatedly
def _create(function: Named, text: str) -> Classifier:
    options = {key: functions.tuples(value) for key, value in json.loads(text).items()}
    with functions.explained(KEY, function.name):
        net = _call(function, options)
    _check(function.name, net, options)
    return net


def _call(function: Named, options: dict[str, Any]) -> Classifier:
    call, in_channels = function.function, options["in_channels"]
    is_class = inspect.isclass(call)  # NNX classes accept anything and pass it to `__init__`
    parameters = inspect.signature(call.__init__ if is_class else call).parameters  # type: ignore[misc]
    make = functools.partial(call, **_taken(function.name, parameters, options))

    def checked(network: Any) -> nnx.Module:
        if isinstance(network, nnx.Module):
            return network
        raise ValueError(
            f"{KEY}={function.name} returns {_kind(network)}; return a flax.nnx.Module, or "
            "jaxrobust.types.Classifier(init, apply) with two functions"
        )

    if "rngs" in parameters:
        return of_foreign(lambda rngs: checked(make(rngs=rngs)), in_channels=in_channels)
    if not (inspect.isclass(call) and issubclass(call, nnx.Module)):
        network = make()
        if isinstance(network, Classifier):
            return network
        checked(network)
    return of_foreign(lambda rngs: make(), in_channels=in_channels)


def _taken(name: str, parameters: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that a signature accepts; reject other options."""
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {key: value for key, value in options.items() if key != "remat" or value}
    standard = ("num_classes", "image_size", "in_channels", "dtype", "remat")
    if unknown := [key for key in options if key not in (*parameters, *standard)]:
        raise ValueError(f"unknown option {unknown} for {name}; it accepts {[*parameters]}")
    if "remat" not in parameters and options["remat"]:
        raise ValueError(f"{KEY}={name} does not accept remat; leave model.remat out")
    return {key: value for key, value in options.items() if key in parameters}


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__module__}.{type(value).__name__}"


def _check(name: str, net: Classifier, options: dict[str, Any]) -> None:
    """Raise `ValueError` unless a network is a `Classifier` with these options; only traces it."""
    with functions.explained(KEY, name):
        weights = jax.eval_shape(net.init, jax.random.key(0))
    if (
        not isinstance(weights, tuple | list)
        or len(weights) != 2
        or not all(map(_is_flat, weights))
        or weights[0].keys() & weights[1].keys()
    ):
        raise ValueError(
            f"{KEY}={name}: init(key) returns {_shape(weights)}; return params and stats, two "
            "flat dicts of float arrays without a common name"
        )
    params, stats = weights
    side, classes, dtype = options["image_size"], options["num_classes"], options["dtype"]
    images = jax.ShapeDtypeStruct((_IMAGES, side, side, options["in_channels"]), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), _IMAGES))
    for train in (False, True):

        def apply(params, stats, images, keys, train=train):
            mode = {"train": True, "key": keys} if train else {}
            return net.apply(cast(params, jnp.dtype(dtype)), stats, images, **mode)

        with functions.explained(KEY, name):
            out = jax.eval_shape(apply, params, stats, images, keys)
        batch = f"{_IMAGES} images{' in training' if train else ''}"
        if not (isinstance(out, tuple | list) and len(out) == 2 and _is_flat(out[1])):
            raise ValueError(
                f"{KEY}={name}: apply returns {_shape(out)} for {batch}; return logits and stats"
            )
        # Certificates compare in float64.
        expected = f"float{64 if dtype == 'float64' else 32}[{_IMAGES},{classes}]"
        if _shape(out[0]) != expected:
            raise ValueError(
                f"{KEY}={name}: the logits of {batch} are {_shape(out[0])}; return {expected}, for "
                f"model.num_classes={classes}"
            )
        if jax.tree.map(_shape, out[1]) != jax.tree.map(_shape, stats):
            raise ValueError(
                f"{KEY}={name}: apply returns different stats from init for {batch}: "
                f"{_shape(out[1])}, not {_shape(stats)}; return the same names, shapes and types"
            )


def _is_flat(tree: Any) -> bool:
    return isinstance(tree, dict) and all(
        isinstance(key, str) and jnp.issubdtype(getattr(leaf, "dtype", object), jnp.floating)
        for key, leaf in tree.items()
    )


def _shape(value: Any) -> str:
    """Describe shapes and types, at most four per level."""
    if isinstance(value, dict):
        shown = [f"{key}: {_shape(leaf)}" for key, leaf in list(value.items())[:4]]
        return "{" + ", ".join(shown + ["..."] * (len(value) > 4)) + "}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shape, value[:4]))})"
    if hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return _kind(value)


def _no_row(*unused: Any, **ignored: Any) -> Any:
    raise ValueError("a user's function has no rows")


FAMILY = Family(
    file="",
    title="",
    variants={},
    maker=_no_row,
    names=Names(torch=(), keys=_no_row, stem=_NOTHING, head=_NOTHING),
    members={},
    decay_mask="matrices",
)
