"""Blocks of PyTorch's modules that the package's kernels compute, next to their steps one by
one.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.pytorch import trainable as trained
from jaxrobust.pytorch.networks import torch_blocks
from tests.support import paths

torch = pytest.importorskip("torch", reason=paths.PARITY)
from torch import nn  # noqa: E402

from jaxrobust.pytorch.reading.training_mode import trainable  # noqa: E402
from tests.support import trainable_modules as modules  # noqa: E402

SIDE, WIDTH = 8, 6
FASTER = trained.Faster(patterns=torch_blocks.PATTERNS)
OTHERWISE = ("tanh", "relu", "full", "bias", "gamma", "residual", "twice", "pixels", "gate")
OTHERWISE = *OTHERWISE, "channels"
OTHER_HALVINGS = (
    {"stride": 1},
    {"stride": 2, "dilation": 2},
    {"stride": 2, "padding": 1},
    {"stride": 2, "groups": 2},
    {"stride": 2, "bias": False},
)


class Block(nn.Module):
    """A block of ConvNeXt, with one thing otherwise."""

    def __init__(self, otherwise: str = "", rate: float = 0.0) -> None:
        super().__init__()
        groups = 1 if otherwise == "full" else WIDTH
        bias = otherwise != "bias"
        self.conv = nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=groups, bias=bias)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-5)
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gelu = nn.GELU(approximate="tanh" if otherwise == "tanh" else "none")
        self.gamma = nn.Parameter(torch.rand(WIDTH))
        self.otherwise, self.rate = otherwise, rate

    def forward(self, x):
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        hidden = self.first(y)
        if self.otherwise == "pixels":  # a view that mixes pixels
            hidden = hidden.reshape(hidden.shape[0], 2 * SIDE, SIDE // 2, 4 * WIDTH)
            hidden = hidden.reshape(hidden.shape[0], SIDE, SIDE, 4 * WIDTH)
        y = self.second(torch.relu(hidden) if self.otherwise == "relu" else self.gelu(hidden))
        y = y.permute(0, 3, 1, 2)
        if self.otherwise != "gamma":
            y = y * self.gamma.reshape(1, -1, 1, 1)
        if self.training and self.rate:
            keep = 1 - self.rate
            y = y * (x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)
        if self.otherwise == "gate":  # which has a gradient
            y = y * (torch.sigmoid(y.mean((1, 2, 3), keepdim=True)) / 0.5)
        if self.otherwise == "channels" and self.training:
            y = y * (x.new_empty(x.shape[0], WIDTH, 1, 1).bernoulli_(0.5) / 0.5)
        if self.otherwise == "residual":
            return torch.relu(x) + y
        if self.otherwise == "twice":
            return torch.add(y, x, alpha=2)
        return x + y if self.otherwise == "turned" else y + x


class Stage(nn.Module):
    """What halves maps, before a block or none."""

    def __init__(self, block: bool = True, **how) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 2, **how)
        self.block = nn.Sequential(*[Block()] * block)

    def forward(self, x):
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.block(self.conv(x))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images):
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@functools.cache
def written(*others, rate=0.0):
    torch.manual_seed(0)
    return trainable(Net(*(Block(other, rate) for other in others)), (SIDE, SIDE, 3))


def traced(network, side=SIDE):
    net = trained.classifier(network, FASTER)
    given = net.init(jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    key = jax.random.key(1)
    jax.eval_shape(lambda x: net.apply(*given, x, train=True, key=key), x)


class ConvNeXtTest(parameterized.TestCase):
    @parameterized.parameters(
        (("", ""), 0.0, {}),
        (("turned", ""), 0.4, {}),
        (("turned", "", "", ""), 0.4, {"scan": True, "remat": True}),
    )
    def test_values_and_gradients(self, others, rate, how):
        network, keys = written(*others, rate=rate), jax.random.split(jax.random.key(3), 3)
        with self.counted() as block:
            modules.check_faster(network, FASTER, keys, **how)
        self.assertNotEmpty(block.call_args_list)

    def counted(self):
        return mock.patch.object(
            torch_blocks, "convnext_block", side_effect=torch_blocks.convnext_block
        )

    def between(self):
        return mock.patch.object(
            torch_blocks, "norm_halving", side_effect=torch_blocks.norm_halving
        )

    def test_other_blocks_are_computed_by_their_steps(self):
        with self.counted() as block:
            traced(written(*OTHERWISE))
        self.assertEmpty(block.call_args_list)

    def test_between_stages(self):
        torch.manual_seed(0)
        network = trainable(Net(Stage(stride=2)), (SIDE, SIDE, 3))
        with self.between() as called:
            traced(network)
        self.assertNotEmpty(called.call_args_list)
        modules.check_faster(network, FASTER)

    def test_what_else_stands_between_stages(self):
        stages = (Stage(block=False, **how) for how in OTHER_HALVINGS)
        network = trainable(Net(*stages), (2 * SIDE, 2 * SIDE, 3))
        with self.between() as called:
            traced(network, 2 * SIDE)
        self.assertEmpty(called.call_args_list)

    def test_timm_s_own(self):
        from jaxrobust.publish import torch_networks

        module = torch_networks.import_timm().create_model(
            "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5
        )
        network = trainable(module, (64, 64, 3))
        params = {**network.params, **network.stats}
        x = np.random.default_rng(0).random((2, 64, 64, 3), np.float32)
        with self.counted() as block, self.between() as between:
            net = trained.classifier(network, FASTER)
            logits = net.apply(*net.init(jax.random.key(0)), x)[0]
        self.assertLen(block.call_args_list, 4)
        self.assertLen(between.call_args_list, 3)
        self.assertIn("stages.0.blocks.0.gamma", params)
        with torch.no_grad():
            want = module.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        np.testing.assert_allclose(logits, want, atol=1e-5)
