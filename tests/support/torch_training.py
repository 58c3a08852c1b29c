"""timm's networks trained here and by PyTorch: three updates from the same weights, in float64."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxrobust.pytorch import trainable as trained
from jaxrobust.pytorch.networks import torch_fusions, torch_kernels
from jaxrobust.pytorch.reading import exporting
from jaxrobust.pytorch.reading.training_mode import trainable
from jaxrobust.types import Params
from tests.support import torch_families

SIDE, IMAGES, CLASSES = 64, 3, 10
# Where parts of timm's networks are made for one size, or images of 64 leave nothing to pool.
SIDES = {
    "bat_resnext26ts": 256,
    "crossvit_9_240": 240,
    "efficientformer_l1": 224,
    "halonet26t": 256,
    # Three numbers a channel in a batch norm magnify rounding, PyTorch's own too.
    "inception_resnet_v2": 160,
    "inception_v3": 160,
    "inception_v4": 160,
    "levit_128s": 96,
    "convmixer_768_32": 160,
    "efficientvit_m0": 128,
    "selecsls42": 96,
}
_SIZED = "img_size"  # timm's word for the side that a network is made for
_RATES = "drop_prob", "drop_rate"  # of draws
_DROPOUTS = torch.nn.modules.dropout._DropoutNd
# What an update takes off the loss, were it straight: larger ones magnify rounding tenfold each.
_DECREASE = 0.01
_UPDATES = 3
# Of 32 norms in a row: PyTorch's own move as far when the images move by a unit of rounding.
STATISTICS = {"convmixer_768_32": 1e-11}
# PyTorch's batch norm adds up in one row: after the first pass its running statistics are 1.3e-12
# off those computed in 80 bits, and ours 2.7e-13. By the sums of its `mean` both agree to 5e-13.
PRECISE = ("inception_v4",)
WIDE = ("crossvit_9_240",)  # it resizes images with numbers that depend on their sides alone
# name -> what is said of its default, whose bias of positions has a dropout of rate 1/8; at rate 0
# both agree with PyTorch to 2e-15.
_DROPS = (
    r"layers.mlp.py, line 44 .*native_dropout.default draws .*the same for all images of a batch"
)
REFUSED = {"swinv2_cr_tiny_ns_224": _DROPS, "vit_relpos_small_patch16_224": _DROPS}
# Networks of hundreds of layers compile for minutes at XLA's best, and run for a second.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Differences(NamedTuple):
    """The largest differences from PyTorch's over all updates."""

    gradients: float  # of the largest gradient of all parameters
    statistics: float  # of each buffer's largest number
    losses: tuple[float, ...]  # ours, before each update


def network(name: str) -> tuple[torch.nn.Module, int]:
    """Return a network of timm's in float64, and the side of its images."""
    side = SIDES.get(name, SIDE)
    try:
        return torch_families.network(name, num_classes=CLASSES, **{_SIZED: side}), side
    except TypeError:  # it takes images of every size
        return torch_families.network(name, num_classes=CLASSES), side


def differences(
    made: torch.nn.Module, side: int, *, wide: bool = False, precise: bool = False
) -> Differences:
    """Train a module in both, for images of a side; `ValueError`: it is refused here.

    What it draws is read, and then left out: PyTorch draws other numbers. `wide`: the constants of
    its program are written down in float64; `precise`: PyTorch's batch norms add up as its `mean`.
    """
    written = _written(made, side, wide)
    if _silenced(made):
        written = _written(made, side, wide)
    theirs = _widened(made).train()
    precisely = mock.patch.object(torch.nn.functional, "batch_norm", _batch_norm)
    sums = precisely if precise else contextlib.nullcontext()
    rng = np.random.default_rng(0)
    x, labels = rng.random((IMAGES, side, side, 3)), np.arange(IMAGES) % CLASSES
    losses, worst, worst_of_stats = [], 0.0, 0.0
    with jax.enable_x64(True):
        params, stats = _wide(written)
        step = _update(written, x, labels, params, stats)
        for _ in range(_UPDATES):
            params, stats, grads, loss = step(params, stats)
            losses.append(float(loss))
            with sums:
                wanted = _their_update(theirs, x, labels)
            largest = max(np.abs(a).max() for a in wanted.values())
            apart = [np.abs(np.asarray(grads[name]) - a).max() for name, a in wanted.items()]
            worst = max(worst, *(_number(a / largest) for a in apart))
            for name, buffer in theirs.named_buffers():
                if name in stats:
                    want = buffer.numpy()
                    error = np.abs(np.asarray(stats[name]) - want).max() / (np.abs(want).max() or 1)
                    worst_of_stats = max(worst_of_stats, _number(error))
    return Differences(worst, worst_of_stats, tuple(losses))


