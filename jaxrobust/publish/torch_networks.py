"""The reference networks in PyTorch: timm's, RobustBench's, and the files of `torch_modules`.

Needs PyTorch; timm with the extra `parity`; `published` needs robustbench too.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED, own_id
from jaxrobust.publish.torch_modules.layers import conv_stem

SETUP = "bash tools/setup_reference_env.sh"


@contextlib.contextmanager
def _of_old_code():
    """Let pass what today's torch, timm and setuptools say about the code of the references."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", r"Importing from timm\.", DeprecationWarning)
        warnings.filterwarnings("ignore", r"pkg_resources is deprecated", UserWarning)
        warnings.filterwarnings("ignore", r"torch\.meshgrid", UserWarning)
        yield


def import_timm() -> ModuleType:
    """Import timm; a CPU build of torch needs torchvision's two operators declared first."""
    with _of_old_code():
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            for name in [m for m in sys.modules if m.startswith("torchvision")]:
                del sys.modules[name]
            boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + boxes)
            import_timm.library = library  # type: ignore[attr-defined]  # must outlive the import
        import timm

    return timm


def import_robustbench() -> ModuleType:
    """Import robustbench; raise an `ImportError` that names the command if it is not there."""
    import_timm()
    try:
        with _of_old_code():
            import pyautoattack
            import pyautoattack.state

            # robustbench imports the name that its own repository gives the same package.
            sys.modules.setdefault("autoattack", pyautoattack)
            sys.modules.setdefault("autoattack.state", pyautoattack.state)
            import robustbench
    except ImportError as error:
        raise ImportError(f"needs robustbench ({error}): {SETUP}") from error
    return robustbench


def network(name: str, *, img_size: int = 224, **options: Any) -> torch.nn.Module:
    """Build the PyTorch network under our name, in training mode; `options` are timm's."""
    reference, family = models.member(name).reference, models.family(name)
    base, options = reference.base, {**reference.options, **options}
    ins = options.get("in_chans", 3)
    if base.endswith(".py"):
        if "in_chans" in options:
            options["in_channels"] = options.pop("in_chans")
        if not family.any_size:
            options["image_size"] = img_size
        return module(base).model(**options)
    if not family.any_size:
        options["img_size"] = img_size
    net = import_timm().create_model(base, pretrained=False, **options)
    if widths := _stem_widths(name):
        stem = functools.partial(conv_stem, ins, widths, models.variant(name).stem_strides)
        if hasattr(net, "patch_embed"):
            net.patch_embed.proj = stem(project=net.embed_dim)
        else:
            net.stem = stem()
    for slot, stride in enumerate(reference.strides):
        net.patch_embed.proj[2 * slot][0].stride = (stride, stride)
    return net


def _stem_widths(name: str) -> tuple[int, ...]:
    return getattr(models.variant(name), "stem_widths", ())


def source(name: str) -> str:
    """Say whose network `network` returns, with the version; empty if it is a file of ours."""
    if models.member(name).reference.base.endswith(".py"):
        return ""
    stem = " with a ConvStem of ours" if _stem_widths(name) else ""
    return f"timm {import_timm().__version__}{stem}"


def module(file: str) -> ModuleType:
    """Return a file of torch_modules, by its name."""
    folder = Path(__file__).parent / "torch_modules"
    (path,) = folder.rglob(f"{Path(file).stem}.py")
    parts = path.relative_to(folder).with_suffix("").parts
    return importlib.import_module(".".join(("jaxrobust.publish.torch_modules", *parts)))


def published(robustbench_id: str) -> torch.nn.Module:
    """Return robustbench's network of an id, with random weights and in eval mode."""
    import_robustbench()
    import timm
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    board, name = PUBLISHED[robustbench_id].board, own_id(robustbench_id)
    zoo = model_dicts[BenchmarkDataset(board.dataset)][getattr(ThreatModel, board.threat)]

    # These two builders ask for weights of the network that they build.
    hub = f"{name.lower().replace('-', '_')}_{board.dataset}_{board.threat.lower()}"
    if timm.is_model(hub):
        return timm.create_model(hub, pretrained=False).eval()
    with _of_old_code():
        return zoo["Salman2020Do_R50" if name == "Standard_R50" else name]["model"]().eval()


def state_arrays(net: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the state dict as NumPy copies."""
    return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}
