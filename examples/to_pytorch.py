"""A network trained in JAX and evaluated again in PyTorch."""

# %% [markdown]
# First, train a network on digits for a minute, cleanly and then adversarially. (`pip install
# torch`)

# %%
import sys
from pathlib import Path

import jax
import numpy as np
import torch

from jaxrobust import data, evaluation
from jaxrobust.config import base, network_of
from jaxrobust.convert import export_torch
from jaxrobust.training.run import run as training
from jaxrobust.weights.trained import runs

config = base()
config.model.update(name="convnext_n", num_classes=10, image_size=8, in_channels=1)
config.model.options = {"stem_strides": (1,), "dims": (32, 64, 128)}
config.data.update(name="digits", train_split="train[:90%]", augmentation="none")
config.data.update(selection_split="train[90%:]", test_split="test")
config.attack.update(epsilon=0.1, steps=3)
config.pretrain.update(epochs=4, batch_size=64, warmup_epochs=1, ema_decay=0.95)
config.train.update(epochs=6, batch_size=64, warmup_epochs=1, ema_decay=0.95)
config.evaluation.update(every_epochs=3, batch_size=128)
config.test.update(batch_size=128, images=128, steps=10)
training.run(config, Path("runs/for_pytorch"))

# %% [markdown]
# ## Export
#
# As a command: `jaxrobust export --workdir runs/for_pytorch --layout module --out ship`. It
# compares the exported network with the original, then writes one .py and one .pt file that need
# only PyTorch.

# %%
export_torch.export(
    export_torch.ExportSettings(layout="module", out=Path("ship"), workdir=Path("runs/for_pytorch"))
)

# %% [markdown]
# ## Attacks in JAX
#
# Run the first two attacks of AutoAttack on 64 images.

# %%
images, labels, *_ = data.load("digits", split="test", n=64)
_, (params, stats) = runs.run_weights(Path("runs/for_pytorch"))
net = network_of(config)
logits_fn = jax.tree_util.Partial(lambda *given: net.apply(*given)[0], params, stats)
ball = {"norm": "linf", "epsilon": 0.1}
result = evaluation.autoattack(logits_fn, images, labels, **ball, attacks=("apgd-ce", "apgd-t"))

# %% [markdown]
# ## The same images in PyTorch
#
# PyTorch puts channels first; pixels stay in [0, 1], since the module normalizes images itself.

# %%
sys.path.append("ship")
from convnext_n import load  # noqa: E402

model = load()


def right(images: np.ndarray) -> np.ndarray:
    """Return bool[N]: whether the PyTorch network predicts the label."""
    with torch.no_grad():
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return logits.argmax(1).numpy() == labels


clean, robust = right(images), right(result.images_adv)
equal = (clean == result.clean) & (robust == result.robust)
print(f"JAX:     clean {result.clean.mean():.1%}, robust {result.robust.mean():.1%}")
print(f"PyTorch: clean {clean.mean():.1%}, robust {robust.mean():.1%}")
print(f"{equal.sum()} of {len(equal)} verdicts are equal")

# %% [markdown]
# On two CPU cores, it prints:
#
#     JAX:     clean 98.4%, robust 81.2%
#     PyTorch: clean 98.4%, robust 81.2%
#     64 of 64 verdicts are equal