def _written(made: torch.nn.Module, side: int, wide: bool) -> trained.Trainable:
    if not wide:
        return trainable(made.float(), (side, side, 3))
    with mock.patch.object(exporting, "check"):  # which asks for float32
        return trainable(made.double(), (side, side, 3))


def _silenced(module: torch.nn.Module) -> bool:
    """Set all rates of draws to 0, and tell whether one was not."""
    rates = [
        (part, name)
        for part in module.modules()
        for name in (*_RATES, *(["p"] if _drops(part) else []))
        if isinstance(getattr(part, name, None), float) and getattr(part, name) > 0
    ]
    for part, name in rates:
        setattr(part, name, 0.0)
    return bool(rates)


def _drops(part: torch.nn.Module) -> bool:
    """Whether `p` is the rate of a dropout, or of torchvision's drop path."""
    return isinstance(part, _DROPOUTS) or type(part).__name__ == "StochasticDepth"


def _widened(module: torch.nn.Module) -> torch.nn.Module:
    """Return a module in float64, with the numbers that some keep as plain attributes."""
    for part in module.double().modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                setattr(part, name, value.double())
    return module


def _number(error: Any) -> float:
    return float("inf") if np.isnan(error) else float(error)


def _wide(written: trained.Trainable) -> list[Params]:
    made = trained.classifier(written).init(jax.random.key(0))
    return [{name: jnp.asarray(a, jnp.float64) for name, a in group.items()} for group in made]


def _update(
    written: trained.Trainable, x: np.ndarray, labels: np.ndarray, params: Params, stats: Params
) -> Any:
    kernels = torch_kernels.KERNELS | torch_fusions.KERNELS
    net = trained.classifier(written, trained.Faster(kernels, (), torch_fusions.fused))
    images, chosen = jnp.asarray(x), jnp.eye(CLASSES)[labels]

    def update(params: Params, stats: Params) -> Any:
        def cross_entropy(params: Params) -> Any:
            logits, after = net.apply(params, stats, images, train=True)
            return -(jax.nn.log_softmax(logits) * chosen).sum(1).mean(), after

        (loss, after), grads = jax.value_and_grad(cross_entropy, has_aux=True)(params)
        rate = _DECREASE / jnp.stack([jnp.square(a).sum() for a in grads.values()]).sum()
        moved = {name: p - rate * grads[name] for name, p in params.items()}
        return moved, after, grads, loss

    return jax.jit(update).lower(params, stats).compile(compiler_options=_QUICK)


def _their_update(
    module: torch.nn.Module, x: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Update a module, and return its gradients; zeros of parameters that nothing reads."""
    module.zero_grad()
    with _in_float64():
        logits = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    trained_ones = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained_ones.items()
    }
    rate = _DECREASE / sum(a.square().sum() for a in grads.values())
    with torch.no_grad():
        for name, parameter in trained_ones.items():
            parameter -= rate * grads[name]
    return {name: a.numpy() for name, a in grads.items()}


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """Make PyTorch compute in float64 what it or timm's code puts into float32."""
    with (
        mock.patch.object(torch.nn.functional, "hardsigmoid", _hard_sigmoid),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def _batch_norm(x, mean, variance, weight, bias, training, momentum, eps):
    """Normalize as PyTorch's batch norm, whose sums are in one row, by those of `mean`."""
    assert training
    own = x.mean((0, 2, 3), keepdim=True)
    moved = (x - own).square().mean((0, 2, 3), keepdim=True)
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        mean.lerp_(own.flatten(), momentum)
        variance.lerp_(moved.flatten() * count / (count - 1), momentum)
    out = (x - own) / (moved + eps).sqrt()
    return out * weight[:, None, None] + bias[:, None, None]


def _hard_sigmoid(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """PyTorch's own in float64 has a gradient of 1/6 in float32."""
    del inplace
    return (x + 3).clamp(0, 6) / 6
