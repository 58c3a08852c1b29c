"""The reference networks and the training step of the paper in PyTorch, to compare with.

Needs the extra `parity`; `published` needs robustbench too. Our own code, written from the facts.
"""

import contextlib
import copy
import importlib.util
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jaxrobust import models

SETUP = "bash tools/setup_reference_env.sh"


@contextlib.contextmanager
def _imports_of_old_code():
    """Lets pass what today's torch, timm and setuptools say about the imports of the references."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", r"Importing from timm\.", DeprecationWarning)
        warnings.filterwarnings("ignore", r"pkg_resources is deprecated", UserWarning)
        yield


def import_timm():
    """timm; with a CPU build of torch, torchvision's two operators must be declared first."""
    with _imports_of_old_code():
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


def import_robustbench():
    """robustbench; `ImportError` that names the command if it is not there."""
    import_timm()
    try:
        with _imports_of_old_code():
            import pyautoattack
            import pyautoattack.state

            # robustbench imports the name that its own repository gives the same package.
            sys.modules.setdefault("autoattack", pyautoattack)
            sys.modules.setdefault("autoattack.state", pyautoattack.state)
            import robustbench
    except ImportError as error:
        raise ImportError(f"needs robustbench ({error}): {SETUP}") from error
    return robustbench


def network(name: str, *, img_size: int = 224, **options) -> torch.nn.Module:
    """The PyTorch network under our name, in training mode, with some initialisation.

    Args:
      name: of a network of ours.
      img_size: side in pixels; only networks with learned positions or windows depend on it.
      **options: of timm's constructor, such as `num_classes`, `in_chans`, `drop_path_rate`.
    """
    reference, family = models.member(name).reference, models.family(name)
    base, options = reference.base, {**reference.options, **options}
    ins = options.get("in_chans", 3)
    if base.endswith(".py"):
        if "in_chans" in options:
            options["in_channels"] = options.pop("in_chans")
        return module(base).model(**options)
    if not family.any_size:
        options["img_size"] = img_size
    net = import_timm().create_model(base, pretrained=False, **options)
    stem = _conv_stem_of(name)
    if stem and hasattr(net, "patch_embed"):
        net.patch_embed.proj = conv_stem(stem, ins, project=net.embed_dim)
    elif stem:
        net.stem = conv_stem(stem, ins)
    for slot, stride in enumerate(reference.strides):
        net.patch_embed.proj[2 * slot][0].stride = (stride, stride)
    return net


def _conv_stem_of(name: str) -> list[tuple[int, int]]:
    """(width, stride) of the 3x3 convolutions of a ConvStem; empty: it has none."""
    row = models.variant(name)
    widths = getattr(row, "stem_widths", ())
    return list(zip(widths, row.stem_strides, strict=True)) if widths else []


def source(name: str) -> str:
    """Whose network `network` returns, with the version; empty if it is a file of ours."""
    if models.member(name).reference.base.endswith(".py"):
        return ""
    stem = " with a ConvStem of ours" if _conv_stem_of(name) else ""
    return f"timm {import_timm().__version__}{stem}"


def conv_stem(widths, ins: int, project: int = 0) -> torch.nn.Module:
    """The ConvStem as in the authors' files: a Sequential named `stem`; with a last 1x1 for ViT."""
    from timm.layers import LayerNorm2d

    layers: list[torch.nn.Module] = []
    for out, stride in widths:
        conv = torch.nn.Conv2d(ins, out, 3, stride=stride, padding=1)
        layers += [conv, LayerNorm2d(out, eps=1e-6), torch.nn.GELU()]
        ins = out
    if project:
        layers.append(torch.nn.Conv2d(ins, project, 1))
    return torch.nn.Sequential(OrderedDict(stem=torch.nn.Sequential(*layers)))


