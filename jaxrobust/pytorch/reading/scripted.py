"""Modules of TorchScript, which `torch.jit.script` and `torch.jit.trace` make."""

import copy
import io
import zipfile
from pathlib import Path
from typing import Any

from jaxrobust.pytorch.reading import refusals
from jaxrobust.pytorch.reading.silence import quietly

_INSIDE = (
    "is a module of TorchScript inside of one that is none; give the torch.nn.Module that it was "
    "made from, or torch.jit.script the whole"
)


def is_file(path: Path) -> bool:
    """Tell whether `torch.jit.save` wrote a file; nothing of it is run or unpickled."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def loaded(path: Path) -> Any:
    """Return the module of such a file, on the CPU; it holds TorchScript, and no Python."""
    import torch

    try:
        with quietly():
            return torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        message = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch.jit.load cannot read it: {message}") from error


def is_scripted(module: Any) -> bool:
    """Tell whether a module is of TorchScript; `ValueError`: one of its parts is, and it is not."""
    import torch

    if isinstance(module, torch.jit.ScriptModule):
        return True
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(f"its {name} {_INSIDE}")
    return False


def in_float64(module: Any) -> Any:
    """Return a copy of a module, of TorchScript or not, in float64."""
    import torch

    with quietly():  # PyTorch warns of itself
        if not isinstance(module, torch.jit.ScriptModule):
            return copy.deepcopy(module).double()
        written = io.BytesIO()
        torch.jit.save(module, written)
        written.seek(0)
        return torch.jit.load(written).double()


def exported(module: Any, image: tuple[int, int, int]) -> tuple[Any, bool]:
    """Export a module of TorchScript; the second result says that it takes one image only."""
    import torch

    # PyTorch's own, which it names in its message where such a module is exported; it is no part
    # of what is documented, and may be missing.
    try:
        from torch._export.converter import TS2EPConverter
    except ImportError as error:
        raise ValueError(f"it {_without(module)}") from error
    failed: Exception | None = None
    for count in (2, 1):
        example = refusals.example(module, image, count)
        try:
            with quietly(), torch.no_grad():
                program = TS2EPConverter(module, (example,)).convert()
            inputs = program.graph_signature.user_inputs
            (images,) = [node for node in program.graph.nodes if node.name in inputs]
            if count == 1 or not isinstance(images.meta["val"].shape[0], int):
                return program, count == 1
        except Exception as error:
            failed = failed or error
    reason = str(failed or "it takes a fixed number of images").strip().partition("\n")[0]
    raise ValueError(f"it {_without(module)} ({reason})") from failed


def _without(module: Any) -> str:
    return (
        f"is a module of TorchScript ({type(module).__name__}) that PyTorch cannot write down; "
        "give the torch.nn.Module that it was made from"
    )
