"""Your PyTorch ResNet, trained adversarially in JAX and exported as a state dict."""

# %% [markdown]
# First, the network that you already have: a function that builds a module. (`pip install torch`;
# CIFAR-10 is read from $TFDS_DATA_DIR, where `jaxrobust prepare cifar10` puts it.)

# %%
from pathlib import Path

import jax
import torch
from torch import nn

from jaxrobust import data, evaluation
from jaxrobust.config import base, network_of
from jaxrobust.convert import export_torch
from jaxrobust.training.run import run as training
from jaxrobust.weights.trained import runs


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, ins, outs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        same = ins == outs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(ins, outs, 1, stride, bias=False)

    def forward(self, x):
        """Map features [B,C,H,W] to features."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def build(num_classes=10, width=16):
    """Build the network; any normalization happens inside it."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        *(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes)),
    )


# %% [markdown]
# ## Training
#
# `torch:FILE.py:build` names the network. PyTorch exports the module once; from then on, every
# step, including its attack, is one JAX program, on a TPU as well as on this CPU. With the config
# in a file, you can also run a command: `jaxrobust train --config my_config.py`.


# %%
def config():
    """Return the config: 10,000 images, first clean and then adversarial epochs."""
    config = base()
    config.model.update(name=f"torch:{__file__}:build", num_classes=10, image_size=32)
    config.data.update(name="cifar10", train_split="train[:10000]", test_split="test[:1000]")
    config.data.update(selection_split="train[-500:]", augmentation="crop-flip")
    config.attack.update(epsilon=8 / 255, steps=2)
    config.pretrain.update(epochs=3, batch_size=64, warmup_epochs=1, ema_decay=0.99)
    config.train.update(epochs=4, batch_size=64, warmup_epochs=1, ema_decay=0.99)
    config.evaluation.update(every_epochs=4, batch_size=100)
    config.test.update(batch_size=100, images=500, steps=10)
    return config


if __name__ == "__main__":
    training.run(config(), Path("runs/my_torch_network"))

# %% [markdown]
# ## Back to PyTorch
#
# As a command: `jaxrobust export --workdir runs/my_torch_network --layout state-dict --out mine`.
# It first compares logits and input gradients of your module, with these weights, with JAX's.

# %%
if __name__ == "__main__":
    export_torch.export(
        export_torch.ExportSettings(
            layout="state-dict", out=Path("mine"), workdir=Path("runs/my_torch_network")
        )
    )
    module = build().eval()
    module.load_state_dict(torch.load("mine/state_dict.pt"), strict=True)

# %% [markdown]
# ## AutoAttack
#
# Attack the run's network, without a second conversion. `jaxrobust evaluate --workdir
# runs/my_torch_network` attacks all images of the test split.

# %%
if __name__ == "__main__":
    images, labels, *_ = data.load("cifar10", split="test", n=64)
    _, (params, stats) = runs.run_weights(Path("runs/my_torch_network"))
    net = network_of(config())
    logits_fn = jax.tree_util.Partial(lambda *given: net.apply(*given)[0], params, stats)
    result = evaluation.autoattack(logits_fn, images, labels, norm="linf", epsilon=8 / 255)
    with torch.no_grad():
        there = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).argmax(1).numpy()
    print(f"clean in JAX {result.clean.mean():.1%}, in PyTorch {(there == labels).mean():.1%}")
    print(f"after AutoAttack {result.robust.mean():.1%}")

# %% [markdown]
# It takes 8 minutes of CPU time, including compilation, and prints
#
#     clean in JAX 37.5%, in PyTorch 37.5%
#     after AutoAttack 20.3%
