"""`python tools/bench/torch_networks_32px.py preact_resnet18`: PyTorch networks to attack at 32 px.

Trains a network for some minutes on CIFAR-10 against FGSM from a random start, so that it is robust
on some images, and writes its state dict to `runs/torch/NAME.pt`. Then

    python tools/bench_autoattack.py --network tools/bench/torch_networks_32px.py:preact_resnet18

attacks it. Without the state dict, the weights are random.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxrobust.publish import torch_networks
from jaxrobust.runtime.commandline.arguments import Arguments

WEIGHTS = ROOT / "runs/torch"
EPSILON, STEP = 8 / 255, 10 / 255
BATCH, LR = 32, {"preact_resnet18": 0.05, "wrn_28_10": 0.1, "vit": 1e-3}


class _Block(nn.Module):
    """Two 3x3 convolutions after batch norm and ReLU; the shortcut reads what the first reads."""

    def __init__(self, ins: int, width: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(ins), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(ins, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = stride > 1 or ins != width
        self.shortcut = nn.Conv2d(ins, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Any) -> Any:
        h = self.norm1(x).relu()
        kept = x if self.shortcut is None else self.shortcut(h)
        return kept + self.conv2(self.norm2(self.conv1(h)).relu())


def _preact_resnet(stem: int, depths: tuple[int, ...], widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, 1, 1, bias=False)]
    ins = stem
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for block in range(depth):
            layers.append(_Block(ins, width, 2 if stage and not block else 1))
            ins = width
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.BatchNorm2d(ins), nn.ReLU(), *pooled, nn.Linear(ins, 10))


def _trained(name: str, net: nn.Module) -> nn.Module:
    path = WEIGHTS / f"{name}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def preact_resnet18() -> nn.Module:
    """Return PreActResNet-18 (11.2M parameters), as in RobustBench at 32 px."""
    net = _preact_resnet(64, (2, 2, 2, 2), (64, 128, 256, 512))
    return _trained("preact_resnet18", net)


def wrn_28_10() -> nn.Module:
    """Return WideResNet-28-10 (36.5M parameters)."""
    return _trained("wrn_28_10", _preact_resnet(16, (4, 4, 4), (160, 320, 640)))


def vit() -> nn.Module:
    """Return timm's ViT-Ti with 6 blocks and patches of 4 pixels (2.7M parameters)."""
    timm, size = torch_networks.import_timm(), {"img_size": 32, "patch_size": 4}
    net = timm.create_model("vit_tiny_patch16_224", depth=6, num_classes=10, **size)
    return _trained("vit", net)


NETWORKS = {"preact_resnet18": preact_resnet18, "wrn_28_10": wrn_28_10, "vit": vit}


def _batches(images: Any, labels: Any, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    while True:
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = torch.from_numpy(order[start : start + BATCH])
            x = images[chosen]
            mirrored = torch.from_numpy(rng.random(BATCH) < 0.5)
            yield torch.where(mirrored[:, None, None, None], x.flip(3), x), labels[chosen]


def _attacked(net: nn.Module, x: Any, y: Any) -> Any:
    """Return the images after one step from a random point (Wong et al. 2020, arXiv 2001.03994)."""
    delta = torch.empty_like(x).uniform_(-EPSILON, EPSILON).requires_grad_()
    loss = functional.cross_entropy(net((x + delta).clamp(0, 1)), y)
    (gradient,) = torch.autograd.grad(loss, delta)
    delta = (delta.detach() + STEP * gradient.sign()).clamp(-EPSILON, EPSILON)
    return (x + delta).clamp(0, 1)


def train(name: str, images: Any, labels: Any, minutes: float) -> nn.Module:
    """Train `NETWORKS[name]` on images f32[N,3,32,32]; the rate rises and falls with time."""
    torch.manual_seed(0)
    net = NETWORKS[name]().train()
    values = net.parameters()
    optimizer: Any = (
        torch.optim.AdamW(values, weight_decay=0.05)
        if name == "vit"
        else torch.optim.SGD(values, lr=LR[name], momentum=0.9, nesterov=True, weight_decay=5e-4)
    )
    start, end = time.perf_counter(), 60 * minutes
    stream = _batches(images, labels, np.random.default_rng(0))
    for step, (x, y) in zip(itertools.count(1), stream, strict=False):
        part = (time.perf_counter() - start) / end
        if part >= 1:
            break
        optimizer.param_groups[0]["lr"] = LR[name] * min(part / 0.2, (1 - part) / 0.8)
        attacked = _attacked(net, x, y)
        logits = net(attacked)
        optimizer.zero_grad()
        loss = functional.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            right = (logits.argmax(1) == y).float().mean()
            figures = f"{60 * part * minutes:5.0f} s  loss {loss:.3f}  robust {right:.2f}"
            print(f"{step:5} {figures}", flush=True)
    return net.eval()


def main() -> None:
    from jaxrobust.data.stream import arrays

    parser = Arguments(__doc__)
    parser.add_argument("name", choices=NETWORKS, help="Network to train.")
    parser.flag("minutes", type=float, default=10.0, help="Minutes of training; %(default)s.")
    parser.flag("data_dir", help="Folder of CIFAR-10 in TFDS' layout.")
    args: argparse.Namespace = parser.parse_args()
    loaded = arrays.load("cifar10", split="train", data_dir=args.data_dir)
    images = torch.from_numpy(np.ascontiguousarray(loaded.images.transpose(0, 3, 1, 2)))
    net = train(args.name, images, torch.from_numpy(loaded.labels).long(), args.minutes)
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), WEIGHTS / f"{args.name}.pt")
    print(f"wrote {WEIGHTS / args.name}.pt")


if __name__ == "__main__":
    main()
