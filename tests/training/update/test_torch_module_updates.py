"""Adversarial updates of a PyTorch module, here and in PyTorch, in float64."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.pytorch.networks import torch_modules
from jaxrobust.training import build
from jaxrobust.types import Batch
from tests.support import paths, runs
from tests.support.steps import standard

torch = pytest.importorskip("torch", reason=paths.PARITY)
from tests.support.trainable_modules import CLASSES, SIDE, Mixed  # noqa: E402

BATCH, EPSILON, STEP, COUNT = 6, 8 / 255, 5 / 255, 10


def normed():
    """The smallest module with statistics; `interop` has fast tests of every norm."""
    flat = torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8), *flat, torch.nn.Linear(4, CLASSES))


def seeded(make):
    torch.manual_seed(0)
    return make()


def batches():
    draw = np.random.default_rng(0)
    for _ in range(COUNT):
        yield draw.random((BATCH, SIDE, SIDE, 3)), draw.integers(0, CLASSES, BATCH)


def config_of(optimizer: str):
    config = runs.tiny(train__optimizer=optimizer, train__epochs=COUNT, train__batch_size=BATCH)
    with config.unlocked():
        config.model.update(name="torch:of_this_test:build", dtype="float64", in_channels=3)
        config.model.update(num_classes=CLASSES, options={})
        config.attack.update(name="pgd", epsilon=EPSILON, steps=2, step_size=STEP, start="image")
        config.train.update(lr=0.02 if optimizer == "sgd" else 0.002, weight_decay=0.01)
    return config


def attacked(module, x, labels):
    """PGD from the image itself, on the network in evaluation mode."""
    module.eval()
    at = x.clone()
    for _ in range(2):
        at.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(module(at), labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, at)
        at = at.detach() + STEP * grad.sign()
        at = torch.clamp(x + torch.clamp(at - x, -EPSILON, EPSILON), 0, 1)
    module.train()
    return at


def optimiser_of(module, name: str, decay: float):
    trained = [p for p in module.parameters() if p.requires_grad]
    if name == "sgd":
        groups = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        rows = [{"params": p, "weight_decay": d} for p, d in zip(groups, (decay, 0), strict=True)]
        return torch.optim.SGD(rows, lr=0.0, momentum=0.9)
    groups = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    rows = [{"params": p, "weight_decay": d} for p, d in zip(groups, (decay, 0), strict=True)]
    return torch.optim.AdamW(rows, lr=0.0, betas=(0.9, 0.95), eps=1e-8)


class UpdatesTest(parameterized.TestCase):
    @parameterized.parameters("sgd", "adamw")
    @pytest.mark.slow
    def test_ten(self, optimizer):
        state = self.check_ten(optimizer, Mixed)
        self.assertEqual(np.asarray(state.stats["norm.num_batches_tracked"]), COUNT)

    def test_ten_of_a_small_module(self):
        state = self.check_ten("sgd", normed)
        self.assertEqual(np.asarray(state.stats["1.num_batches_tracked"]), COUNT)

    def check_ten(self, optimizer, make):
        config, theirs = config_of(optimizer), seeded(make).double().train()
        self.enter_context(
            mock.patch.object(torch_modules, "module", lambda name, options: seeded(make))
        )
        # Programs are cached by it.
        source = {"_source_sha256": lambda name: f"{optimizer} {make.__name__}"}
        source |= {"origin": lambda name: {"name": name}}
        self.enter_context(mock.patch.multiple(torch_modules, **source))
        optimiser = optimiser_of(theirs, optimizer, 0.01)
        with jax.enable_x64(True), standard():
            phase = build.phase(config, "train", BATCH, devices=jax.devices()[:1])
            with jax.set_mesh(phase.mesh):
                state = phase.init(jax.random.key(0))
                state = jax.tree.map(
                    lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, state
                )
                told = build.control(phase.mesh)
                for i, (images, labels) in enumerate(batches()):
                    rate = float(phase.schedule(i))
                    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
                    y = torch.from_numpy(labels)
                    for group in optimiser.param_groups:
                        group["lr"] = rate
                    optimiser.zero_grad()
                    logits = theirs(attacked(theirs, x, y))
                    loss = torch.nn.functional.cross_entropy(logits, y)
                    loss.backward()
                    optimiser.step()
                    batch = Batch(jnp.asarray(images), jnp.asarray(labels, jnp.int32))
                    state, metrics = phase.step(state, batch, told)
                    # Two orders of the same sums in float64, which ten updates pass on.
                    close = {"rtol": 1e-9, "atol": 1e-9}
                    np.testing.assert_allclose(metrics["loss"], loss.item(), **close)
                    own = state.params | state.stats
                    for name, tensor in theirs.state_dict().items():
                        if name in own:
                            np.testing.assert_allclose(
                                own[name], tensor.numpy(), **close, err_msg=f"{i} {name}"
                            )
        return state
