"""Networks in PyTorch whose authors say what their gradients are, and faulty ones."""

import random

import numpy as np
import torch
from torch import nn

CHANNELS, SIDE, CLASSES = 3, 6, 5


class StraightThrough(torch.autograd.Function):
    """Rounds to levels; the gradient is that of the identity."""

    @staticmethod
    def forward(ctx, x, levels):
        return torch.round(x * levels) / levels

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Clipped(torch.autograd.Function):
    """A sign whose gradient is cut where numbers are far from zero."""

    @staticmethod
    def forward(ctx, x, width):
        ctx.save_for_backward(x)
        ctx.width = width
        return x.sign()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gradient = gradient.contiguous().to(x.dtype)
        return (gradient * (x.abs() < ctx.width)).clamp(-0.2, 0.2), None


class Mixed(torch.autograd.Function):
    """Two inputs and two outputs, of which the gradients are the author's own."""

    @staticmethod
    def forward(x, weight):
        return x * weight, (x + weight).argmax(1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, gradient, _):
        x, weight, product = ctx.saved_tensors
        of_x = gradient * weight.cos() + product if ctx.needs_input_grad[0] else None
        return of_x, (gradient * x).sum(0) if ctx.needs_input_grad[1] else None


class Marked(torch.autograd.Function):
    """Two outputs of floats, of which the second has no gradient, says the author."""

    @staticmethod
    def forward(ctx, x):
        marked = 3 * x
        ctx.mark_non_differentiable(marked)
        return 2 * x, marked

    @staticmethod
    def backward(ctx, gradient, of_marked):
        return 2 * gradient + 3 * of_marked


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Layer(nn.Module):
    """A module of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _of_weight(x):
    return Mixed.apply(x, torch.linspace(0.1, 2, CHANNELS, dtype=x.dtype)[:, None, None])[0]


@torch.no_grad()
def _statistics(x):
    return x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)


def _normalised(x):
    mean, std = _statistics(x)
    return (x - mean) / std


def _grad_on_again(x):
    with torch.no_grad():
        x = x.contiguous().to(x.dtype)  # which is x
        fixed = x.tanh()
        with torch.enable_grad():
            moving = x.square()
        fixed = fixed * moving
    return fixed + moving


def _detached_later(x):
    y = x.square()
    y.detach_()
    return y * x


# Each keeps the shape of what it is given.
OWN_GRADIENTS = {
    "BPDA by the identity": lambda x: StraightThrough.apply(x, 4.0),
    "BPDA by detach": lambda x: x + (torch.round(x * 4) / 4 - x).detach(),
    "clipped backward": lambda x: Clipped.apply(x - 0.5, 0.3),
    "two inputs": _of_weight,
    "an output without gradient": lambda x: sum(Marked.apply(x)),
    "detach of a branch": lambda x: x * x.sigmoid().detach() + x.data,
    "statistics without gradients": _normalised,
    "gradients on again": _grad_on_again,
    "detach in place": _detached_later,
}
WRAPPED = {  # what a hook does is written down
    "hook": lambda m: m.register_forward_hook(lambda m, args, out: out * 3),
    "hook before": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
}
REFUSED = {
    "full backward hook": (
        lambda m: m[0].register_full_backward_hook(lambda m, i, o: (i[0] * 0,)),
        r"^0 has a hook on its gradients \(.*torch_defences\.py, line \d+\), which may change",
    ),
    "hook before backward": (
        lambda m: m.register_full_backward_pre_hook(lambda m, o: (o[0] * 0,)),
        r"^it has a hook on its gradients",
    ),
    "hook of a tensor": (
        lambda m: m.insert(0, Layer(_hooked)),
        r"torch_defences\.py, line \d+ \(x\.register_hook.*a tensor gets a hook",
    ),
    "hook of a tensor where it needs a gradient": (
        lambda m: m.insert(0, Layer(lambda x: _hooked(x) if x.requires_grad else x)),
        r"a tensor gets a hook on its gradient; .*write what it does as the backward pass",
    ),
    "input changed in place by a Function": (
        lambda m: m.insert(0, Layer(lambda x: Dirty.apply(x * 1))),
        r"Function Dirty changes its input in place \(ctx\.mark_dirty\)",
    ),
    "change in place without gradients": (
        lambda m: m.insert(0, Layer(_in_place)),
        r"torch_defences\.py, line \d+ .*aten\.clamp_.* changes a tensor in place under",
    ),
    "noise of NumPy's": (
        lambda m: m.insert(0, Layer(_noise_of_numpy)),
        r"two passes of the PyTorch module on the same images differ.*NumPy or Python",
    ),
    "a rare coin of Python's": (
        lambda m: m.insert(0, Layer(_rarely_by_python)),
        r"two passes .* differ in their random draws: .*NumPy or Python",
    ),
    "a rare coin of PyTorch's": (
        lambda m: m.insert(0, Layer(_rarely)),
        r"data-dependent expression .*torch_defences\.py, line \d+",
    ),
    "state": (
        lambda m: m.insert(0, Remembering()),
        r"two passes .* differ: .*keeps state between passes",
    ),
    "a batch": (
        lambda m: m.insert(0, Layer(lambda x: x - x.mean(0))),
        r"depends on the other images of its batch: with 4 and with 2 images",
    ),
    "the number of images": (
        lambda m: m.insert(0, Layer(lambda x: x / x.shape[0])),
        r"depends on the other images of its batch",
    ),
    "a question to the images": (
        lambda m: m.insert(0, Layer(lambda x: x if (x.mean((0, 2, 3)) < 9).all() else -x)),
        r"data-dependent",
    ),
    "randomness": (
        lambda m: m.insert(0, Layer(lambda x: x + torch.randn_like(x))),
        r"randn_like.* draws random numbers .*If it is a randomized defense, give "
        r"--version=rand",
    ),
}


def _hooked(x):
    x = x * 1
    x.register_hook(lambda gradient: gradient * 0)
    return x


def _in_place(x):
    x = x * 2
    with torch.no_grad():
        x.clamp_(0, 1)
    return x


_NUMPY = np.random.default_rng(0)


def _rarely_by_python(x):
    """Negate the images in one pass of ten million, which no two passes show."""
    return x if random.random() > 1e-7 else -x


def _rarely(x):
    return x if torch.rand(()).item() > 1e-7 else -x


def _noise_of_numpy(x):
    """Add noise that torch.export takes for a constant, and that is nowhere else the same."""
    noise = _NUMPY.normal(0, 0.01, (CHANNELS, SIDE, SIDE)).astype(np.float32)
    return x + torch.from_numpy(noise).to(x.dtype)


REFUSED_NOISE = _noise_of_numpy


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(CHANNELS, 1, 1))

    def forward(self, x):
        self.seen.add_(0.1)
        return x * self.seen


class Asking(nn.Module):
    """Asks its own numbers, which no image changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        mean = torch.as_tensor([0.5, 0.4, 0.3], dtype=x.dtype)
        if (self.std == 0).any() or torch.equal(mean, torch.zeros(3, dtype=x.dtype)):
            raise ValueError("divides by zero")
        x = (x - mean[:, None, None]) / self.std[:, None, None].to(x.dtype)
        return x * self.scale.item() if bool(self.scale > 1) else x


