"""PyTorch modules as trainable networks: `torch:my_nets.py:build`, and timm's `torch:timm/NAME`.

A user's function receives as keywords the config's options, and `num_classes`, `image_size` and
`in_channels` if it accepts them. It returns the module, whose weights are the initial ones. Random
weights are drawn after `torch.manual_seed(0)`; a function with its own seed draws others. PyTorch
exports the module once, and the run stores the result, see `pytorch.kept`.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxrobust.models.interface.network_inputs import cast
from jaxrobust.pytorch import kept
from jaxrobust.pytorch import trainable as trained
from jaxrobust.pytorch.networks import torch_blocks, torch_fusions, torch_kernels
from jaxrobust.pytorch.reading import wrappers
from jaxrobust.pytorch.trainable import Trainable
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions
from jaxrobust.types import Array, Classifier, Params

OUTPUT = "torch_output"  # the option that names the logits among several results
_SIZES = ("num_classes", "image_size", "in_channels")
_HOW = "write torch:my_nets.py:build, torch:my_package.nets:build or torch:timm/NAME"
_FASTER = trained.Faster(
    torch_kernels.KERNELS | torch_fusions.KERNELS,
    torch_blocks.PATTERNS,
    torch_fusions.fused,
)
_folders: dict[str, Path] = {}  # identity of a network -> folder of the run that keeps it


def create(
    name: str, *, dtype: str, remat: bool = False, scan: bool = False, **options: Any
) -> Classifier:
    """Make the network named by a module.

    Args:
      name: as above.
      dtype: compute type; norms and softmax compute in at least float32.
      remat: recompute each block of the module in the backward pass instead of storing it.
      scan: compile consecutive blocks with the same computation once.
      **options: num_classes, image_size, in_channels, and options of the function.
    Raises:
      ValueError: one sentence about the problem with the name, the function or its module.
    """
    net = trained.classifier(program(name, **options), _FASTER, remat=remat, scan=scan)

    def apply(
        params: Params, stats: Params, images: Array, *, train: bool = False, key: Any = None
    ) -> tuple[Array, Params]:
        return net.apply(cast(params, jnp.dtype(dtype)), stats, images, train=train, key=key)

    return Classifier(net.init, apply)


def program(name: str, **options: Any) -> Trainable:
    """Return a module's two programs: a run's stored ones, or a new export by PyTorch."""
    identity = identified(name, options)
    if folder := _folders.get(identity):
        return _read(folder, (folder / pytorch.PROGRAMS).stat().st_mtime_ns)
    return _written_down(identity, _source_sha256(name))


def build(name: str, **options: Any) -> Any:
    """Return the PyTorch module as its function makes it; raises like `create`."""
    with functions.explained("model.name", name):
        return module(name, _of_module(options))


def state_dict(
    name: str, params: Mapping[str, Any], stats: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arrays in the form of the module's own `load_state_dict`."""
    return trained.state_dict(program(name, **options), {**params, **stats})


def normalises(name: str, options: Mapping[str, Any]) -> bool:
    """Tell whether a module has weights under the names of our first layer."""
    return trained.normalises_itself(program(name, **options))


def identified(name: str, options: Mapping[str, Any]) -> str:
    """Write everything that identifies a network as text."""
    try:
        return json.dumps(
            {"name": name} | _of_module(options), sort_keys=True, default=functions.as_dict
        )
    except TypeError as error:
        raise ValueError(f"model.name={name}: options must be plain values; {error}") from error


