"""From a PyTorch module to an exported program of PyTorch's core operators."""

import contextlib
import copy
import io
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrobust.pytorch.reading import changing, custom_gradients, data_dependence, refusals
from jaxrobust.pytorch.reading.refusals import own_line
from jaxrobust.pytorch.reading.wrappers import quietly

# Operators with a shorter formula here than PyTorch's decomposition, with a gradient by hand, or
# with a single draw. PyTorch 2.14 would decompose a norm into the root of a sum, whose gradient at
# 0 is NaN.
_UNDECOMPOSED = (
    "scaled_dot_product_attention",
    "silu",
    "_euclidean_dist",
    "bernoulli",
    "linalg_vector_norm",
    # PyTorch's decomposition has other gradients at kinks and bounds than the operator.
    *("hardsigmoid", "hardswish", "logit", "sinc", "special_entr", "binary_cross_entropy"),
    *("std.correction", "xlogy.Tensor", "xlogy.Scalar_Self", "xlogy.Scalar_Other"),
    *("special_xlog1py", "special_xlog1py.self_scalar", "special_xlog1py.other_scalar"),
)


def check(module: Any, *, random: bool = False, modes: bool = True) -> None:
    """Raise `ValueError` unless a module is on the CPU, in float32 and, if `modes`, in eval mode.

    `random`: only its batch norms have to be in eval mode.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        type_name = "a state dict" if isinstance(module, dict) else f"a {type(module).__name__}"
        raise ValueError(
            f"it is {type_name}, not a torch.nn.Module; return the module with its weights"
        )
    refusals.check(module)

    def refuse(names: list[str], fault: str) -> None:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ValueError(f"{names[0]}{more} is {fault}")

    of_a_batch = torch.nn.modules.batchnorm._NormBase
    parts = [(name or "it", part) for name, part in module.named_modules() if part.training]
    training = [name for name, part in parts if not random or isinstance(part, of_a_batch)]
    if training and modes:
        where = "" if training[0] == "it" else f" ({', '.join(training[:3])})"
        raise ValueError(f"the module is in training mode{where}; call module.eval() first")
    arrays = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if away := [name for name, array in arrays.items() if array.device.type != "cpu"]:
        refuse(away, f"on {arrays[away[0]].device}; call module.cpu(): JAX has its own devices")
    dtypes = {name: a.dtype for name, a in arrays.items() if a.is_floating_point()}
    if other := [name for name, dtype in dtypes.items() if dtype != torch.float32]:
        kind = str(dtypes[other[0]]).removeprefix("torch.")
        refuse(other, f"{kind}; call module.float(): verdicts are decided in float32")


def exported(
    module: Any, image: tuple[int, int, int], *, trainable: bool = False
) -> tuple[Any, bool]:
    """Export a module for images H, W, C; the second result says if it takes one image only.

    The program of a `trainable` module also computes what it keeps between evaluations.
    """
    import torch

    if not module.training:  # in training, the norm of a single image has nothing to normalize
        refusals.check_takes(module, image)
    if isinstance(module, torch.jit.ScriptModule):
        return exported_torchscript(module, image)
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"its {name} is a TorchScript module inside another module; give the "
                "torch.nn.Module that it was made from, or use torch.jit.script on the outer module"
            )
    data_dependence.check_hooks(module)
    functions: list[str] = []

    def export(count: int, strict: bool) -> Any:
        example = refusals.example(module, image, count)
        sizes = ({0: torch.export.Dim("batch")},) if count > 1 else None
        with quietly(), torch.enable_grad():
            watched = data_dependence.watched(module, example)
            functions.extend(watched.functions)
            if trainable and not module.training:
                module.train().eval()
            # In strict mode PyTorch reads the module's source, without our answers.
            answers = data_dependence.answering(module, watched)
            with contextlib.nullcontext() if strict else answers:
                return torch.export.export(module, (example,), dynamic_shapes=sizes, strict=strict)

    reasons: list[Exception] = []
    for count in (2, 1):  # one by one, if its code fixes a number of images
        for strict in (False, True):
            if strict and functions:  # whose backward passes would be lost
                continue
            try:
                return export(count, strict), count == 1
            except custom_gradients.Refused:
                raise
            except Exception as error:
                reasons.append(error)
    raise ValueError(f"torch.export: {_reason(reasons[0])}") from reasons[0]


def _reason(error: Exception) -> str:
    frames = "".join(traceback.format_tb(error.__traceback__))
    where = own_line(str(error)) or own_line(frames)
    remedy = ""
    if "data-dependent" in str(error):
        remedy = "; the computation must not branch on the images: use torch.where"
    return f"{_first_line(error)}{f' at {where}' if where else ''}{remedy}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__


def loaded(path: Path) -> tuple[Any, bool]:
    """Load the program of a `.pt2`; the second result says if it takes one image only."""
    import torch

    with quietly():
        try:
            program = torch.export.load(path)
        except Exception as error:
            raise ValueError(
                f"torch.export.load cannot read it with PyTorch {torch.__version__} "
                f"({_first_line(error)}); a newer PyTorch reads older files: install at "
                "least the version that wrote it, save it again with torch.export.save in this "
                "version, or name the function that makes the module"
            ) from error
    sizes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"]
    images: tuple[Any, ...] = tuple(sizes[-1]) if sizes else ()
    if len(images) != 4:
        raise ValueError(f"it expects {images}, not images [B,C,H,W]; export it with images")
    if isinstance(images[0], int) and images[0] != 1:
        raise ValueError(
            f"it only accepts {images[0]} images at a time; export it with "
            'dynamic_shapes=({0: torch.export.Dim("batch")},), or with one image'
        )
    return program, images[0] == 1


def decomposed(program: Any) -> Any:
    """Decompose an exported program into PyTorch's core operators and a few others."""
    import torch

    table = torch.export.default_decompositions()
    sampler = torch.ops.aten.grid_sampler_2d.default
    table[sampler] = _strict(torch._decomp.get_decompositions([sampler])[sampler])
    drops = any(map(drops_attention, program.graph.nodes))
    for name in _UNDECOMPOSED:
        if not (drops and "attention" in name):
            packet, _, overload = name.partition(".")
            table.pop(getattr(getattr(torch.ops.aten, packet), overload or "default"), None)
    with quietly():
        program = changing.one_name(custom_gradients.with_stops(program))
        return program.run_decompositions(table)


