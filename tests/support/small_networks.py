"""Small networks of every family, with drawn weights: what both sides of each compute of images.

The rows together use every branch of every network, on maps of odd sides where it takes them. What
they compute in PyTorch in float64 is stored in `tests/golden/models/small_networks.json`.
"""

import functools
import inspect
import json
from typing import Any

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.weights.naming import convert
from tests.support import paths, torch_modules

STORED = paths.GOLDEN / "models" / "small_networks.json"
CLASSES = 3
SQUARE = ("cifar_cpvt", "cifar_vitae", "cifar_swin")  # takes any size, but no oblong
_RESNET = {"depths": (2, 1), "planes": (16, 24)}
_PVT = {"dims": (6, 8), "depths": (1, 2), "heads": (1, 2), "ratios": (2, 2), "patch": 2}
_LEVIT = {"dims": (16, 24), "depths": (1, 2), "heads": (2, 3), "key_width": 4}
_INTERN = {"depths": (2, 1), "dims": (8, 12), "groups": (2, 3), "head_dim": 10}
_MOBILE = {"channels": (4, 6, 6), "strides": (1, 1, 2), "dims": (8,), "depths": (2,)}
_VITAE = {"widths": (4, 4), "dims": (4, 8), "ratios": (4, 2), "kernels": (7, 3), "depth": 2}
_VITAE |= {"dilations": (2, 2), "heads": 2, "groups": 4}
# Label -> name, side of the images, options.
ROWS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "convnext": ("convnext_n", 8, {"depths": (2, 1), "dims": (6, 8), "gamma_init": 0.5}),
    "convnext, cvst": (
        *("convnext_n_cvst", 8),
        {"depths": (1, 1), "dims": (6, 8), "stem_widths": (4, 6), "stem_strides": (2, 1)},
    ),
    "convnext, strides": (
        *("convnext_n", 9),
        {"depths": (1, 1, 1), "dims": (4, 6, 8), "downsample_strides": (1, 2)},
    ),
    "convnext, kernels": (
        *("convnext_n_cvst", 9),
        {
            **{"depths": (1,), "dims": (6,), "stem_widths": (4, 6), "stem_strides": (2, 1)},
            "stem_kernels": (5, 3),
        },
    ),
    "internimage": (
        *("internimage_t", 12),
        _INTERN | {"stem_widths": (4, 8), "stem_strides": (2, 1), "gamma_init": 0.5},
    ),
    "internimage, patches": (
        *("internimage_t_ps", 10),
        _INTERN | {"stem_widths": (), "stem_strides": (2,), "offset_scale": 1.5},
    ),
    "iso_convnext": ("iso_convnext_s", 12, {"dim": 8, "depth": 2, "stem_strides": (4,)}),
    "iso_convnext, cvst": (
        *("iso_convnext_s_cvst", 12),
        {"dim": 8, "depth": 1, "stem_widths": (4, 6), "stem_strides": (2, 2)},
    ),
    "resnet": ("resnet18", 25, {"depths": (2, 1), "width": 4, "base": 4}),
    "resnet, bottlenecks": (
        *("resnet50", 33),
        {"depths": (2, 1, 1), "width": 4, "base": 6},
    ),
    "resnet, small stem": (
        *("resnet50_gelu", 9),
        {"depths": (1, 1), "width": 8, "base": 4, "small_stem": True},
    ),
    "resnet, wide": ("wide_resnet50_2", 9, {"depths": (1,), "width": 8, "base": 4}),
    "vit": ("vit_s", 12, {"dim": 12, "depth": 2, "heads": 3, "stem_strides": (4,)}),
    "vit, cvst": (
        *("vit_s_cvst", 12),
        {
            **{"dim": 8, "depth": 1, "heads": 2, "stem_widths": (4, 6), "stem_strides": (2, 2)},
        },
    ),
    "vit, scaled": (
        *("vit_m", 8),
        {"dim": 8, "depth": 2, "heads": 2, "stem_strides": (2,), "gamma_init": 0.5},
    ),
    "cait": (
        *("cait_s12", 12),
        {"dim": 12, "depth": 2, "heads": 3, "stem_strides": (4,), "class_depth": 2},
    ),
    "xcit": ("xcit_s12", 12, {"dim": 8, "depth": 2, "heads": 2, "stem_strides": (2, 2)}),
    "xcit, plain class token": (
        *("xcit_n12", 12),
        {"dim": 12, "depth": 1, "heads": 3, "stem_strides": (1, 2, 2)},
    ),
    "swin": (
        *("swin_b", 10),
        {"dim": 6, "depths": (2, 1), "heads": (1, 2), "patch": 2, "window": 3},
    ),
    "swin, one window": (
        *("swin_b", 12),
        {"dim": 8, "depths": (2, 2), "heads": (2, 4), "patch": 2, "window": 4},
    ),
    "robust_resnet, plain": ("wrn_28_10", 9, {"depths": (2, 1), "widths": (1, 1)}),
    "robust_resnet": (
        *("robustresnet_a1", 9),
        {"depths": (2, 1), "planes": (16, 32), "scales": 4, "se_reduction": 16},
    ),
    "robust_resnet, bottleneck": (
        *("wrn_28_10", 9),
        {
            **_RESNET,
            **{"widths": (), "block": "bottleneck", "se": "standard", "se_reduction": 16},
            **{"norm": "group", "activation": "silu", "preact": False},
        },
    ),
    "robust_resnet, aggregated": (
        *("wrn_28_10", 9),
        {
            **{"depths": (2, 1), "planes": (16, 32), "widths": (), "block": "aggregated"},
            **{"se": "conv3x3", "se_reduction": 16, "base_width": 25, "groups": 2},
            **{"activation": "softplus"},
        },
    ),
    "robust_resnet, inverted": (
        *("wrn_28_10", 9),
        {
            **{"depths": (2, 1), "planes": (16, 24), "widths": (), "block": "inverted"},
            **{"se": "identity", "se_reduction": 8, "norm": "layer", "first_conv": "raw"},
            **{"activation": "gelu"},
        },
    ),
    "robust_resnet, no shortcut": (
        *("wrn_28_10", 9),
        {
            **{"depths": (2, 1), "planes": (16, 32), "widths": (), "block": "hierarchical"},
            **{"scales": 2, "groups": 2, "base_width": 20, "residual": False},
            **{"norm": "instance"},
        },
    ),
    "racl": ("racl_7_104", 8, {"channels": 4, "cells": 3}),
    "advrush": ("advrush_7_96", 8, {"channels": 4, "cells": 5}),
    "robnet": ("robnet_large_v2", 8, {"channels": 4, "cells": 3}),
    "cifar_vgg": ("cifar_vgg16", 8, {"widths": (4, 6)}),
    "cifar_wide_resnet": (
        *("cifar_wrn_40_10", 9),
        {"depths": (2, 1), "width": 1, "dropout": 0.0},
    ),
    "cifar_densenet": ("cifar_densenet", 9, {"depths": (2, 1), "growth": 4, "stem": 6}),
    "cifar_preact_resnet": ("cifar_preactresnet50", 9, {"depths": (2, 1), "width": 4}),
    "cifar_densenet, 224 px": (
        *("cifar_densenet_224", 17),
        {"depths": (1, 2), "growth": 4, "stem": 6, "activation": "gelu"},
    ),
    "cifar_preact_resnet, 224 px": (
        *("cifar_preactresnet50_224", 17),
        {"depths": (1, 1, 1), "width": 2, "activation": "silu"},
    ),
    "cifar_resnext": ("cifar_resnext29", 9, {"depths": (2, 1), "width": 4}),
    "dm_wide_resnet": ("dm_wrn_28_10", 8, {"depths": (2, 1), "channels": (6, 10), "stem": 4}),
    "dm_wide_resnet, robust": (
        *("ra_wrn_70_16", 8),
        {
            **{"depths": (2, 1), "channels": (8, 12), "stem": 4, "se_ratio": 0.5},
            "bn_momentum": 0.1,
        },
    ),
    "ra_resnet": ("ra_wrn_101_2", 17, {"depths": (2, 1), "channels": (16, 24), "stem": 8}),
    "dm_preact_resnet": ("dm_preactresnet18", 9, {"depths": (2, 1), "width": 6}),
    "cifar_vit": (
        *("cifar_vit", 8),
        {"dim": 12, "depth": 2, "heads": 3, "hidden": 8, "dropout": 0.0},
    ),
    "cifar_mixer": ("cifar_mixer", 8, {"dim": 12, "depth": 2, "token_hidden": 6, "hidden": 8}),
    "cifar_poolformer": (
        *("cifar_poolformer", 9),
        {"depths": (1, 2), "dims": (8, 12), "gamma_init": 0.5},
    ),
    "cifar_cpvt": (
        *("cifar_cpvt", 12),
        {"dim": 12, "depth": 2, "heads": 3, "hidden": 8, "dropout": 0.0},
    ),
    "cifar_cct": (
        *("cifar_cct", 9),
        {
            "dim": 12,
            "depth": 2,
            "heads": 3,
            "hidden": 8,
            "attention_dropout": 0.0,
            "drop_path": 0.0,
        },
    ),
    "cifar_botnet": (
        "cifar_botnet50",
        8,
        {"depths": (1, 2), "width": 4, "heads": 2, "dropout": 0.0},
    ),
    "cifar_ceit": ("cifar_ceit", 16, {"dim": 8, "depth": 2, "heads": 2, "stem_width": 4}),
    "cifar_levit": ("cifar_levit", 8, _LEVIT | {"stem_strides": (1, 1, 1, 1)}),
    "cifar_mobilevit": ("cifar_mobilevit", 8, _MOBILE | {"ratios": (2,), "heads": 2}),
    "cifar_vitae": ("cifar_vitae", 8, _VITAE),
    "cifar_coatnet": (
        *("cifar_coatnet", 8),
        {"dims": (8, 8, 8), "depths": (1, 2, 1), "order": "CT", "heads": 2, "head_dim": 4},
    ),
    "cifar_pvt_v2": ("cifar_pvt_v2", 8, _PVT),
    "cifar_swin": (
        *("cifar_swin", 8),
        {"dim": 6, "depths": (2, 2), "heads": (1, 2), "merges": (2,), "window": 2, "patch": 1},
    ),
    "cifar_cvt": (
        *("cifar_cvt", 10),
        {"dims": (8, 12), "depths": (1, 2), "heads": (1, 2), "head_dim": 4},
    ),
}


