"""The reference networks and the training step of the paper in PyTorch, to compare with.

Needs the extra `parity`; `published` also needs robustbench. This is our own implementation.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from jaxrobust.publish.torch_networks import apgd


def randomised(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Return the network with random weights for which every part affects the logits."""
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


# Decayed weights; the paper's code uses the first rule for ConvNeXt and ResNet, else the second.
DECAYED = {
    "not-bias": lambda name, p: "bn" not in name and ".bias" not in name,
    "matrices": lambda name, p: p.ndim > 1 and not name.endswith(".bias"),
    "all": lambda name, p: True,
}


def divergence(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """KL(p(x) || p(x_adv)) f32[B] of clean probabilities and attacked logits."""
    log = torch.nn.functional.log_softmax(logits, -1)
    return torch.nn.functional.kl_div(log, probabilities, reduction="none").sum(-1)


def pgd(
    net: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    targets: torch.Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
) -> torch.Tensor:
    """Linf PGD to its last iterate: from the images on the cross-entropy with labels i64[B], or as
    in TRADES from noise of 0.001 around them on the divergence from probabilities f32[B,C]."""
    of_labels = targets.ndim == 1
    x = images if of_labels else images + 0.001 * torch.randn_like(images)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        if of_labels:
            loss = torch.nn.functional.cross_entropy(net(x), targets, reduction="sum")
        else:
            loss = divergence(net(x), targets).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        moved = x.detach() + step_size * gradient.sign()
        x = torch.min(torch.max(moved, images - epsilon), images + epsilon).clamp(0, 1)
    return x


class Trainer:
    """One network, its AdamW and its moving average; `step(images, labels) -> loss`."""

    def __init__(
        self,
        net: torch.nn.Module,
        *,
        lr: float,
        weight_decay: float,
        ema_decay: float,
        epsilon: float,
        attack_steps: int,
        step_size: float | None = None,  # of PGD, in pixels; None: APGD with at most 9 steps
        trades_beta: float | None = None,  # of TRADES, with PGD; None: cross-entropy
        decay_mask: str = "not-bias",
        device: str = "cpu",  # of everything; on a GPU the update is PyTorch's fused AdamW
        dtype: torch.dtype = torch.float32,  # of `torch.autocast`; float32: none
        channels_last: bool = False,  # weights and images as NHWC in memory
        compiled: bool = False,  # `torch.compile`: a graph for the attack, one for the update
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        placed: Any = net.to  # PyTorch's types do not know its `memory_format`
        self.net = placed(self.device, memory_format=self.layout).train()
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
        self.ema_decay, self.epsilon = ema_decay, epsilon
        self.attack_steps, self.step_size = attack_steps, step_size
        self.trades_beta = trades_beta

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """f32[B,C]: losses and their logit gradients are float32 in any compute type."""
        wanted = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=wanted):
            return self.forward(images).float()

    def attacked(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Attack with input gradients only and running statistics."""
        self.net.eval().requires_grad_(False)
        targets = labels
        if self.trades_beta is not None:
            targets = self.logits(images).softmax(-1)
        given = (self.logits, images, targets, self.epsilon, self.attack_steps)
        images = apgd(*given) if self.step_size is None else pgd(*given, self.step_size)
        self.net.train().requires_grad_(True)
        return images

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """One update; `attack_steps=0` is the clean step. Returns when the device has finished."""
        images = images.to(self.device, memory_format=self.layout)
        labels = labels.to(self.device)
        attacked = self.attacked(images, labels) if self.attack_steps else images
        if self.trades_beta is None:
            loss = torch.nn.functional.cross_entropy(self.logits(attacked), labels)
        else:
            clean = self.logits(images)
            apart = divergence(self.logits(attacked), clean.softmax(-1)).mean()
            loss = torch.nn.functional.cross_entropy(clean, labels) + self.trades_beta * apart
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            old, new = (  # parameters and batch statistics, without counters of batch norms
                [value for value in net.state_dict().values() if value.is_floating_point()]
                for net in (self.average, self.net)
            )
            torch._foreach_lerp_(old, new, 1 - self.ema_decay)
        return loss.item()
