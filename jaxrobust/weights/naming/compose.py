"""Makes stored weights those of a network, with a newly initialized stem or head if wanted."""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.config import NetworkSpec
from jaxrobust.models.published import IMAGENET_MEAN, IMAGENET_STD
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Classifier
from jaxrobust.weights.naming import convert
from jaxrobust.weights.naming.convert import StoredNames
from jaxrobust.weights.naming.rename import Shapes
from jaxrobust.weights.store.artifact import Arrays, Network

# Values of `init.stem` and `init.head`; the head's third is PyTorch's default for linear maps.
CHOICES = {"stem": ("keep", "fresh"), "head": ("keep", "fresh", "fresh-torch")}
# Mean and std, shared or per channel, that `init.normalize` puts inside the network.
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    # As in DIG-Beihang/RobustART and others: the std is the mean of single images' stds.
    "cifar10-robustart": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def compose(
    spec: NetworkSpec,
    stored: StoredNames,
    *,
    stem: str = "keep",
    head: str = "keep",
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    seed: int = 0,
) -> Network:
    """Make a network from stored weights, with a newly initialized stem and head if requested.

    Args:
      stored: the arrays, float32, and how their names map to this architecture's.
      stem, head: "keep" or "fresh", the network's own initialization (for a ConvStem: PyTorch's
        default); a head can also be "fresh-torch", PyTorch's default for `nn.Linear`, and for a
        PyTorch module "fresh:PART". Weights stored under these names are then left out, if there
        are any.
      normalize: mean and std of the first layer, for weights that do not contain them.
    """
    check_choices(spec.name, stem, head)
    if pytorch.is_name(spec.name):
        stored = pytorch.find("stored")(spec, stored.arrays, head)
        head = head.partition(":")[0]
    _check_types(stored.arrays)
    assert spec.num_classes is not None and spec.image_size is not None
    net = spec.create(dtype="float32")
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    shapes = {key: tuple(array.shape) for key, array in (params | stats).items()}
    patterns = [p for p, choice in ((stored.stem, stem), (stored.head, head)) if choice != "keep"]
    anew = re.compile("|".join(f"(?:{p})" for p in patterns) or r"(?!)")
    fresh = [key for key in shapes if anew.fullmatch(key)]

    dropped, resized = {}, {}
    for key, row, targets in stored.matched:
        if row.target is None:
            dropped[key] = row.reason
        elif all(anew.fullmatch(t) for t in targets):
            dropped[key] = "is newly initialized"
        elif row.resize and (to := shapes.get(targets[0])) not in (
            None,
            stored.arrays[key].shape,
        ):
            resized[targets[0]] = (stored.arrays[key].shape, to)
    retained = {k: a for k, a in stored.arrays.items() if dropped.get(k) != "is newly initialized"}
    values = normalize or tuple((v,) for v in stored.normalize)
    added = {} if stored.our_names else _normalize(retained, values, shapes)
    expected = {key: shape for key, shape in shapes.items() if key not in fresh}
    try:
        filled = convert.rename(stored.rows, retained | added, expected, name=spec.name)
    except ValueError as error:
        if stem == "keep" and _fits_but_for_stem(stored, retained | added, expected):
            raise ValueError(
                "only the stem differs: for a new stem, set init.stem=fresh (--init_stem of "
                f"jaxrobust import). {error}"
            ) from error
        raise
    of_head = [key for key in fresh if head == "fresh-torch" and re.fullmatch(stored.head, key)]
    filled |= _drawn(net, [key for key in fresh if key not in of_head], seed)
    filled |= _as_torch({key: shapes[key] for key in of_head}, seed)
    return Network(
        spec.name,
        {key: filled[key] for key in params},
        {key: filled[key] for key in stats},
        spec.num_classes,
        spec.image_size,
        dict(spec.options),
        matched=tuple(key for key in expected if key not in added),
        fresh=tuple(fresh),
        seed=seed,
        dropped=dropped,
        resized=resized,
    )


def check_choices(name: str, stem: str, head: str) -> None:
    """Reject an `init.stem` or `init.head` that is invalid or does not apply to the network."""
    starts_fresh = head.startswith("fresh:")
    of_torch = pytorch.is_name(name)
    for key, value in (("stem", stem), ("head", head)):
        if value not in CHOICES[key] and not (key == "head" and starts_fresh):
            raise ValueError(f"init.{key}={value!r}; use one of {', '.join(CHOICES[key])}")
        if value != "keep" and functions.is_name(name) and not (of_torch and key == "head"):
            raise ValueError(
                f"init.{key}={value}: the {key} of {name} is unknown; let your function load the "
                f"weights, or set init.{key}=keep"
            )
    if starts_fresh and not of_torch:
        raise ValueError(
            f"init.head={head}: only PyTorch modules need the name of a part; for {name}, "
            "set init.head=fresh"
        )