def options(label: str) -> dict[str, Any]:
    """What `models.create` is given for a row."""
    _, side, own = ROWS[label]
    return {"num_classes": CLASSES, "image_size": side} | own


def images(label: str) -> np.ndarray:
    """Return f64[4,H,W,3] in [0, 1], wider than high where a network takes such ones."""
    name, side, _ = ROWS[label]
    wide = models.family(name).any_size and name not in SQUARE
    return np.random.default_rng(7).random((4, side, side + 8 * wide, 3))


def made(label: str) -> Any:
    """Return a row's network in PyTorch in float64, with seeded weights and statistics."""
    import torch

    name, side, own = ROWS[label]
    model = torch_modules.module(models.family(name).file).model
    row = torch_modules.row(name, **own) | {"num_classes": CLASSES}
    if "image_size" in inspect.signature(model).parameters:
        row["image_size"] = side
    with torch.random.fork_rng():
        net = model(**row).double()
    net.load_state_dict({k: torch.from_numpy(v) for k, v in weights(net.state_dict()).items()})
    return net


def drawn(label: str) -> dict[str, np.ndarray]:
    """Return the weights of a row's stored numbers, under PyTorch's names."""
    name, _, own = ROWS[label]
    net = models.create(name, **options(label))
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    shapes = {key: np.zeros(a.shape, np.float32) for key, a in (params | stats).items()}
    return weights(convert.reference_names(name, shapes, wrapped=False, **own))


