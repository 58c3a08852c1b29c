"""PyTorch's modules as networks that train: `torch:my_nets.py:build`, and timm's `torch:timm/NAME`.

A user's function is called by keyword with the options of the config, and with those of
`num_classes`, `image_size` and `in_channels` that its signature takes; it returns the module, whose
weights are the start. Random ones are drawn after `torch.manual_seed(0)`: a function that takes a
seed draws others. PyTorch writes the module down once; a run keeps that, see `interop.kept`.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxrobust.models.interface.network_inputs import cast
from jaxrobust.pytorch import kept, modules
from jaxrobust.pytorch import trainable as trained
from jaxrobust.pytorch.networks import torch_blocks, torch_fusions, torch_kernels
from jaxrobust.pytorch.trainable import Trainable
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions
from jaxrobust.types import Array, Classifier, Params

_KERNELS = torch_kernels.KERNELS | torch_fusions.KERNELS
_KNOWN = (_KERNELS, torch_blocks.PATTERNS, torch_fusions.fused)
_kept: dict[str, Path] = {}  # which network -> folder of the run that keeps it


def create(
    name: str, *, dtype: str, remat: bool = False, scan: bool = False, **given: Any
) -> Classifier:
    """Make the network of a module's name.

    Args:
      name: as above.
      dtype: compute type; norms and softmax compute in at least float32.
      remat: recompute each block of the module in the backward pass instead of storing it.
      scan: compile one block for all that follow each other and compute the same.
      **given: num_classes, image_size, in_channels, and options of the function.
    Raises:
      ValueError: one sentence about what is wrong with the name, the function or its module.
    """
    net = trained.classifier(program(name, **given), *_KNOWN, remat=remat, scan=scan)

    def apply(
        params: Params, stats: Params, images: Array, *, train: bool = False, key: Any = None
    ) -> tuple[Array, Params]:
        return net.apply(cast(params, jnp.dtype(dtype)), stats, images, train=train, key=key)

    return Classifier(net.init, apply)


def program(name: str, **given: Any) -> Trainable:
    """Return a module's two programs: those that a run keeps, else what PyTorch writes down now."""
    identity = identified(name, given)
    if folder := _kept.get(identity):
        return _read(folder, (folder / pytorch.PROGRAMS).stat().st_mtime_ns)
    return _written_down(identity, _source_sha256(name))


def build(name: str, **given: Any) -> Any:
    """Return the PyTorch module itself, as its function makes it; errors as of `create`."""
    with functions.explained("model.name", name):
        return modules.module(name, _of_module(given))


def state_dict(
    name: str, params: Mapping[str, Any], stats: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arrays as the module's own `load_state_dict` takes them."""
    return trained.state_dict(program(name, **given), {**params, **stats})


def normalises(name: str, given: Mapping[str, Any]) -> bool:
    """Tell whether a module has weights under the names of our first layer."""
    return trained.normalises_itself(program(name, **given))


def identified(name: str, given: Mapping[str, Any]) -> str:
    """Write as text all that tells one network from another."""
    try:
        return json.dumps(
            {"name": name} | _of_module(given), sort_keys=True, default=functions.as_dict
        )
    except TypeError as error:
        raise ValueError(f"model.name={name}: options are plain values; {error}") from error


def _of_module(given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out how the module is computed, which its function does not hear of."""
    return {key: value for key, value in given.items() if key != "scan"}


def remember(folder: Path) -> None:
    """Take the network that a run keeps in `folder` whenever the same is asked for.

    Raises:
      ValueError: another run keeps one of this name that computes something else.
    """
    identity = kept.identity(folder)["network"]
    other = _kept.setdefault(identity, folder)
    if other != folder and kept.program_sha256(other) != kept.program_sha256(folder):
        name = json.loads(identity)["name"]
        raise ValueError(
            f"{other} and {folder} keep different networks of the name {name}, whose file changed "
            "between the two runs; name them in separate commands, or export the weights of one "
            "with --layout jaxrobust"
        )


def keep(folder: Path, name: str, **given: Any) -> None:
    """Keep a network's programs in a run's folder, from where it is taken from then on.

    Raises:
      ValueError: the folder keeps another one.
    """
    identity = identified(name, given)
    if pytorch.has_programs(folder):
        if kept.identity(folder)["network"] != identity:
            raise ValueError(f"{folder} keeps another network; give a new --workdir")
    else:
        about = {"network": identity, "origin": origin(name)}
        about["torch"] = importlib.metadata.version("torch")
        network = _written_down(identity, _source_sha256(name))  # not another run's
        _check_agreement(name, given, network)
        kept.write(folder, network, about)
    remember(folder)
    _kept[identity] = folder  # with the weights that this run starts with


def _check_agreement(name: str, given: Mapping[str, Any], network: Trainable) -> None:
    from jaxrobust.pytorch.reading import training_mode

    net = trained.classifier(network, *_KNOWN)
    module = build(name, **given)
    try:
        training_mode.check_agreement(module, network, net)
    except ValueError as error:
        raise ValueError(f"model.name={name}: {error}") from error


def origin(name: str, **given: Any) -> dict[str, Any]:
    """Describe where a module is from, for a record; nothing is run.

    Of a network that a run keeps, as `given` says, that is its file when the run began, and the
    hash of what it computes.
    """
    if given and (folder := _kept.get(identified(name, given))):
        return kept.identity(folder)["origin"] | {"program_sha256": kept.program_sha256(folder)}
    file = _file(name)
    of_timm = name.startswith(pytorch.PREFIX + pytorch.TIMM)
    where = (
        {"timm": importlib.metadata.version("timm")}
        if of_timm and modules.installed("timm")
        else {}
    )
    return {"name": name, "file": file, "sha256": _source_sha256(name)} | where


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
    given = json.loads(identity)
    name = given.pop("name")
    with functions.explained("model.name", name):
        module = modules.module(name, given)
        size, channels = given["image_size"], given["in_channels"]
        try:
            from jaxrobust.pytorch.reading import training_mode

            output = given.get(modules.OUTPUT)
            network = training_mode.trainable(module, (size, size, channels), output=output)
        except ValueError as error:
            said = str(error).replace("--torch_output NAME", f"model.options.{modules.OUTPUT}=NAME")
            raise ValueError(f"model.name={name}: {said}") from error
    return network
