"""PyTorch's modules as networks that train: `torch:my_nets.py:build`, and timm's `torch:timm/NAME`.

A user's function is called by keyword with the options of the config, and with those of
`num_classes`, `image_size` and `in_channels` that its signature takes; it returns the module, whose
weights are the start. Random ones are drawn after `torch.manual_seed(0)`: a function that takes a
seed draws others. PyTorch writes the module down once; a run keeps that, see `pytorch.kept`.
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

OUTPUT = "torch_output"  # the option that says which of several results are the logits
_SIZES = ("num_classes", "image_size", "in_channels")
_HOW = "write torch:my_nets.py:build, torch:my_package.nets:build or torch:timm/NAME"
_FASTER = (
    torch_kernels.KERNELS | torch_fusions.KERNELS,
    torch_blocks.PATTERNS,
    torch_fusions.fused,
)
_folders: dict[str, Path] = {}  # identity of a network -> folder of the run that keeps it


def create(
    name: str, *, dtype: str, remat: bool = False, scan: bool = False, **options: Any
) -> Classifier:
    """Make the network of a module's name.

    Args:
      name: as above.
      dtype: compute type; norms and softmax compute in at least float32.
      remat: recompute each block of the module in the backward pass instead of storing it.
      scan: compile one block for all that follow each other and compute the same.
      **options: num_classes, image_size, in_channels, and options of the function.
    Raises:
      ValueError: one sentence about what is wrong with the name, the function or its module.
    """
    net = trained.classifier(program(name, **options), *_FASTER, remat=remat, scan=scan)

    def apply(
        params: Params, stats: Params, images: Array, *, train: bool = False, key: Any = None
    ) -> tuple[Array, Params]:
        return net.apply(cast(params, jnp.dtype(dtype)), stats, images, train=train, key=key)

    return Classifier(net.init, apply)


def program(name: str, **options: Any) -> Trainable:
    """Return a module's two programs: those that a run keeps, else what PyTorch writes down now."""
    identity = identified(name, options)
    if folder := _folders.get(identity):
        return _read(folder, (folder / pytorch.PROGRAMS).stat().st_mtime_ns)
    return _written_down(identity, _source_sha256(name))


def build(name: str, **options: Any) -> Any:
    """Return the PyTorch module itself, as its function makes it; errors as of `create`."""
    with functions.explained("model.name", name):
        return module(name, _of_module(options))


def state_dict(
    name: str, params: Mapping[str, Any], stats: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arrays as the module's own `load_state_dict` takes them."""
    return trained.state_dict(program(name, **options), {**params, **stats})


def normalises(name: str, options: Mapping[str, Any]) -> bool:
    """Tell whether a module has weights under the names of our first layer."""
    return trained.normalises_itself(program(name, **options))


def identified(name: str, options: Mapping[str, Any]) -> str:
    """Write as text all that tells one network from another."""
    try:
        return json.dumps(
            {"name": name} | _of_module(options), sort_keys=True, default=functions.as_dict
        )
    except TypeError as error:
        raise ValueError(f"model.name={name}: options are plain values; {error}") from error


def _of_module(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out how the module is computed, which its function does not hear of."""
    return {key: value for key, value in options.items() if key != "scan"}


def remember(folder: Path) -> None:
    """Take the network that a run keeps in `folder` whenever the same is asked for.

    Raises:
      ValueError: another run keeps one of this name that computes something else.
    """
    identity = kept.identity(folder)["network"]
    other = _folders.setdefault(identity, folder)
    if other != folder and kept.program_sha256(other) != kept.program_sha256(folder):
        name = json.loads(identity)["name"]
        raise ValueError(
            f"{other} and {folder} keep different networks of the name {name}, whose file changed "
            "between the two runs; name them in separate commands, or export the weights of one "
            "with --layout jaxrobust"
        )


def keep(folder: Path, name: str, **options: Any) -> None:
    """Keep a network's programs in a run's folder, from where it is taken from then on.

    Raises:
      ValueError: the folder holds a different one, or the programs are not what the module
        computes.
    """
    identity = identified(name, options)
    if not pytorch.has_programs(folder):
        from jaxrobust.pytorch.reading import training_mode

        about = {"network": identity, "origin": origin(name)}
        about["torch"] = importlib.metadata.version("torch")
        network = _written_down(identity, _source_sha256(name))  # not another run's
        net, net_in_torch = trained.classifier(network, *_FASTER), build(name, **options)
        try:
            training_mode.check_agreement(net_in_torch, network, net)
        except ValueError as error:
            raise ValueError(f"model.name={name}: {error}") from error
        kept.write(folder, network, about)
    elif kept.identity(folder)["network"] != identity:
        raise ValueError(f"{folder} keeps another network; give a new --workdir")
    remember(folder)
    _folders[identity] = folder  # with the weights that this run starts with


def origin(name: str, **options: Any) -> dict[str, Any]:
    """Describe where a module is from, for a record; nothing is run.

    Of a network that a run keeps, as `options` say, that is its file when the run began, and the
    hash of what it computes.
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


@functools.lru_cache(maxsize=4)  # a run asks for the same one again and again
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
    """Make the module of a name `torch:...`; of a wrapped one (`wrappers.inside`) the inside.

    Raises:
      ValueError: PyTorch or timm is not installed, or there is no such function or module.
    """
    if not installed("torch"):
        raise ValueError(
            f"model.name={name} needs PyTorch to write the module down: pip install "
            "'jaxrobust[torch]'; a run that began elsewhere keeps the program in its workdir"
        )
    import torch

    make, keywords = _function(name), arguments(name, options)
    try:
        inspect.signature(make).bind(**keywords)
    except TypeError as error:
        raise ValueError(
            f"model.name={name}: {error}; what it is called with are the config's model.options, "
            f"here {sorted(keywords.keys() - {*_SIZES})}. Write a config with those that it takes: "
            "on the command line an option can be changed, not taken away"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make(**keywords)
    if not isinstance(net, torch.nn.Module):
        what = "nothing" if net is None else f"a {type(net).__module__}.{type(net).__name__}"
        raise ValueError(f"model.name={name} returns {what}; return a torch.nn.Module")
    return wrappers.inside(net)


def arguments(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Select the keywords that the function of a name is called with; errors as of `module`."""
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
        raise ValueError(f"model.name={name} names no function; {_HOW}")
    return functions.find("model.name", place).function
