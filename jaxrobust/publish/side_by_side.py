"""Two implementations of one network compared: logits, input gradients and attacks."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxrobust import attacks, models
from jaxrobust.data import evaluation_transform
from jaxrobust.data.splits import balance
from jaxrobust.models.modules import positions
from jaxrobust.publish.references import Network

EPSILON = 4 / 255
IMAGES, ATTACKED = 8, 4  # attacks cost most
STEPS, THEIR_STEPS = 10, 9  # `torch_networks.apgd` goes to 9
AT_ONCE = 2  # images; a large network in float64 needs gigabytes for more


class Side(NamedTuple):
    """One of the two networks; images f32[B,H,W,C], labels i64[B], all NumPy."""

    logits_and_gradient: Callable[..., tuple[np.ndarray, np.ndarray]]  # images, labels, dtype
    attack: Callable[..., np.ndarray]  # images, labels


def smooth_images(size: int, channels: int, count: int = IMAGES) -> np.ndarray:
    """Make f32[count,size,size,channels]: seeded noise on a 7x7 grid, interpolated, in 1/255."""
    coarse = np.random.default_rng(0).random((count, channels, 7, 7), np.float32) * 255
    planes = [
        [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in i]
        for i in coarse
    ]
    fine = np.clip(np.rint(planes), 0, 255).transpose(0, 2, 3, 1)
    return fine.astype(np.float32) / np.float32(255)


def photographs(folder: Path, size: int) -> np.ndarray:
    """Read f32[B,size,size,3]: photographs of a folder, spread over its folders, B at most 8."""
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    every = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    _, classes = np.unique([str(path.parent) for path in every], return_inverse=True)
    paths = [every[row] for row in balance.rows(classes, IMAGES)]
    if not paths:
        raise ValueError(f"--images {folder} holds no {', '.join(sorted(suffixes))}")
    transform = evaluation_transform(f"bicubic-{round(size * 256 / 224)}-crop-{size}")
    pixels = np.stack([transform(path.read_bytes()) for path in paths])
    return pixels.astype(np.float32) / np.float32(255)


def jax_side(network: Network) -> Side:
    """Return a network of ours."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in network.options.items()}
    sizes = {"num_classes": network.num_classes, "image_size": network.image_size}
    can_scan = network.name in models.available() and "scan" in models.variant(network.name)._fields
    # Equal blocks are compiled once: eight blocks of InternImage-T take minutes and gigabytes else.
    compiled = {"scan": True} if can_scan else {}
    fields = tuple((sizes | {"in_channels": network.in_channels} | options | compiled).items())

    @functools.cache
    def weights(dtype: str):
        parts = (network.params, network.stats)
        return [{k: jnp.asarray(np.asarray(v, dtype)) for k, v in part.items()} for part in parts]

    def logits_and_gradient(images, labels, dtype):
        one_hot = np.eye(network.num_classes, dtype=dtype)[labels]
        with jax.enable_x64(dtype == "float64"):
            run = _gradient_program(network.name, fields, dtype)
            batch = (jnp.asarray(images.astype(dtype)), jnp.asarray(one_hot))
            (_, logits), gradient = jax.device_get(run(*batch, *weights(dtype)))
        return logits, gradient

    def attack(images, labels):
        batch = (jnp.asarray(images), jnp.asarray(labels.astype(np.int32)))
        run = _attack_program(network.name, fields)
        return np.asarray(run(*batch, *weights("float32")))

    return Side(_in_parts(logits_and_gradient), _in_parts(attack))


@functools.cache  # one program for all weights of a network
def _gradient_program(name: str, fields, dtype: str):
    net = models.create(name, **dict(fields), dtype=dtype)

    def loss(images, one_hot, params, stats):
        with _positions_of_pytorch() if dtype == "float64" else contextlib.nullcontext():
            logits, _ = net.apply(params, stats, images)
        return -(jax.nn.log_softmax(logits) * one_hot).sum(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@contextlib.contextmanager
def _positions_of_pytorch() -> Iterator[None]:
    """Give XCiT's positions PyTorch's rounding of float32 sines, which its float64 network keeps.

    One value in 30 differs from ours by its last bit, and that alone moves float64 logits by 5e-9.
    """
    import torch

    def waves(length: int) -> np.ndarray:
        frequencies = torch.from_numpy((10000 ** (np.arange(0, 32, 2) / 32)).astype(np.float32))
        at = torch.arange(1, length + 1, dtype=torch.float32)
        angles = (at / (at[-1] + 1e-6) * (2 * np.pi))[:, None] / frequencies
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).numpy()

    with mock.patch.object(positions, "waves", waves):
        yield


