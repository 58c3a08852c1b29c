"""The PyTorch network that a conversion is compared with, with the weights of the file.

PyTorch and timm are imported inside functions: without them no reference exists.
"""

import contextlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# Before PyTorch is loaded: its threads would spin while JAX computes, on cores that JAX needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED, own_id
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import files
from jaxrobust.weights.store.artifact import Network

Arrays = dict[str, Any]  # np.ndarray

_NOTHING = contextlib.nullcontext()
INSTALL = "pip install 'jaxrobust[parity]'"
# Our size fields -> timm's arguments.
TIMM_OPTIONS = {"depths": "depths", "dims": "dims", "depth": "depth"}
TIMM_OPTIONS |= {"dim": "embed_dim", "heads": "num_heads"}


class Reference(NamedTuple):
    """A PyTorch network in evaluation mode, for images in [0, 1], and its origin."""

    net: Any
    origin: str
    independent: bool  # not written by us
    weights: str  # how they were loaded
    robustbench_id: str = ""  # whose names it has


def deviations(
    network: Network, other: str, options: dict[str, Any] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Compare fields that matter with an architecture's: those that differ -> (ours, theirs)."""
    fields = models.computed(network.name, network.options)
    other_fields = models.computed(other, options or {})
    return {
        key: (fields.get(key), other_fields.get(key))
        for key in sorted(fields.keys() | other_fields.keys())
        if fields.get(key) != other_fields.get(key)
    }


def named(network: Network, *, wrapped: bool) -> Arrays:
    """Name weights as in the reference, in its order; `wrapped`: `normalize.*` and `model.*`."""
    arrays = network.params | network.stats
    if pytorch.is_name(network.name):
        state = pytorch.find("state_dict")(network.name, *network[1:3], network.sizes)
        if not wrapped:
            return state
        first = {
            key: arrays[key].reshape(1, -1, 1, 1) for key in ("normalize.mean", "normalize.std")
        }
        return first | {f"model.{key}": a for key, a in state.items()}
    return convert.reference_names(network.name, arrays, wrapped=wrapped, **network.options)


def reference(
    network: Network, path: Path, layout: str = "timm", weights_kind: str | None = None
) -> Reference | None:
    """Build a reference with a file's weights; None: no PyTorch, or not in timm; `ValueError`: no
    fit.

    `layout`: "timm", or a RobustBench id, whose own loader then reads the file.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        return None
    if path.suffix == ".py":
        import importlib.util

        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        of_others = pytorch.is_name(network.name)
        explained = functions.explained("model.name", network.name) if of_others else _NOTHING
        with explained, _no_byte_code():
            spec.loader.exec_module(module)
            net = module.load()
        return Reference(net, f"the exported {path.name}", of_others, "by its load()")
    if layout in PUBLISHED and PUBLISHED[layout].file:
        with contextlib.suppress(ImportError):
            return _robustbench(path, layout)
    return _rebuilt(network, path, weights_kind)


@contextlib.contextmanager
def _no_byte_code() -> Iterator[None]:
    """Leave no `__pycache__` next to what is imported: that folder is handed on as it is."""
    previous_flag, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = previous_flag


def _robustbench(path: Path, robustbench_id: str) -> Reference:
    from jaxrobust.publish import torch_networks

    torch_networks.import_robustbench()
    with tempfile.TemporaryDirectory() as folder:
        link = place(Path(folder), robustbench_id)
        link.parent.mkdir(parents=True)
        link.symlink_to(path.resolve())
        net = load_model(Path(folder), robustbench_id)
    version = importlib.metadata.version("robustbench")
    return Reference(net, f"robustbench {version}", True, "by its load_model()", robustbench_id)


def place(folder: Path, robustbench_id: str) -> Path:
    """Find the path where RobustBench looks for an id's file: below `model_dir` or $TORCH_HOME."""
    file = PUBLISHED[robustbench_id].file
    if not file:
        raise ValueError(
            f"RobustBench does not read a file for {robustbench_id}, but uses torchvision's "
            "weights; choose another layout"
        )
    return folder / file if "/" in file else folder / "hub" / "checkpoints" / file


def load_model(folder: Path, robustbench_id: str) -> Any:
    """Load RobustBench's network of an id, with weights from `place(folder, id)`, by its loader."""
    from robustbench.utils import load_model

    home = mock.patch.dict(os.environ, {"TORCH_HOME": str(folder)})
    with home, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        board = PUBLISHED[robustbench_id].board
        where = {"dataset": board.dataset, "threat_model": board.threat}
        return load_model(own_id(robustbench_id), model_dir=str(folder), **where)


def _rebuilt(network: Network, path: Path, weights_kind: str | None) -> Reference | None:
    """Return timm's network with the arrays of a file; None: timm has no such network."""
    import torch

    if pytorch.is_name(network.name):
        net = pytorch.find("rebuilt")(network)
        net.load_state_dict(torch.load(path, weights_only=True), strict=True)
        provenance = "by load_state_dict(strict=True)"
        net = _normalising(net, network.stats) if network.normalised else net.eval()
        return Reference(net, network.name, True, provenance)
    net, origin = _independent(network)
    if net is None:
        return None
    try:
        source = convert.unwrapped(files.read(path, weights_kind=weights_kind))
    except ValueError as error:
        if "bfloat16" not in str(error):  # NumPy has no such type
            raise
        source = {}
    plain = {k: v for k, v in source.items() if not k.startswith("normalize.")}
    want = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    provenance = "read from the file by name"
    if {k: v.shape for k, v in plain.items()} != want:
        plain = named(network, wrapped=False)
        provenance = "ours, under its names, because those in the file differ"
    net.load_state_dict({k: torch.tensor(v) for k, v in plain.items()})
    if network.normalised:
        net = _normalising(net, network.stats | source)  # ours, where the file has none
    return Reference(net.eval(), origin, True, provenance)


def _normalising(net: Any, stats: Arrays) -> Any:
    from jaxrobust.publish.torch_networks import normalized

    return normalized(net, *(stats[f"normalize.{k}"].tolist() for k in ("mean", "std"))).eval()


def _independent(network: Network) -> tuple[Any, str]:
    """Return timm's network and its version; None if timm is missing, or has no such network."""
    from jaxrobust.publish import torch_networks

    if functions.is_name(network.name):
        return None, ""
    other = deviations(network, network.name)
    options = {TIMM_OPTIONS[key]: value for key, (value, _) in other.items() if key in TIMM_OPTIONS}
    options |= {"num_classes": network.num_classes, "in_chans": network.in_channels}
    if other.keys() <= TIMM_OPTIONS.keys():
        with contextlib.suppress(ImportError):
            if origin := torch_networks.source(network.name):
                net = torch_networks.network(network.name, img_size=network.image_size, **options)
                return net, origin
    return None, ""
