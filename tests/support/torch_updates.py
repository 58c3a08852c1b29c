"""Updates of adversarial training in PyTorch, in float64: written from the papers, for comparison.

Madry et al. 2018 (SAT), Zhang et al. 2019 (TRADES), Wang et al. 2020 (MART), and what Huang et al.
2022 add to TRADES (AAT): batch statistics in the attack, running ones of the attacked images alone
that all of the first update and 1% of the others moves, and an average of the weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as f

EPSILON, STEP, STEPS, BETA = 8 / 255, 2 / 255, 10, 6.0


class Recipe(NamedTuple):
    """What an update minimizes and how; by default as the baseline has it."""

    loss: str  # sat, trades or mart
    lr: Callable[[int], float]  # of an epoch
    momentum: Callable[[int], float] = lambda epoch: 0.9
    advanced: bool = False
    smoothing: float = 0.0
    weight_decay: float = 2e-4
    clip: float | None = 5.0
    tau: float = 0.0  # of the average
    warmup: int = 0  # updates in which the average is a copy
    length: int = 1  # updates of an epoch


class Net:
    """A module behind a normalization, and how its batch norms behave."""

    def __init__(self, module: torch.nn.Module, mean: Any, std: Any) -> None:
        self.module = module.double()
        self.mean, self.std = (
            torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std)
        )
        self.norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    def __call__(self, x: torch.Tensor, *, batch: bool, momentum: float = 0.0) -> torch.Tensor:
        """Return logits, with statistics of the `batch`, towards which the running ones move."""
        self.module.train(batch)
        for norm in self.norms:
            norm.momentum = momentum
        return self.module((x - self.mean) / self.std)


def attacked(net: Net, recipe: Recipe, x: torch.Tensor, y: Any, start: Any) -> torch.Tensor:
    """Return projected sign ascent from a start that nothing projects: the attack of all."""
    batch = recipe.advanced
    with torch.no_grad():
        aim = net(x, batch=batch).softmax(1)
    point = start
    for _ in range(STEPS):
        point = point.detach().requires_grad_()
        logits = net(point, batch=batch)
        if recipe.loss == "trades":
            value = f.kl_div(logits.log_softmax(1), aim, reduction="sum")
        else:
            value = f.cross_entropy(logits, y, reduction="sum")
        (slope,) = torch.autograd.grad(value, point)
        moved = point.detach() + STEP * slope.sign()
        point = torch.minimum(torch.maximum(moved, x - EPSILON), x + EPSILON).clamp(0, 1)
    return point.detach()


def loss_of(net: Net, recipe: Recipe, x: Any, y: Any, adversarial: Any, first: bool) -> Any:
    """Return the mean over the images of what an update minimizes."""
    momentum = 0.1 if not recipe.advanced else 1.0 if first else 0.01
    if recipe.loss == "sat":
        return f.cross_entropy(net(adversarial, batch=True, momentum=momentum), y)
    clean = net(x, batch=True, momentum=0.0 if recipe.advanced else momentum)
    robust = net(adversarial, batch=True, momentum=momentum)
    p, q = clean.softmax(1), robust.softmax(1)
    if recipe.loss == "trades":
        divergence = f.kl_div(robust.log_softmax(1), p, reduction="batchmean")
        return f.cross_entropy(clean, y, label_smoothing=recipe.smoothing) + BETA * divergence
    rival = q.detach().scatter(1, y[:, None], -1.0).argmax(1)
    margin = f.nll_loss((1.0001 - q + 1e-12).log(), rival)
    divergence = f.kl_div((q + 1e-12).log(), p, reduction="none").sum(1)
    unsure = 1.0000001 - p.gather(1, y[:, None])[:, 0]
    return f.cross_entropy(robust, y) + margin + BETA * (divergence * unsure).mean()


class Update(NamedTuple):
    """After an update."""

    loss: float
    norm: float  # of all gradients together, before anything is clipped
    average: dict[str, torch.Tensor]  # of the weights, with the last running statistics


def updates(
    net: Net, recipe: Recipe, batches: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> Iterator[Update]:
    """Yield update for update; the module has its weights then.

    Args:
      batches: images f64[B,H,W,3], labels [B], and where the attack starts, like the images.
    """
    parameters = dict(net.module.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    average = {k: v.detach().clone() for k, v in net.module.state_dict().items()}
    for i, (images, labels, start) in enumerate(batches):
        x, start = (torch.tensor(a.transpose(0, 3, 1, 2).copy()) for a in (images, start))
        y = torch.tensor(labels).long()
        rate, momentum = (of(i // recipe.length) for of in (recipe.lr, recipe.momentum))
        adversarial = attacked(net, recipe, x, y, start)
        loss = loss_of(net, recipe, x, y, adversarial, i == 0)
        net.module.zero_grad()
        loss.backward()
        largest = float("inf") if recipe.clip is None else recipe.clip
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), largest)
        with torch.no_grad():
            for name, p in parameters.items():
                decays = not (recipe.advanced and "bn" in name)
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                grad = grad + recipe.weight_decay * decays * p
                velocity[name] = momentum * velocity[name] + grad
                ahead = grad + momentum * velocity[name]  # Nesterov's
                p -= rate * (ahead if recipe.advanced else velocity[name])
        d = i + 1 - recipe.warmup
        decay = 0.0 if d < 0 else min(recipe.tau, (1 + d) / (10 + d))
        for key, value in net.module.state_dict().items():
            if not value.is_floating_point():  # a count
                continue
            kept = decay if key in parameters else 0.0
            average[key] = kept * average[key] + (1 - kept) * value.detach()
        yield Update(loss.item(), norm.item(), average)


def one_cycle(peak: float, epochs: int, warmup: int) -> tuple[list[float], list[float]]:
    """Return rate and momentum of each epoch, as PyTorch's OneCycleLR has them by default."""
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    how: dict[str, Any] = {"max_lr": peak, "total_steps": epochs, "pct_start": warmup / epochs}
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, **how)
    rates, momenta = [], []
    for epoch in range(epochs):
        rates.append(sgd.param_groups[0]["lr"])
        momenta.append(sgd.param_groups[0]["momentum"])
        sgd.step()
        if epoch < epochs - 1:
            schedule.step()
    return rates, momenta