@functools.cache
def _attack_program(name: str, fields):
    net = models.create(name, **dict(fields))
    apgd = attacks.apgd(norm="linf", epsilon=EPSILON, steps=STEPS)

    def attack(images, labels, params, stats):
        return apgd(lambda x: net.apply(params, stats, x)[0], None, images, labels)

    return jax.jit(attack)


def torch_side(net: Any) -> Side:
    """Return a PyTorch network in evaluation mode."""
    import torch

    from jaxrobust.publish.torch_networks import apgd

    net.requires_grad_(False)

    def tensor(images, dtype):
        nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return torch.from_numpy(nchw).to(getattr(torch, dtype))

    def logits_and_gradient(images, labels, dtype):
        net.to(getattr(torch, dtype))  # to float64 and back gives the same bits
        x = tensor(images, dtype).requires_grad_()
        logits = net(x)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        return logits.detach().numpy(), gradient.numpy().transpose(0, 2, 3, 1)

    def attack(images, labels):
        net.float()
        x, y = tensor(images, "float32"), torch.from_numpy(labels)
        adversarial = apgd(net, x, y, EPSILON, THEIR_STEPS)
        return adversarial.numpy().transpose(0, 2, 3, 1)

    return Side(_in_parts(logits_and_gradient), _in_parts(attack))


def _in_parts(run):
    def whole(images, labels, *more):
        cuts = range(0, len(images), AT_ONCE)
        parts = [run(images[i : i + AT_ONCE], labels[i : i + AT_ONCE], *more) for i in cuts]
        if not isinstance(parts[0], tuple):
            return np.concatenate(parts)
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    return whole


def relative(jax_side: np.ndarray, torch_side: np.ndarray) -> float:
    """Compute max|difference| / max|reference|."""
    return float(np.abs(jax_side.astype(np.float64) - torch_side).max() / np.abs(torch_side).max())


def measured(jax_side: Side, torch_side: Side, images: np.ndarray) -> dict[str, Any]:
    """Measure all differences of two networks on some images, f32[B,H,W,C] in [0, 1]."""
    guess = torch_side.logits_and_gradient(images, np.zeros(len(images), np.int64), "float32")[0]
    labels = guess.argmax(1)
    logits: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    exact: tuple[np.ndarray, np.ndarray] | None = None
    for dtype in ("float64", "float32"):
        here = jax_side.logits_and_gradient(images, labels, dtype)
        there = torch_side.logits_and_gradient(images, labels, dtype)
        exact = exact or there
        logits[dtype] = {
            "absolute": float(np.abs(here[0] - there[0]).max()),
            "relative": relative(here[0], there[0]),
        }
        a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (here[1], there[1]))
        cosines = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
        gradients[dtype] = {
            "relative": relative(here[1], there[1]),
            "cosine": float(cosines.min()),
            "sign_agreement": float((np.sign(here[1]) == np.sign(there[1])).mean()),
        }
        if dtype == "float32":
            logits[dtype]["reference_rounding"] = relative(there[0], exact[0])
            gradients[dtype]["reference_rounding"] = relative(there[1], exact[1])
            logits["top1_agreement"] = float((here[0].argmax(1) == labels).mean())
    transfer = _transfer(jax_side, torch_side, images[:ATTACKED], labels[:ATTACKED])
    return {"logits": logits, "gradients": gradients, "transfer": transfer}


def _transfer(jax_side: Side, torch_side: Side, images, labels) -> dict[str, Any]:
    def reached(side: Side, adversarial) -> dict[str, float]:
        logits = side.logits_and_gradient(adversarial, labels, "float32")[0].astype(np.float64)
        shifted = logits - logits.max(1, keepdims=True)
        loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
        return {"fooled": int((logits.argmax(1) != labels).sum()), "loss": float(loss.mean())}

    rows: dict[str, Any] = {"norm": "linf", "epsilon": EPSILON, "images": len(images)}
    for whose, side, steps in (("ours", jax_side, STEPS), ("theirs", torch_side, THEIR_STEPS)):
        adversarial = side.attack(images, labels)
        on = {
            "on_ours": reached(jax_side, adversarial),
            "on_theirs": reached(torch_side, adversarial),
        }
        rows[whose] = {"attack": "apgd-ce", "steps": steps} | on
    return rows
