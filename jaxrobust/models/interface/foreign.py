"""Networks that are not the package's: a function of the user makes one, under the name
`my_package.nets:make` or `my_nets.py:make`; see `runtime.pytorch` for PyTorch's.

It is called by keyword with `num_classes`, `image_size` (pixels), `in_channels`, `dtype` (the
compute type, "float32" or "bfloat16") and `remat`, with those of them that its signature takes, and
with the options of the config. It returns

- a `types.Classifier`: `init(key)` gives params and stats, two flat dicts of float arrays without a
  common name, `apply(params, stats, images, *, train=False, key=None)` logits and stats. The update
  and the attack call it with parameters in the compute type, and with keys [B], one per image;
- or an `nnx.Module` (or it is one's class): see `classifier.of_foreign`. Where its signature takes
  `rngs`, it is given `nnx.Rngs`, and the seed of a run decides the initial weights.

Whatever reads the family of a name finds `FAMILY` here: weight decay for matrices only, no names in
PyTorch, no stem and no head that could be drawn anew.
"""

import functools
import inspect
import json
from collections.abc import Mapping
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

KEY = "model.name"  # for messages: where configs have the name
_TWO = 2  # images of the look at a network
_NOTHING = r"(?!)"


def create(name: str, **given: Any) -> Classifier:
    """Make the network that a user's function makes.

    Args:
      name: MODULE:FUNCTION or FILE.py:FUNCTION.
      **given: the arguments above and options; plain values, lists become tuples.
    Raises:
      ValueError: one sentence about what is wrong with the name, the function or its network.
    """
    if pytorch.is_name(name):
        net = pytorch.find("create")(name, **given)
        if given["dtype"] != "float64":  # which a certificate asks for, of what was seen before
            _check(name, net, given)
        return net
    try:
        text = json.dumps(given, sort_keys=True, default=functions.as_dict)
    except TypeError as error:
        raise ValueError(f"{KEY}={name}: options are plain values; {error}") from error
    return _created(functions.find(KEY, name), text)


@functools.lru_cache(maxsize=8)  # a run asks for the same one again and again
def _created(named: Named, text: str) -> Classifier:
    given = {key: functions.tuples(value) for key, value in json.loads(text).items()}
    with functions.explained(KEY, named.name):
        net = _made(named, _taken(named, given), given["in_channels"])
    _check(named.name, net, given)
    return net


def _taken(named: Named, given: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that a function's signature takes; refuse an option that it does not."""
    standard = ("num_classes", "image_size", "in_channels", "dtype", "remat")
    parameters = _parameters(named)
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return {key: value for key, value in given.items() if key != "remat" or value}
    left = [key for key in given if key not in parameters]
    if options := [key for key in left if key not in standard]:
        raise ValueError(f"unknown option {options} for {named.name}; it takes {[*parameters]}")
    if "remat" in left and given["remat"]:
        raise ValueError(f"{KEY}={named.name} takes no remat; leave model.remat out")
    return {key: value for key, value in given.items() if key in parameters}


def _parameters(named: Named) -> Mapping[str, inspect.Parameter]:
    of_class = inspect.isclass(named.function)  # NNX's take anything, for their `__init__`
    return inspect.signature(named.function.__init__ if of_class else named.function).parameters  # type: ignore[misc]


def _made(named: Named, taken: dict[str, Any], in_channels: int) -> Classifier:
    make = functools.partial(named.function, **taken)
    of_class = inspect.isclass(named.function) and issubclass(named.function, nnx.Module)
    if "rngs" in _parameters(named):
        return of_foreign(lambda rngs: _module(named, make(rngs=rngs)), in_channels=in_channels)
    made = None if of_class else make()
    if isinstance(made, Classifier):
        return made
    if not of_class:
        _module(named, made)
    return of_foreign(lambda rngs: make(), in_channels=in_channels)


def _module(named: Named, made: Any) -> nnx.Module:
    if isinstance(made, nnx.Module):
        return made
    raise ValueError(
        f"{KEY}={named.name} returns {_kind(made)}; return a flax.nnx.Module, or "
        "jaxrobust.types.Classifier(init, apply) of two functions"
    )


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__module__}.{type(value).__name__}"


# --- The look at a network, before anything compiles ---


def _check(name: str, net: Classifier, given: dict[str, Any]) -> None:
    """Refuse a network that is not what the rest of the package takes it for; it is only traced."""
    with functions.explained(KEY, name):
        weights = jax.eval_shape(net.init, jax.random.key(0))
    if (
        not isinstance(weights, tuple | list)
        or len(weights) != 2
        or not all(map(_is_flat, weights))
        or weights[0].keys() & weights[1].keys()
    ):
        raise ValueError(
            f"{KEY}={name}: init(key) gives {_shape(weights)}; give params and stats, two flat "
            "dicts of float arrays without a common name"
        )
    params, stats = weights
    side, classes = given["image_size"], given["num_classes"]
    images = jax.ShapeDtypeStruct((_TWO, side, side, given["in_channels"]), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), _TWO))
    for train in (False, True):

        def passed(params, stats, images, keys, train=train):
            how = {"train": True, "key": keys} if train else {}
            return net.apply(cast(params, jnp.dtype(given["dtype"])), stats, images, **how)

        with functions.explained(KEY, name):
            out = jax.eval_shape(passed, params, stats, images, keys)
        mode = f"{_TWO} images{' in training' if train else ''}"
        if not (isinstance(out, tuple | list) and len(out) == 2 and _is_flat(out[1])):
            raise ValueError(
                f"{KEY}={name}: apply gives {_shape(out)} for {mode}; give logits and stats"
            )
        if _shape(out[0]) != f"float32[{_TWO},{classes}]":
            raise ValueError(
                f"{KEY}={name}: the logits of {mode} are {_shape(out[0])}; give "
                f"float32[{_TWO},{classes}], for model.num_classes={classes}"
            )
        if jax.tree.map(_shape, out[1]) != jax.tree.map(_shape, stats):
            raise ValueError(
                f"{KEY}={name}: apply gives other stats than init for {mode}: {_shape(out[1])}, "
                f"not {_shape(stats)}; give the same names, shapes and types"
            )


def _is_flat(tree: Any) -> bool:
    return isinstance(tree, dict) and all(
        isinstance(key, str) and jnp.issubdtype(getattr(leaf, "dtype", object), jnp.floating)
        for key, leaf in tree.items()
    )


def _shape(value: Any) -> str:
    """Return shapes and types for people, not too many of them."""
    if isinstance(value, dict):
        shown = [f"{key}: {_shape(leaf)}" for key, leaf in list(value.items())[:4]]
        return "{" + ", ".join(shown + ["..."] * (len(value) > 4)) + "}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shape, value[:4]))})"
    if hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return _kind(value)


def _no_row(*unused: Any, **ignored: Any) -> Any:
    raise ValueError("a function of a user has no rows")


FAMILY = Family(
    file="",
    title="",
    variants={},
    maker=_no_row,
    names=Names(torch=(), keys=_no_row, stem=_NOTHING, head=_NOTHING),
    members={},
    decay_mask="matrices",
)