def module(file: str):
    """A file of tools/torch_modules, imported as a user would who has only that file."""
    path = Path(__file__).parent / "torch_modules" / file
    spec = importlib.util.spec_from_file_location(f"torch_modules_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def published(robustbench_id: str) -> torch.nn.Module:
    """robustbench's own network of an ImageNet-Linf id, with random weights and eval mode."""
    import_robustbench()
    import timm
    from robustbench.model_zoo.imagenet import linf

    # These two builders ask for weights of the network that they build.
    hub = f"{robustbench_id.lower().replace('-', '_')}_imagenet_linf"
    if timm.is_model(hub):
        return timm.create_model(hub, pretrained=False).eval()
    plain = "Salman2020Do_R50" if robustbench_id == "Standard_R50" else robustbench_id
    return linf[plain]["model"]().eval()


def randomised(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The network with weights under which each part of it shows in the logits.

    A fresh network of timm's has layer scales of 1e-6, no biases and batch statistics 0 and 1: a
    mistake in most of its parts would not change its logits.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if not value.is_floating_point() or name.startswith("normalize."):
                continue
            z, last = torch.randn(value.shape, generator=generator), name.split(".")[-1]
            if last == "running_var":
                z = 0.5 + z.abs()
            elif last.startswith("gamma") or last == "temperature":
                z = 0.5 + 0.1 * z
            elif last in ("cls_token", "pos_embed", "relative_position_bias_table"):
                z = 0.5 * z
            elif z.ndim > 1:
                z = z / z[0].numel() ** 0.5
            else:
                z = 0.1 * z + (1 if last == "weight" else 0)
            value.copy_(z)
    return net


def apgd(net, images, labels, epsilon: float, steps: int):
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
    before, checked = torch.zeros_like(loss), loss
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
        halve = (loss <= before) | (~reduced & (checked >= best_loss))
        before, checked, reduced = loss, best_loss, halve
        step = torch.where(halve, step / 2, step)
        x = torch.where(halve.view(shape), best, x)
        gradient = torch.where(halve.view(shape), best_gradient, gradient)
    return best


# What is decayed; the paper's code has the first rule for ConvNeXt and ResNet, else the second.
DECAYED = {
    "not-bias": lambda name, p: "bn" not in name and ".bias" not in name,
    "matrices": lambda name, p: p.ndim > 1 and not name.endswith(".bias"),
}


class Trainer:
    """One network, its AdamW and its moving average; `step(images, labels) -> loss`.

    Args:
      device: where all of it lives; on a GPU the update is PyTorch's fused AdamW.
      dtype: what `torch.autocast` computes in; float32: no autocast.
      channels_last: weights and images as NHWC in memory.
      compiled: `torch.compile` of the network: one graph for the attack, which is in eval mode and
        has input gradients only, and one for the update.
    """

    def __init__(
        self,
        net,
        *,
        lr,
        weight_decay,
        ema_decay,
        epsilon,
        attack_steps,
        decay_mask="not-bias",
        device="cpu",
        dtype=torch.float32,
        channels_last=False,
        compiled=False,
    ):
        self.device, self.dtype = torch.device(device), dtype
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.net = net.to(self.device, memory_format=self.layout).train()
        self.average = copy.deepcopy(self.net)
        self.forward = torch.compile(self.net) if compiled else self.net
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for name, p in self.net.named_parameters():
            groups[0 if DECAYED[decay_mask](name, p) else 1]["params"].append(p)
        self.optimiser = torch.optim.AdamW(
            groups,
            lr=lr,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=weight_decay,
            fused=True if self.device.type == "cuda" else None,
        )
        self.ema_decay, self.epsilon, self.attack_steps = ema_decay, epsilon, attack_steps

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """f32[B,C]: the losses and their gradients in the logits are float32 whatever computes."""
        wanted = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=wanted):
            return self.forward(images).float()

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """One update; `attack_steps=0` is the clean step. Returns when the device has finished."""
        images = images.to(self.device, memory_format=self.layout)
        labels = labels.to(self.device)
        if self.attack_steps:
            self.net.eval().requires_grad_(False)  # input gradients only, running statistics
            images = apgd(self.logits, images, labels, self.epsilon, self.attack_steps)
            self.net.train().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(self.logits(images), labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            old, new = (_floats(net) for net in (self.average, self.net))
            torch._foreach_lerp_(old, new, 1 - self.ema_decay)
        return loss.item()


def _floats(net) -> list[torch.Tensor]:
    """All that is averaged: parameters and batch statistics, but not a batch norm's counter."""
    return [value for value in net.state_dict().values() if value.is_floating_point()]


def state_arrays(net: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict as NumPy copies."""
    return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}
