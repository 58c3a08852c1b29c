"""PyTorch's modules by name, for training: a user's function makes one, or timm does."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxrobust.pytorch.reading import wrappers
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions

OUTPUT = "torch_output"  # the option that says which of several results are the logits
_SIZES = ("num_classes", "image_size", "in_channels")
_HOW = "write torch:my_nets.py:build, torch:my_package.nets:build or torch:timm/NAME"


def installed(package: str) -> bool:
    """Tell whether a package could be imported."""
    return importlib.util.find_spec(package) is not None


def module(name: str, given: Mapping[str, Any]) -> Any:
    """Make the module of a name `torch:...`; of a wrapped one (`wrappers.inside`) the inside.

    Args:
      name: as in `model.name`.
      given: num_classes, image_size and in_channels, which a function gets where its signature
        takes them, and its options.
    Raises:
      ValueError: PyTorch or timm is not installed, or there is no such function or module.
    """
    if not installed("torch"):
        raise ValueError(
            f"model.name={name} needs PyTorch to write the module down: pip install "
            "'jaxrobust[torch]'; a run that began elsewhere keeps the program in its workdir"
        )
    import torch

    make, keywords = _function(name), arguments(name, given)
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
        made = make(**keywords)
    if not isinstance(made, torch.nn.Module):
        what = "nothing" if made is None else f"a {type(made).__module__}.{type(made).__name__}"
        raise ValueError(f"model.name={name} returns {what}; return a torch.nn.Module")
    return wrappers.inside(made)


def arguments(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Select the keywords that the function of a name is called with; errors as of `module`."""
    own = name.removeprefix(pytorch.PREFIX)
    sizes: dict[str, Any]
    if own.startswith(pytorch.TIMM):
        sizes = {"model_name": own.removeprefix(pytorch.TIMM)}
        sizes |= {"num_classes": given["num_classes"], "in_chans": given["in_channels"]}
    else:
        taken = inspect.signature(_function(name)).parameters
        sizes = {key: given[key] for key in _SIZES if key in taken}
    options = {key: given[key] for key in given if key not in (*_SIZES, OUTPUT)}
    return sizes | {key: functions.tuples(value) for key, value in options.items()}


def _function(name: str) -> Callable[..., Any]:
    own = name.removeprefix(pytorch.PREFIX)
    if own.startswith(pytorch.TIMM):
        if not installed("timm"):
            raise ValueError(f"model.name={name} needs timm: pip install timm")
        import timm

        return timm.create_model
    if ":" not in own:
        raise ValueError(f"model.name={name} names no function; {_HOW}")
    return functions.find("model.name", own).function
