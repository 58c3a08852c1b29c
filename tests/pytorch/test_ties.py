"""Kinks, ties, orders and infinite slopes on flat, binary and saturated images, as PyTorch's.

`test_operators` holds every row of the table to tied images too, so that no row is forgotten.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.pytorch import agreement
from jaxrobust.pytorch import torch as interop
from jaxrobust.pytorch import trainable as trained
from jaxrobust.pytorch.operators import sorting
from tests.support import paths, sweeps

torch = pytest.importorskip("torch", reason=paths.PARITY)
from jaxrobust.pytorch.reading.training_mode import trainable  # noqa: E402
from tests.support import operator_cases, torch_kinks  # noqa: E402

QUICK = (
    *("abs", "hardsigmoid", "hardswish", "logsigmoid", "clamp by equal tensors", "atan2", "hypot"),
    *("x to x", "norm of order 1", "norm of order inf", "normalize by order 1", "std", "l1_loss"),
)
OTHERS = [name for name in torch_kinks.KINKS if name not in QUICK]
GROUPS = [QUICK, *(OTHERS[start::4] for start in range(4))]
KEPT: dict[int, dict[str, operator_cases.Outcome | Exception]] = {}


class KinksTest(parameterized.TestCase):
    """Most failed: `abs` and `norm(p=1)` had slope 1 at 0, `std` of a constant NaN, and so on."""

    def check(self, name: str) -> None:
        (number,) = [i for i, names in enumerate(GROUPS) if name in names]
        if number not in KEPT:
            KEPT[number] = operator_cases.each(GROUPS[number])
        found = KEPT[number][name]
        if isinstance(found, Exception):
            raise found
        self.assertEmpty(found.ties, name)

    @sweeps.rows(*QUICK)
    def test_some_are_pytorchs(self, name):
        self.check(name)

    @sweeps.rows(*OTHERS)
    @pytest.mark.slow
    def test_is_pytorchs(self, name):
        self.check(name)


class Net(torch.nn.Module):
    """Distances to prototypes, deviations and kinks, as on MNIST's background."""

    def __init__(self, root: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.root, self.norm = root, torch.nn.BatchNorm2d(2)
        self.conv = torch.nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.prototypes = torch.nn.Parameter((torch.rand(3, 36) > 0.5).float())
        self.head = torch.nn.Linear(7, 3)

    def forward(self, x):
        rows = x.flatten(1)
        apart = torch.nn.functional.l1_loss(
            rows[:, None].expand(-1, 3, -1), self.prototypes.expand(len(x), 3, -1), reduction="none"
        )
        maps = torch.nn.functional.hardswish(6 * self.norm(self.conv(x)) - 3)
        parts = apart.mean(2), maps.std((2, 3)), x.norm(p=1, dim=3).mean((1, 2))[:, None]
        pooled = rows.sum(1, keepdim=True).sqrt() if self.root else x.std((2, 3))
        return self.head(torch.cat([*parts, pooled], 1))


def digits(count: int = 4) -> np.ndarray:
    """Binary images f32[B,6,6,1], of which the last one is black."""
    x = (np.random.default_rng(0).random((count, 6, 6, 1)) > 0.7).astype(np.float32)
    x[-1] = 0
    return x


class NetworksTest(absltest.TestCase):
    def test_of_binary_and_flat_images(self):
        """Their gradients differed by half of their length; that of the black image was NaN."""
        network = interop.converted(Net().eval(), (6, 6, 1))
        logits, gradients = agreement.check(network, digits())
        self.assertLess(max(logits, gradients), 1e-5)

    def test_an_infinite_gradient_of_both_is_equal(self):
        """It was refused as different "by nan and nan"."""
        net = Net(root=True).eval()
        network = interop.converted(net, (6, 6, 1))
        images = digits()
        _, gradients = agreement._torch_pass(network)(images, "float32")
        self.assertTrue(np.isinf(gradients[-1]).all())
        logits, apart = agreement.check(network, images)
        self.assertLess(max(logits, apart), 1e-5)

    def test_gradients_of_parameters_in_training(self):
        module, x = Net().double().train(), digits()
        network = trainable(Net(), (6, 6, 1))
        with jax.enable_x64(True):
            net = trained.classifier(network)
            params, stats = (
                {name: jnp.asarray(a, jnp.float64) for name, a in group.items()}
                for group in net.init(jax.random.key(0))
            )
            images = jnp.asarray(x, jnp.float64)
            gradient = jax.jit(
                jax.grad(lambda p, x: net.apply(p, stats, x, train=True)[0][:, 0].sum(), (0, 1))
            )
            ours, of_images = gradient(params, images)
        there = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).double().requires_grad_()
        module(there)[:, 0].sum().backward()
        for name, parameter in module.named_parameters():
            np.testing.assert_allclose(ours[name], parameter.grad.numpy(), atol=1e-9, err_msg=name)
        np.testing.assert_allclose(of_images, there.grad.numpy().transpose(0, 2, 3, 1), atol=1e-9)


class OrdersTest(parameterized.TestCase):
    """The order of equal numbers, which were in that of their places here."""

    @parameterized.parameters((40, 5), (150, 2), (101, 60))
    @pytest.mark.slow
    def test_is_pytorchs(self, size, count):
        random = np.random.default_rng(0)
        x = np.concatenate([random.integers(0, n, (9, size)) for n in (1, 2, 3, 1000)])
        x = x.astype(np.float32)
        x[::7][random.random(x[::7].shape) < 0.1] = np.nan

        @jax.jit
        def ours(x):
            return [
                (sorting.order(x, 1, most), sorting.first(x, count, 1, most, True))
                for most in (False, True)
            ]

        for most, (order, first) in enumerate(ours(jnp.asarray(x))):
            there = torch.from_numpy(x)
            np.testing.assert_array_equal(order, there.sort(descending=bool(most))[1])
            np.testing.assert_array_equal(first, there.topk(count, largest=bool(most))[1])
