"""Small networks of every family give what their PyTorch modules give, in evaluation and training.

What is compared with is stored; tests/convert/test_torch_modules.py computes it anew.
"""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.weights.naming import convert
from tests.support import paths, small_networks, sweeps

try:
    import torch

    from jaxrobust.convert import torch_networks  # noqa: F401
except ImportError:
    torch = None

# XCiT's positions are sines in float32, which no two libraries round alike.
ROUNDED = 1e-7
# Others of these rows, or of these files' own tests, make the same layers.
LATER = (
    *("internimage", "internimage, patches", "advrush", "resnet, bottlenecks", "resnet, wide"),
    *("convnext", "convnext, cvst", "convnext, strides", "iso_convnext", "iso_convnext, cvst"),
    *("vit", "vit, cvst", "vit, scaled", "xcit", "swin, one window"),
)
FAST = [label for label in small_networks.ROWS if label not in LATER]
TRAINED = ("resnet, small stem", "cifar_densenet", "xcit", "vit, scaled", "convnext")


def numbers(*labels: str) -> list[int]:
    """Their places among all rows."""
    return [list(small_networks.ROWS).index(label) for label in labels]


@absltest.skipIf(torch is None, paths.PARITY)
class SmallTest(parameterized.TestCase):
    def weights(self, label):
        """Weights of the stored numbers, under our names, float64."""
        state = small_networks.weights(small_networks.made(label).state_dict())
        return convert.from_torch(
            small_networks.ROWS[label][0], state, **small_networks.options(label)
        )

    @sweeps.fast(*numbers(*FAST))
    @parameterized.parameters(*small_networks.ROWS)
    def test_evaluates(self, label):
        name, stored = small_networks.ROWS[label][0], small_networks.stored()[label]
        with jax.enable_x64(True):
            params, stats = self.weights(label)
            net = models.create(name, dtype="float64", **small_networks.options(label))
            logits, same = jax.jit(net.apply)(params, stats, small_networks.images(label))
        np.testing.assert_allclose(logits, stored["evaluated"], rtol=ROUNDED, atol=ROUNDED)
        self.assertEqual(same.keys(), stats.keys())

    @sweeps.fast(*numbers(*TRAINED))
    @parameterized.parameters(*small_networks.ROWS)
    def test_trains(self, label):
        """With blocks that are computed again, and one program for several where there is."""
        name, stored = small_networks.ROWS[label][0], small_networks.stored()[label]
        options = small_networks.options(label)
        fields = models.variant(name)._fields
        how = {key: True for key in ("remat", "scan") if key in fields}
        with jax.enable_x64(True):
            params, stats = self.weights(label)
            net = models.create(name, dtype="float64", **options, **how)
            run = jax.jit(lambda *given: net.apply(*given, train=True, key=jax.random.key(0)))
            logits, moved = jax.device_get(run(params, stats, small_networks.images(label)))
        np.testing.assert_allclose(logits, stored["trained"], rtol=ROUNDED, atol=ROUNDED)
        if stored["moved"]:
            own = {k: v for k, v in options.items() if k not in ("num_classes", "image_size")}
            theirs = convert.to_torch(name, params, moved, **own)
            for key, value in stored["moved"].items():
                found = small_networks.weighed(np.asarray(theirs[key]))
                self.assertAlmostEqual(found, value, delta=ROUNDED, msg=key)

    def test_an_oblong_image_is_no_square(self):
        """Where the rows are oblong, height and width are told apart."""
        oblong = [
            label
            for label in small_networks.ROWS
            if small_networks.images(label).shape[1] != small_networks.images(label).shape[2]
        ]
        self.assertGreater(len(oblong), len(small_networks.ROWS) // 2)


if __name__ == "__main__":
    absltest.main()