def weights(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draw weights, f64, for the names and shapes of a state dict, each seeded by its place."""
    found = {}
    for place, (name, value) in enumerate(state.items()):
        shape, last = tuple(value.shape), name.split(".")[-1]
        value = np.asarray(value)
        if value.dtype.kind != "f" or not np.isfinite(value).all():  # places, or a mask
            found[name] = value.astype(np.float64) if value.dtype.kind == "f" else value
            continue
        z = np.random.default_rng([3, place]).standard_normal(shape)
        if last == "running_var":
            z = 0.5 + np.abs(z)
        elif last.startswith("gamma") or last == "temperature" or "gamma" in name:
            z = 0.7 + 0.2 * z
        elif z.ndim >= 2:
            z = 1.5 * z / np.sqrt(np.prod(shape[1:])) if "token" not in last else 0.5 * z
        else:
            z = (1.0 if last == "weight" else 0.0) + 0.2 * z
        found[name] = z
    return found


def in_pytorch(label: str) -> dict[str, Any]:
    """Return logits in evaluation and in training, and what training made of the statistics."""
    import torch

    net = made(label)
    x = torch.from_numpy(images(label).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        evaluated = net.eval()(x).numpy()
        for part in net.modules():  # and no dropout, which draws
            part.train(isinstance(part, torch.nn.modules.batchnorm._NormBase))
        trained = net(x).numpy()
    moved = {k: v.numpy() for k, v in net.state_dict().items() if "running" in k}
    return {
        "evaluated": evaluated.round(9).tolist(),
        "trained": trained.round(9).tolist(),
        "moved": {name: round(weighed(value), 9) for name, value in moved.items()},
    }


def weighed(value: np.ndarray) -> float:
    """Return one number of an array, which knows the places of its numbers."""
    return float((np.cos(np.arange(value.size)) * value.reshape(-1)).sum())


@functools.cache
def stored() -> dict[str, dict[str, Any]]:
    """Return what is stored of every row."""
    return json.loads(STORED.read_text())


def main() -> None:
    """Store anew what PyTorch computes."""
    rows = {label: in_pytorch(label) for label in ROWS}
    lines = (f"{json.dumps(label)}: {json.dumps(row)}" for label, row in rows.items())
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