def network(*layers) -> nn.Sequential:
    """Return layers that keep shapes, nested between convolutions, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        nn.Sequential(nn.Tanh(), *layers),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        nn.Flatten(),
        nn.Linear(CHANNELS * SIDE**2, CLASSES),
    ).eval()


class Several(nn.Module):
    """All of some functions on the same images, one after the other: one export for many cases."""

    def __init__(self, functions):
        super().__init__()
        self.networks = nn.ModuleList(network(Layer(function)) for function in functions)

    def forward(self, x):
        return torch.cat([net(x) for net in self.networks], 1)


# --- What draws ---

DRAWS = {
    "dropout": lambda x: nn.functional.dropout(x, 0.3, True),
    "dropout of channels": lambda x: nn.functional.dropout2d(x, 0.3, True),
    "alpha dropout": lambda x: nn.functional.alpha_dropout(x, 0.3, True),
    "dropout in attention": lambda x: nn.functional.scaled_dot_product_attention(
        x, x, x, None, 0.3
    ),
    "rand_like": lambda x: x + torch.rand_like(x),
    "randn_like": lambda x: x * torch.randn_like(x),
    "randn": lambda x: x + torch.randn(x.shape),
    "one rand for a batch": lambda x: x + torch.rand(1, CHANNELS, 1, 1),
    "normal_": lambda x: x + torch.empty_like(x).normal_(1, 2),
    "uniform_": lambda x: x + torch.empty_like(x).uniform_(-1, 2),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.4),
    "bernoulli_ of a tensor": lambda x: x * torch.empty_like(x).bernoulli_(x.sigmoid()),
    "normal of tensors": lambda x: x + torch.normal(x, x.abs()),
    "normal of a tensor": lambda x: x + torch.normal(x, 0.1),
    "normal of deviations": lambda x: x + torch.normal(0.0, x.abs()),
    "normal of numbers": lambda x: x + torch.normal(1.0, 2.0, x.shape),
    "randint": lambda x: x + torch.randint(1, 4, x.shape),
    "randint below": lambda x: x + torch.randint(4, (1,)),
    "randint_like": lambda x: x + torch.randint_like(x, 1, 4),
    "randint_like below": lambda x: x + torch.randint_like(x, 4),
    "randperm": lambda x: x[:, torch.randperm(CHANNELS)],
    "multinomial": lambda x: x + torch.multinomial(torch.tensor([0.2, 0.5, 0.3]), 1)[0],
    "multinomial again": lambda x: x + torch.multinomial(torch.ones(3), 6, True),
    "exponential_": lambda x: x + torch.empty_like(x).exponential_(2.0),
    "log_normal_": lambda x: x + torch.empty_like(x).log_normal_(0, 0.5),
    "geometric_": lambda x: x + torch.empty_like(x).geometric_(0.3),
    "cauchy_": lambda x: x + torch.empty_like(x).cauchy_(),
    "poisson": lambda x: x + torch.poisson(x.detach().abs()),
    "Gumbel softmax": lambda x: nn.functional.gumbel_softmax(x, dim=1, hard=True),
}
