"""Small modules of PyTorch's that train: every norm, draws, what is frozen, tied or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

from jaxrobust.pytorch import trainable

SIDE, CHANNELS, CLASSES = 8, 3, 5


class Mixed(nn.Module):
    """Every kind of norm, attention, a computed weight, a table of places, and frozen parts."""

    def __init__(self, dropout: float = 0.0, drop_path: float = 0.0, momentum: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, momentum=momentum)
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.groups = nn.GroupNorm(2, 8)
        self.instances = nn.InstanceNorm2d(8, affine=True)
        self.down = parametrizations.weight_norm(nn.Conv2d(8, 8, 2, stride=2))
        self.tokens = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.positions = nn.Parameter(0.1 * torch.randn(17, 8))
        self.register_buffer("places", torch.randperm(16))
        self.register_buffer("scale", torch.full((8,), 1.25))
        self.features = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        x = self.instances(self.groups(self.frozen(x) * self.scale[:, None, None]))
        x = self.down(x).flatten(2).transpose(1, 2) + self.positions[self.places]
        t = self.tokens(x)
        x = x + self._kept(self.dropout(self.attention(t, t, t, need_weights=False)[0]))
        return self.head(self.features(x.mean(1)))

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.drop_path):
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty((x.shape[0], 1, 1)).bernoulli_(keep) / keep


class Tied(nn.Module):
    """Two layers of one matrix, and a counter that no norm has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIDE * SIDE * CHANNELS, CLASSES, bias=False)
        self.second = nn.Linear(SIDE * SIDE * CHANNELS, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(1)
        return self.first(x) + self.second(x.square())


class Draws(nn.Module):
    """Draws alone: dropout of ones, summed, and a path per image."""

    def __init__(self, dropout: float, path: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CLASSES))
        self.dropout, self.path = nn.Dropout(dropout), path

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.dropout(torch.ones_like(images[:, :1, :1, :CLASSES])).flatten(1)
        if self.training:
            x = torch.cat([x, x.new_empty((x.shape[0], 1)).bernoulli_(1 - self.path)], 1)
            return self.weight * x[:, :CLASSES] + 10 * x[:, CLASSES:]
        return self.weight * x


class Various(nn.Module):
    """One of each that a program keeps: statistics, draws, a table of places and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(CHANNELS, CLASSES, SIDE), nn.BatchNorm2d(CLASSES)
        self.register_buffer("places", torch.randperm(CLASSES))
        self.dropout = nn.Dropout(0.2)
        self.inner, self.head = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.inner.weight = self.head.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(images)).flatten(1)[:, self.places]
        return self.head(self.dropout(self.inner(x)))


class Refused(nn.Module):
    """A linear classifier whose pass does one thing more, named by `fault`."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.head = nn.Linear(SIDE * SIDE * CHANNELS, CLASSES)
        self.register_buffer("seen", torch.zeros(()))
        self.fault = fault

    def forward(self, images: torch.Tensor):
        if self.fault == "branch" and images.mean() > 0.5:
            images = images * 2
        if self.fault == "in place":
            images.mul_(0.5)
        if self.fault == "buffer":
            self.seen.add_(images.detach().mean())
        if self.fault == "batch draw" and self.training:
            images = images * torch.rand(())
        if self.fault == "draw":
            images = images + torch.randn_like(images)
        logits = self.head(images.flatten(1))
        return (logits, 2 * logits) if self.fault == "several" else logits


def refused(fault: str) -> nn.Module:
    """A module with a fault of its weights, or of its pass."""
    module = Refused(fault)
    if fault == "half":
        module.half()
    if fault == "complex":
        module.extra = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    if fault == "lazy":
        module.head = nn.LazyLinear(CLASSES)
    if fault == "frozen":
        module.requires_grad_(False)
    if fault == "hook":
        module.head.register_full_backward_hook(lambda part, given, made: None)
    return module


class Block(nn.Module):
    """A residual block with two kinds of norm, a reshape by sizes of its images, and dropout."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width, momentum=0.3)
        self.tokens = nn.LayerNorm(width)
        self.mix = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, channels, height, width = x.shape
        y = torch.relu(self.norm(self.conv(x)))
        y = y.reshape(images, channels, height * width).transpose(1, 2)
        y = self.dropout(self.mix(self.tokens(y)))
        return x + y.transpose(1, 2).reshape(images, channels, height, width)


class Blocks(nn.Module):
    """Two stages of blocks between a stem and a head."""

    def __init__(self, dropout: float = 0.0, depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(CHANNELS, width, 1), nn.BatchNorm2d(width))
        self.stage1 = nn.Sequential(*(Block(width, dropout) for _ in range(depth)))
        self.stage2 = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stage1(self.stem(images))
        for block in self.stage2:
            x = block(x)
        return self.head(x.mean((2, 3)))


def check_faster(network, faster, keys=None, **how) -> None:
    """Logits and all gradients in training are those of the steps one by one, in float64."""
    found = []
    with jax.enable_x64(True):
        for given in ((faster, how), (trainable.Faster(), {})):
            net = trainable.classifier(network, given[0], **given[1])
            params, stats = (
                {name: jnp.asarray(a, jnp.float64) for name, a in group.items()}
                for group in net.init(jax.random.key(0))
            )
            x = jnp.asarray(np.random.default_rng(0).random((3, *network.image)))

            def loss(params, x, net=net, stats=stats):
                logits, _ = net.apply(params, stats, x, train=True, key=keys)
                return jnp.square(logits).sum(), logits

            found.append(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), *found)