def _of_module(options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop options about how the module is computed, which its function does not receive."""
    return {key: value for key, value in options.items() if key != "scan"}


def remember(folder: Path) -> None:
    """Use the network stored in a run's `folder` for all later requests for it.

    Raises:
      ValueError: another run stores a different network under this name.
    """
    identity = kept.identity(folder)["network"]
    other = _folders.setdefault(identity, folder)
    if other != folder and kept.program_sha256(other) != kept.program_sha256(folder):
        name = json.loads(identity)["name"]
        raise ValueError(
            f"{other} and {folder} contain different networks called {name}, because its file "
            "changed between the two runs; name them in separate commands, or export the weights "
            "of one with --layout jaxrobust"
        )


def keep(folder: Path, name: str, **options: Any) -> None:
    """Store a network's programs in a run's folder, and use them from now on.

    Raises:
      ValueError: the folder stores a different network, or the programs disagree with the
        module.
    """
    identity = identified(name, options)
    if not pytorch.has_programs(folder):
        from jaxrobust.pytorch.reading import training_mode

        about = {"network": identity, "origin": origin(name)}
        about["torch"] = importlib.metadata.version("torch")
        network = _written_down(identity, _source_sha256(name))  # not another run's
        net, net_in_torch = trained.classifier(network, _FASTER), build(name, **options)
        try:
            training_mode.check_agreement(net_in_torch, network, net)
        except ValueError as error:
            raise ValueError(f"model.name={name}: {error}") from error
        kept.write(folder, network, about)
    elif kept.identity(folder)["network"] != identity:
        raise ValueError(f"{folder} contains another network; give a new --workdir")
    remember(folder)
    _folders[identity] = folder  # with the weights that this run starts with


def origin(name: str, **options: Any) -> dict[str, Any]:
    """Describe the origin of a module for a record; nothing is run.

    For a network stored by a run, as `options` say, this is its file when the run began and the
    hash of its computation.
    """
    if options and (folder := _folders.get(identified(name, options))):
        return kept.identity(folder)["origin"] | {"program_sha256": kept.program_sha256(folder)}
    about = {"name": name, "file": _file(name), "sha256": _source_sha256(name)}
    if name.startswith(pytorch.PREFIX + pytorch.TIMM) and installed("timm"):
        about["timm"] = importlib.metadata.version("timm")
    return about


def _file(name: str) -> str | None:
    place = name.removeprefix(pytorch.PREFIX).rpartition(":")[0]
    if not place or place.endswith(".py"):
        return place or None
    functions.look_in(Path.cwd())
    with functions.explained("model.name", name):
        spec = importlib.util.find_spec(place)
    return None if spec is None else spec.origin


def _source_sha256(name: str) -> str | None:
    file = Path(_file(name) or "")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


@functools.lru_cache(maxsize=4)
def _read(folder: Path, changed: int) -> Trainable:
    del changed
    return kept.read(folder)


@functools.lru_cache(maxsize=4)  # a run asks for the same module repeatedly
def _written_down(identity: str, source: str | None) -> Trainable:
    del source
    options = json.loads(identity)
    name = options.pop("name")
    with functions.explained("model.name", name):
        net = module(name, options)
        size, channels = options["image_size"], options["in_channels"]
        try:
            from jaxrobust.pytorch.reading import training_mode

            output = options.get(OUTPUT)
            return training_mode.trainable(net, (size, size, channels), output=output)
        except ValueError as error:
            text = str(error).replace("--torch_output NAME", f"model.options.{OUTPUT}=NAME")
            raise ValueError(f"model.name={name}: {text}") from error


def installed(package: str) -> bool:
    """Tell whether a package could be imported."""
    return importlib.util.find_spec(package) is not None


def module(name: str, options: Mapping[str, Any]) -> Any:
    """Make the module of a name `torch:...`, without wrappers (`wrappers.inside`).

    Raises:
      ValueError: PyTorch or timm is not installed, or there is no such function or module.
    """
    if not installed("torch"):
        raise ValueError(
            f"model.name={name} needs PyTorch to export the module: pip install "
            "'jaxrobust[torch]', or continue a run whose workdir holds the exported program"
        )
    import torch

    make, keywords = _function(name), arguments(name, options)
    try:
        inspect.signature(make).bind(**keywords)
    except TypeError as error:
        raise ValueError(
            f"model.name={name}: {error}; the function gets the config's model.options, here "
            f"{sorted(keywords.keys() - {*_SIZES})}. Write a config with the options that it "
            "accepts: the command line can change options, but not remove them"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make(**keywords)
    if not isinstance(net, torch.nn.Module):
        returned = "nothing" if net is None else f"a {type(net).__module__}.{type(net).__name__}"
        raise ValueError(f"model.name={name} returns {returned}; return a torch.nn.Module")
    return wrappers.inside(net)


def arguments(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Select the keywords for the function of a name; raises like `module`."""
    place = name.removeprefix(pytorch.PREFIX)
    sizes: dict[str, Any]
    if place.startswith(pytorch.TIMM):
        sizes = {"model_name": place.removeprefix(pytorch.TIMM)}
        sizes |= {"num_classes": options["num_classes"], "in_chans": options["in_channels"]}
    else:
        parameters = inspect.signature(_function(name)).parameters
        sizes = {key: options[key] for key in _SIZES if key in parameters}
    others = {key: value for key, value in options.items() if key not in (*_SIZES, OUTPUT)}
    return sizes | {key: functions.tuples(value) for key, value in others.items()}


def _function(name: str) -> Callable[..., Any]:
    place = name.removeprefix(pytorch.PREFIX)
    if place.startswith(pytorch.TIMM):
        if not installed("timm"):
            raise ValueError(f"model.name={name} needs timm: pip install timm")
        import timm

        return timm.create_model
    if ":" not in place:
        raise ValueError(f"model.name={name} does not name a function; {_HOW}")
    return functions.find("model.name", place).function
