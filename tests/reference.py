"""Reference networks for tests: seeded weights of a state-dict listing, and timm with our stems."""

import sys

import numpy as np


def seeded_weights(listing) -> dict[str, np.ndarray]:
    """The weights of the golden logits: rule in section 7 of the facts of the main paper."""
    weights = {}
    for i, line in enumerate(listing.read_text().splitlines()):
        name, dimensions, _ = line.split("\t")
        shape = tuple(int(d) for d in dimensions.split(",")) if dimensions else ()
        last = name.split(".")[-1]
        if name.startswith("normalize."):
            value = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}[last]
            weights[name] = np.array(value, np.float32).reshape(shape)
            continue
        z = np.random.RandomState(1000 + i).standard_normal(shape)
        if last == "gamma":
            z = 0.5 + 0.1 * z
        elif z.ndim >= 2:
            z = z / np.sqrt(np.prod(shape[1:]))
        elif last == "weight":
            z = 1 + 0.1 * z
        else:
            z = 0.1 * z
        weights[name] = z.astype(np.float32)
    return weights


def golden_images() -> np.ndarray:
    """f32[2,224,224,3], the input of the golden logits."""
    images = np.random.RandomState(7).random_sample((2, 3, 224, 224)).astype(np.float32)
    return images.transpose(0, 2, 3, 1)


def import_timm():
    """timm; with a CPU build of torch, torchvision's two operators must be declared first."""
    import torch

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


def timm_convnext(size: str, stem: tuple[tuple[int, int], ...] = (), **options):
    """timm's ConvNeXt (`tiny`, `small`, ...); `stem`: (width, stride) of 3x3 ConvStem layers."""
    timm = import_timm()
    import torch
    from timm.layers import LayerNorm2d

    net = timm.create_model(f"convnext_{size}", pretrained=False, **options)
    if stem:
        layers: list[torch.nn.Module] = []
        ins = 3
        for out, stride in stem:
            conv = torch.nn.Conv2d(ins, out, 3, stride=stride, padding=1)
            layers += [conv, LayerNorm2d(out, eps=1e-6), torch.nn.GELU()]
            ins = out
        net.stem = torch.nn.Sequential(*layers)
    return net.eval()
