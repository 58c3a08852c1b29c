"""The reference networks in PyTorch, timm's and RobustBench's, and an attack on them.

Needs PyTorch, and timm with the extra `parity`; `published` also needs robustbench.
"""

import contextlib
import functools
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED, own_id

SETUP = "bash tools/setup_reference_env.sh"


@contextlib.contextmanager
def _of_old_code():
    """Ignore the warnings of current torch, timm and setuptools about the references' code."""
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
    """Import robustbench; if it is missing, raise an `ImportError` that names the command."""
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


def network(name: str, *, img_size: int = 224, **options: Any) -> nn.Module:
    """Build the PyTorch network under our name, in training mode; `options` are timm's."""
    reference, family = models.member(name).reference, models.family(name)
    base, options = reference.base, {**reference.options, **options}
    ins = options.get("in_chans", 3)
    if base.endswith(".py"):
        raise ValueError(f"timm has no {name}")
    if not family.any_size:
        options["img_size"] = img_size
    net = import_timm().create_model(base, pretrained=False, **options)
    if widths := _stem_widths(name):
        stem = functools.partial(_conv_stem, ins, widths, models.variant(name).stem_strides)
        if hasattr(net, "patch_embed"):
            net.patch_embed.proj = stem(project=net.embed_dim)
        else:
            net.stem = stem()
    for slot, stride in enumerate(reference.strides):
        net.patch_embed.proj[2 * slot][0].stride = (stride, stride)
    return net


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv_stem(
    ins: int, widths: Sequence[int], strides: Sequence[int], project: int = 0
) -> nn.Module:
    layers: list[nn.Module] = []
    for out, stride in zip(widths, strides, strict=True):
        layers.append(nn.Conv2d(ins, out, 3, stride, 1))
        layers += [_ChannelNorm(out, eps=1e-6), nn.GELU()]
        ins = out
    layers += [nn.Conv2d(ins, project, 1)] if project else []
    stem = nn.Sequential()
    stem.add_module("stem", nn.Sequential(*layers))
    return stem


def _stem_widths(name: str) -> tuple[int, ...]:
    return getattr(models.variant(name), "stem_widths", ())


def source(name: str) -> str:
    """Say whose network `network` returns, with the version; empty if it is a file of ours."""
    if models.member(name).reference.base.endswith(".py"):
        return ""
    stem = " with our ConvStem" if _stem_widths(name) else ""
    return f"timm {import_timm().__version__}{stem}"


def published(robustbench_id: str) -> nn.Module:
    """Build robustbench's network of an id, with random weights, in evaluation mode."""
    import_robustbench()
    import timm
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    board, name = PUBLISHED[robustbench_id].board, own_id(robustbench_id)
    zoo = model_dicts[BenchmarkDataset(board.dataset)][getattr(ThreatModel, board.threat)]

    # These two builders request weights for the network that they build.
    hub = f"{name.lower().replace('-', '_')}_{board.dataset}_{board.threat.lower()}"
    if timm.is_model(hub):
        return timm.create_model(hub, pretrained=False).eval()
    with _of_old_code():
        twin = "Salman2020Do_R50" if board.norm else "Hendrycks2020Many"
        return zoo[twin if name == "Standard_R50" else name]["model"]().eval()


def state_arrays(net: nn.Module) -> dict[str, np.ndarray]:
    """Return the state dict as NumPy copies."""
    return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}


def apgd(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int,
) -> Tensor:
    """Linf APGD as trained, for up to 9 steps, where every iteration is a checkpoint."""

    def evaluate(x, with_gradient):
        x = x.detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            loss = torch.nn.functional.cross_entropy(net(x), labels, reduction="none")
        gradient = torch.autograd.grad(loss.sum(), x)[0] if with_gradient else None
        return loss.detach(), gradient

    def project(x):
        return torch.min(torch.max(x, images - epsilon), images + epsilon).clamp(0, 1)

    assert 1 <= steps <= 9
    shape = (-1, 1, 1, 1)
    x = previous = best = images.clamp(0, 1)
    loss, gradient = evaluate(x, True)
    best_loss, best_gradient = loss, gradient
    previous_loss, checked = torch.zeros_like(loss), loss
    reduced = torch.ones_like(loss, dtype=torch.bool)
    step = torch.full_like(loss, 2 * epsilon)
    for t in range(steps):
        momentum, previous = x - previous, x
        ahead = project(x + step.view(shape) * gradient.sign())
        a = 1.0 if t == 0 else 0.75
        x = project(x + (ahead - x) * a + momentum * (1 - a))
        loss, gradient = evaluate(x, t < steps - 1)
        better = loss > best_loss
        best = torch.where(better.view(shape), x, best)
        best_loss = torch.where(better, loss, best_loss)
        if gradient is None:
            break
        best_gradient = torch.where(better.view(shape), gradient, best_gradient)
        halve = (loss <= previous_loss) | (~reduced & (checked >= best_loss))
        previous_loss, checked, reduced = loss, best_loss, halve
        step = torch.where(halve, step / 2, step)
        x = torch.where(halve.view(shape), best, x)
        gradient = torch.where(halve.view(shape), best_gradient, gradient)
    return best


# ------------------------------------------ wrappers of exported modules, whose file has a copy


class _Normalize(nn.Module):
    """(images - mean) / std for each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalize f[B,C,H,W]."""
        return (images - self.mean) / self.std


def normalized(
    net: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """Put a network behind its normalization, if it has any: names `normalize.*`, `model.*`."""
    if mean is None or std is None:
        return net
    return nn.Sequential(OrderedDict(normalize=_Normalize(mean, std), model=net))


def name_in_zoo(name: str) -> str:
    """Name a weight as RobustBench's loader does before it hands it to a network.

    It cuts as many letters as these words have from each name that holds one, wherever it stands.
    Source: `load_model` and `rm_substr_from_state_dict` of robustbench/utils.py, 1.1.1.
    """
    for word in ("module.", "model."):
        name = name[len(word) :] if word in name else name
    return name


class ZooNetwork(nn.Module):
    """A network that takes its weights by these names too, with "model." before them or without,
    as the loader puts it for ImageNet.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits f32[B,K] of images f32[B,C,H,W] in [0, 1]."""
        return self.net(images)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights of the network, as `nn.Module` does."""
        names = {name_in_zoo(name): name for name in self.net.state_dict()}
        targets = {k: names.get(k, names.get(k.removeprefix("model."), k)) for k in state_dict}
        renamed = {targets[k]: array for k, array in state_dict.items()}
        return self.net.load_state_dict(renamed, strict, assign)
