"""Random numbers of a module as functions of a key: each draw, with PyTorch on the same ones, and
the distribution of logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.pytorch import agreement
from jaxrobust.pytorch.operators import DRAWS
from jaxrobust.pytorch.torch import converted, from_module
from tests.support import paths

torch = pytest.importorskip("torch", reason=paths.PARITY)
from tests.support import torch_defences  # noqa: E402

IMAGE = (torch_defences.SIDE, torch_defences.SIDE, torch_defences.CHANNELS)
IMAGES = np.random.default_rng(0).random((4, *IMAGE), np.float32)
MANY = 500  # draws, of whose means the standard error is 4.5% of a deviation


def layers(*names):
    return torch_defences.Several([torch_defences.DRAWS[name] for name in names])


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


class DrawsTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_every_operator_on_the_same_draws(self):
        network = converted(layers(*torch_defences.DRAWS).eval(), IMAGE, random=True)
        used = {
            step.operator for step in network.program.steps if step.name in network.program.draws
        }
        self.assertSameElements(used, DRAWS)
        off = agreement.check(network, IMAGES)
        self.assertLess(max(off), 1e-5)

    @parameterized.parameters(
        "dropout",
        "randn_like",
        "one rand for a batch",
        "bernoulli",
        "poisson",
        "multinomial again",
        "geometric_",
        "randint",
        "Gumbel softmax",
    )
    @pytest.mark.slow
    def test_each_distribution(self, name):
        self.check_distribution(layers(name).eval())

    def test_distribution(self):
        module = torch_defences.network(
            torch.nn.Dropout(0.4),
            torch_defences.Layer(lambda x: x + 0.3 * torch.randn_like(x) + torch.rand(1)),
        )
        module[1][1].train()
        self.check_distribution(module)

    def check_distribution(self, module):
        """Means and variances over draws are PyTorch's, within their statistical errors."""
        logits_fn, _ = from_module(module, IMAGES, random=True, compare=False)
        x = np.broadcast_to(IMAGES[:1], (MANY, *IMAGE))
        ours = np.asarray(jax.jit(logits_fn)(jnp.asarray(x), keys(MANY)), np.float64)
        torch.manual_seed(0)
        one = torch.from_numpy(IMAGES[:1].transpose(0, 3, 1, 2).copy())
        with torch.no_grad():  # by itself, as each image is here
            theirs = torch.cat([module(one) for _ in range(MANY)]).double().numpy()
        deviations = theirs.std(0)
        off = (ours.mean(0) - theirs.mean(0)) / (deviations * np.sqrt(2 / MANY))
        self.assertLess(np.abs(off).max(), 4.5)
        centred = [(v - v.mean(0)) ** 2 for v in (ours, theirs)]
        errors = np.sqrt(sum(c.var(0) for c in centred) / MANY)
        self.assertLess((np.abs(centred[0].mean(0) - centred[1].mean(0)) / errors).max(), 4.5)

    def test_an_image_meets_its_own_draws(self):
        module = layers("one rand for a batch").eval()
        logits_fn, _ = from_module(module, IMAGES, random=True, compare=False)
        logits_fn = jax.jit(logits_fn)
        all_of = logits_fn(IMAGES, keys(4))
        np.testing.assert_allclose(logits_fn(IMAGES[2:], keys(4)[2:]), all_of[2:], atol=1e-6)
        self.assertGreater(np.abs(logits_fn(IMAGES, keys(4, 1)) - all_of).max(), 1e-3)

    def test_nothing_is_drawn(self):
        net = torch_defences.network()
        logits_fn, _ = from_module(net, IMAGES, random=True)
        plain, _ = from_module(net, IMAGES, compare=False)
        np.testing.assert_array_equal(logits_fn(IMAGES, keys(4)), plain(IMAGES))

    @parameterized.parameters(
        (lambda: torch.nn.BatchNorm2d(torch_defences.CHANNELS), r"training mode \(1\.2\)"),
        (
            lambda: torch_defences.Layer(torch_defences.REFUSED_NOISE),
            r"two passes of the PyTorch module on the same images differ",
        ),
        (lambda: torch.nn.RReLU(), r"rrelu_with_noise.* is not supported"),
    )
    def test_is_refused_all_the_same(self, make, message):
        module = torch_defences.network(torch.nn.Dropout(), make())
        module[1].train()
        with self.assertRaisesRegex(ValueError, message):
            from_module(module, IMAGES, random=True)

    def test_draws_that_are_not_the_programs(self):
        calls = []

        def more(x):
            calls.append(0)
            return sum((torch.rand_like(x) for _ in range(len(calls))), x)

        with self.assertRaisesRegex(ValueError, "draw the same numbers in each pass"):
            from_module(torch_defences.network(torch_defences.Layer(more)), IMAGES, random=True)