def _check_types(arrays: Arrays) -> None:
    if strange := [k for k, a in arrays.items() if a.dtype.kind == "f" and a.dtype != np.float32]:
        raise ValueError(
            f"{len(strange)} weights are {arrays[strange[0]].dtype} ({strange[0]}, ...), expected "
            "float32; to round them, import them first with `jaxrobust import --cast`"
        )


def _fits_but_for_stem(stored: StoredNames, arrays: Arrays, expected: Shapes) -> bool:
    drawn = re.compile(stored.stem)
    out = {k for k, _, targets in stored.matched if any(drawn.fullmatch(t) for t in targets)}
    others = {key: shape for key, shape in expected.items() if not drawn.fullmatch(key)}
    try:
        convert.rename(stored.rows, {k: a for k, a in arrays.items() if k not in out}, others)
    except ValueError:
        return False
    return True


def _normalize(arrays: Arrays, values: Sequence[tuple[float, ...]], shapes: Shapes) -> Arrays:
    if {"normalize.mean", "normalize.std"} & arrays.keys():
        return {}
    shape = shapes["normalize.mean"]
    if any(len(value) not in (1, *shape) for value in values):
        raise ValueError(f"mean and std have {len(values[0])} channels, but images have {shape[0]}")
    return _first_layer(values, shape)


def _first_layer(values: Sequence[tuple[float, ...]], shape: tuple[int, ...]) -> Arrays:
    return {
        f"normalize.{key}": np.broadcast_to(np.asarray(value, np.float32), shape).copy()
        for key, value in zip(("mean", "std"), values, strict=True)
    }


def _drawn(net: Classifier, fresh: list[str], seed: int) -> Arrays:
    if not fresh:
        return {}

    def some(key: jax.Array) -> Arrays:
        params, stats = net.init(key)
        return {k: a for k, a in (params | stats).items() if k in fresh}

    key = jax.random.key(seed)
    drawn = jax.eval_shape(some, key)
    program = compilation.program("weights newly initialized", drawn)
    with compilation.waiting("compiling the initialization of new weights", program, say):
        return jax.device_get(jax.jit(some)(key))


def _as_torch(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Arrays:
    """Draw kernels [inputs, outputs] and biases as `nn.Linear` does: uniform, +-1/sqrt(inputs)."""
    inputs = {key.rpartition(".")[0]: shape[0] for key, shape in shapes.items() if len(shape) == 2}
    keys = jax.random.split(jax.random.key(seed), max(len(shapes), 1))
    drawn = {}
    for key, (name, shape) in zip(keys, sorted(shapes.items()), strict=False):
        bound = inputs[name.rpartition(".")[0]] ** -0.5
        drawn[name] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return jax.device_get(drawn)


def normalized(network: Network, name: str) -> Network:
    """Set a network's first layer to the named mean and std; "keep": leave it."""
    if name == "keep":
        return network
    if name not in NORMALIZATIONS:
        raise ValueError(f"init.normalize={name!r}; use one of keep, {', '.join(NORMALIZATIONS)}")
    mean = network.stats.get("normalize.mean")
    if network.normalises_itself:
        raise ValueError(
            f"init.normalize={name}: {network.name} has its own `normalize` layer; change the "
            "mean and std in your function, and set init.normalize=keep"
        )
    if mean is None:
        raise ValueError(
            f"init.normalize={name}: the network has no normalization layer of this package; "
            "normalize in your function, and set init.normalize=keep"
        )
    if len(NORMALIZATIONS[name][0]) not in (1, *mean.shape):
        raise ValueError(
            f"init.normalize={name} has {len(NORMALIZATIONS[name][0])} channels, but the images "
            f"have {mean.size}; set init.normalize=half, none or keep"
        )
    return network._replace(stats=network.stats | _first_layer(NORMALIZATIONS[name], mean.shape))


def summary(network: Network) -> list[str]:
    """Describe the origin of weights for people, line by line."""
    lines = [f"{len(network.matched)} arrays from the stored weights"]
    if network.fresh:
        lines += [f"{len(network.fresh)} newly initialized: {_some(network.fresh)}"]
    for reason in dict.fromkeys(network.dropped.values()):
        keys = [key for key, why in network.dropped.items() if why == reason]
        lines += [f"{len(keys)} left out ({reason}): {_some(keys)}"]
    lines += [f"{k} resized from {a} to {b}" for k, (a, b) in network.resized.items()]
    return lines


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:4]) + ", ..." * (len(keys) > 4)