def drops_attention(node: Any) -> bool:
    """Tell whether a node is attention with dropout, which its row ignores."""
    if node.op != "call_function" or "scaled_dot_product_attention" not in str(node.target):
        return False
    return node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0) != 0


def _strict(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decomposition where `clamp` has no gradient at its bounds, as in grid sampling."""
    import torch
    from torch.nn.functional import threshold

    def clamp(x: Any, low: float, high: float) -> Any:
        return -threshold(-threshold(x, low, low), -high, -high)

    def strict(*operands: Any, **keywords: Any) -> Any:
        torch_clamp, torch.clamp = torch.clamp, clamp  # type: ignore[assignment]
        try:
            return decomposition(*operands, **keywords)
        finally:
            torch.clamp = torch_clamp

    return strict


# --------------------------------------------------------------------------------- TorchScript


def is_torchscript(path: Path) -> bool:
    """Tell whether `torch.jit.save` wrote a file; nothing in it is run or unpickled."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def loaded_torchscript(path: Path) -> Any:
    """Load the module of such a file on the CPU; it contains TorchScript and no Python."""
    import torch

    try:
        with quietly():
            return torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        message = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch.jit.load cannot read it: {message}") from error


def exported_torchscript(module: Any, image: tuple[int, int, int]) -> tuple[Any, bool]:
    """Export a TorchScript module; the second result says if it takes one image only."""
    import torch

    problem = (
        f"it is a TorchScript module ({type(module).__name__}) that PyTorch cannot export; "
        "give the torch.nn.Module that it was made from"
    )
    # PyTorch's error for such modules names this converter; it is undocumented
    # and may be missing.
    try:
        from torch._export.converter import TS2EPConverter
    except ImportError as error:
        raise ValueError(problem) from error
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
    reason = str(failed or "it accepts only a fixed number of images").strip().partition("\n")[0]
    raise ValueError(f"{problem} ({reason})") from failed


def in_float64(module: Any) -> Any:
    """Return a copy of a module in float64; also for TorchScript."""
    import torch

    with quietly():
        if not isinstance(module, torch.jit.ScriptModule):
            return copy.deepcopy(module).double()
        file = io.BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        return torch.jit.load(file).double()
