"""The training step of the paper in PyTorch, on timm's networks: for parity tests and benchmarks.

Needs the extra `parity`. Our own code, written from the facts of the paper's training script.
"""

import copy
import sys

import numpy as np
import torch


def import_timm():
    """timm; with a CPU build of torch, torchvision's two operators must be declared first."""
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


# our name -> timm's, and (width, stride) of the ConvStem's 3x3 convolutions
_T_STEM, _B_STEM = ((48, 2), (96, 2)), ((64, 2), (96, 2), (128, 1))
_L_STEM = ((96, 2), (144, 2), (192, 1))
NETWORKS = {
    "convnext_t": ("convnext_tiny", ()),
    "convnext_t_cvst": ("convnext_tiny", _T_STEM),
    "convnext_s": ("convnext_small", ()),
    "convnext_s_cvst": ("convnext_small", _T_STEM),
    "convnext_b": ("convnext_base", ()),
    "convnext_b_cvst": ("convnext_base", _B_STEM),
    "convnext_l": ("convnext_large", ()),
    "convnext_l_cvst": ("convnext_large", _L_STEM),
}


def network(name: str, **options) -> torch.nn.Module:
    """timm's network under our name, with the ConvStem put in, randomly initialised."""
    timm = import_timm()
    from timm.layers import LayerNorm2d

    base, stem = NETWORKS[name]
    net = timm.create_model(base, pretrained=False, **options)
    if stem:
        layers: list[torch.nn.Module] = []
        ins = 3
        for out, stride in stem:
            conv = torch.nn.Conv2d(ins, out, 3, stride=stride, padding=1)
            layers += [conv, LayerNorm2d(out, eps=1e-6), torch.nn.GELU()]
            ins = out
        net.stem = torch.nn.Sequential(*layers)
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


class Trainer:
    """One network, its AdamW and its moving average; `step(images, labels) -> loss`."""

    def __init__(self, net, *, lr, weight_decay, ema_decay, epsilon, attack_steps):
        self.net, self.average = net.train(), copy.deepcopy(net)
        named = list(net.named_parameters())
        groups = [
            {"params": [p for n, p in named if not n.endswith(".bias")]},
            {"params": [p for n, p in named if n.endswith(".bias")], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(
            groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
        )
        self.ema_decay, self.epsilon, self.attack_steps = ema_decay, epsilon, attack_steps

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """One update; `attack_steps=0` is the clean step."""
        if self.attack_steps:
            self.net.requires_grad_(False)  # input gradients only
            images = apgd(self.net, images, labels, self.epsilon, self.attack_steps)
            self.net.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(self.net(images), labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            old, new = list(self.average.parameters()), list(self.net.parameters())
            torch._foreach_lerp_(old, new, 1 - self.ema_decay)
        return loss.item()


def state_arrays(net: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict as NumPy copies."""
    return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}
