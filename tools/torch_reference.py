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
from typing import Any, NamedTuple

import numpy as np
import torch

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


class Reference(NamedTuple):
    """Where a network comes from, and what is changed in it."""

    base: str  # timm's name; with ".py", a file of tools/torch_modules
    stem: tuple[tuple[int, int], ...] = ()  # (width, stride) of the ConvStem's 3x3 convolutions
    options: dict[str, Any] = {}  # of its constructor  # noqa: RUF012
    strides: tuple[int, ...] = ()  # of the first convolutions of XCiT's stem


_T_STEM, _B_STEM = ((48, 2), (96, 2)), ((64, 2), (96, 2), (128, 1))
_L_STEM = ((96, 2), (144, 2), (192, 1))
_STEM_16 = ((48, 2), (96, 2), (192, 2), (384, 2))
_ISO: dict[str, Any] = {"depth": 18, "dim": 384}
_N: dict[str, Any] = {"depths": (2, 2, 2), "dims": (64, 128, 256), "gamma_init": 0.1}
_CVST: dict[str, Any] = {"stem_widths": (48, 96, 192, 384), "stem_strides": (2, 2, 2, 2)}
NETWORKS = {
    "convnext_t": Reference("convnext_tiny"),
    "convnext_t_cvst": Reference("convnext_tiny", _T_STEM),
    "convnext_s": Reference("convnext_small"),
    "convnext_s_cvst": Reference("convnext_small", _T_STEM),
    "convnext_b": Reference("convnext_base"),
    "convnext_b_cvst": Reference("convnext_base", _B_STEM),
    "convnext_l": Reference("convnext_large"),
    "convnext_l_cvst": Reference("convnext_large", _L_STEM),
    "convnext_n": Reference("convnext.py", options=_N | {"stem_strides": (2,)}),
    "convnext_n_cvst": Reference(
        "convnext.py", options=_N | {"stem_widths": (32, 64), "stem_strides": (2, 1)}
    ),
    "iso_convnext_s": Reference("iso_convnext.py", options=_ISO),
    "iso_convnext_s_cvst": Reference("iso_convnext.py", options=_ISO | _CVST),
    "vit_s": Reference("vit_small_patch16_224"),
    "vit_s_cvst": Reference("vit_small_patch16_224", _STEM_16),
    "vit_m": Reference("deit3_medium_patch16_224"),
    "vit_m_cvst": Reference("deit3_medium_patch16_224", _STEM_16),
    "vit_b": Reference("vit_base_patch16_224"),
    "vit_b_cvst": Reference("vit_base_patch16_224", _STEM_16),
    "deit_s": Reference("deit_small_patch16_224"),
    "xcit_n12": Reference("xcit_nano_12_p16_224"),
    "xcit_t12": Reference("xcit_tiny_12_p16_224"),
    "xcit_t24": Reference("xcit_tiny_24_p16_224"),
    "xcit_s12": Reference("xcit_small_12_p16_224"),
    "xcit_s24": Reference("xcit_small_24_p16_224"),
    # timm has these two with 24 blocks only
    "xcit_m12": Reference("xcit_medium_24_p16_224", options={"depth": 12, "eta": 1.0}),
    "xcit_l12": Reference("xcit_large_24_p16_224", options={"depth": 12, "eta": 1.0}),
    "cait_s12": Reference("cait_s24_224", options={"depth": 12, "init_values": 1.0}),
    "cait_s24": Reference("cait_s24_224"),
    "cait_xxs24": Reference("cait_xxs24_224"),
    "resnet18": Reference("resnet18"),
    "resnet50": Reference("resnet50"),
    "resnet50_gelu": Reference("resnet50", options={"act_layer": "gelu"}),
    "wide_resnet50_2": Reference("wide_resnet50_2"),
    "swin_b": Reference("swin_base_patch4_window7_224"),
    "swin_l": Reference("swin_large_patch4_window7_224"),
}
# Patches of 8 px have a stem of their own; those of 4 px keep all weights and change two strides.
for _name in [name for name in NETWORKS if name.startswith("xcit")]:
    _p16 = NETWORKS[_name]
    NETWORKS[f"{_name}_p8"] = _p16._replace(base=_p16.base.replace("_p16_", "_p8_"))
    NETWORKS[f"{_name}_p4"] = _p16._replace(strides=(1, 1))
_ANY_SIZE = ("convnext", "iso_convnext", "resnet", "wide_resnet", "xcit")  # no learned positions


def network(name: str, *, img_size: int = 224, **options) -> torch.nn.Module:
    """The PyTorch network under our name, in training mode, with some initialisation.

    Args:
      name: one of `NETWORKS`.
      img_size: side in pixels; only networks with learned positions or windows depend on it.
      **options: of timm's constructor, such as `num_classes`, `in_chans`, `drop_path_rate`.
    """
    reference = Reference(*NETWORKS[name])
    base, options = reference.base, {**reference.options, **options}
    ins = options.get("in_chans", 3)
    if base.endswith(".py"):
        if "in_chans" in options:
            options["in_channels"] = options.pop("in_chans")
        return module(base).model(**options)
    if not base.startswith(_ANY_SIZE):
        options["img_size"] = img_size
    net = import_timm().create_model(base, pretrained=False, **options)
    if reference.stem and base.startswith("convnext"):
        net.stem = conv_stem(reference.stem, ins)
    elif reference.stem:
        net.patch_embed.proj = conv_stem(reference.stem, ins, project=net.embed_dim)
    for slot, stride in enumerate(reference.strides):
        net.patch_embed.proj[2 * slot][0].stride = (stride, stride)
    return net


def source(name: str) -> str:
    """Whose network `network` returns, with the version; empty if it is a file of ours."""
    reference = Reference(*NETWORKS[name])
    if reference.base.endswith(".py"):
        return ""
    stem = " with a ConvStem of ours" if reference.stem else ""
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
