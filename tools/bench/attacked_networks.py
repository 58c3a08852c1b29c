"""The networks that `bench_autoattack.py` attacks, in JAX and in PyTorch."""

from pathlib import Path
from typing import Any

_GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden/attacks"


def our_network(name: str, *, converted: bool) -> Any:
    """Return a logits_fn with its weights as arguments: ours, or PyTorch's in JAX."""
    if not converted:
        return _our_network(name)
    import numpy as np

    from jaxrobust.interop.torch import from_module

    images = np.zeros((2, 32, 32, 3), np.float32)
    return from_module(their_network(name), images, compare=False)[0]


def their_network(name: str) -> Any:
    if name == "golden":
        net = _golden_in_torch()
    elif name == "convnext_n":
        from tests.support import torch_modules

        net = torch_modules.network(name, num_classes=10, img_size=32)
    else:
        from jaxrobust.runtime.commandline import functions

        return functions.find("--network", name).function().requires_grad_(False)
    return net.eval().requires_grad_(False)


def _our_network(name: str) -> Any:
    import jax
    import jax.numpy as jnp
    import numpy as np

    if name != "golden":
        from jaxrobust import models

        net = models.create(name, num_classes=10, image_size=32)
        params, stats = net.init(jax.random.key(0))
        return jax.tree_util.Partial(lambda p, s, x: net.apply(p, s, x)[0], params, stats)
    weights = {k: jnp.asarray(v) for k, v in np.load(_GOLDEN / "nets.npz").items()}

    def apply(w, x):
        x = (x - w["mean"]) / w["std"]
        for i in "123":
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, w[f"conv{i}_w_hwio"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout
            )
            x = jax.nn.gelu(x + w[f"conv{i}_b"], approximate=False)
        x = x.reshape(x.shape[0], -1) @ w["fc1_w_hwc"] + w["fc1_b"]
        return jax.nn.gelu(x, approximate=False) @ w["fc2_w"] + w["fc2_b"]

    return jax.tree_util.Partial(apply, weights)


def _golden_in_torch() -> Any:
    import numpy as np
    import torch
    from torch import nn

    class Normalize(nn.Module):
        def forward(self, x):
            return (x - w["mean"].view(1, -1, 1, 1)) / w["std"].view(1, -1, 1, 1)

    w = {k: torch.tensor(v) for k, v in np.load(_GOLDEN / "nets.npz").items()}
    layers: list[nn.Module] = [Normalize()]
    for i in "123":
        kernel = w[f"conv{i}_w_hwio"].permute(3, 2, 0, 1)
        conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, stride=2, padding=1)
        conv.load_state_dict({"weight": kernel.contiguous(), "bias": w[f"conv{i}_b"]})
        layers += [conv, nn.GELU()]
    first, second = nn.Linear(1024, 24), nn.Linear(24, 10)
    chw = w["fc1_w_hwc"].reshape(4, 4, 64, 24).permute(3, 2, 0, 1).reshape(24, 1024)
    first.load_state_dict({"weight": chw.contiguous(), "bias": w["fc1_b"]})
    second.load_state_dict({"weight": w["fc2_w"].T.contiguous(), "bias": w["fc2_b"]})
    return nn.Sequential(*layers, nn.Flatten(), first, nn.GELU(), second)
