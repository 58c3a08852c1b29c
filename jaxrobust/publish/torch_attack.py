"""APGD in PyTorch, which a certificate attacks the reference network with."""

from collections.abc import Callable

import torch


def apgd(
    net: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    steps: int,
) -> torch.Tensor:
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
