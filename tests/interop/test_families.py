"""timm's families through `interop.torch` against PyTorch in process, in float64."""

import pytest
from absl.testing import absltest, parameterized

from tests.support import paths

pytest.importorskip("torch", reason=paths.PARITY)
from jaxrobust.convert import torch_networks
from tests.support import torch_families
from tests.support.torch_side import converted, differences


class FamiliesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            torch_networks.import_timm()
        except ImportError as error:
            raise absltest.SkipTest(paths.PARITY) from error

    def check(self, name: str, size: int, **options):
        images = torch_families.images(size)
        network = converted(torch_families.network(name, **options), images.shape[1:])
        logits, gradients = differences(network, images)
        bars = torch_families.LESS_EXACT.get(name, (1e-12, 1e-10))
        self.assertLess(logits.max(), bars[0])
        self.assertLess(gradients.max(), bars[1])

    @parameterized.parameters(*torch_families.SMALL.items())
    def test_small(self, name, options):
        self.check(name, 64, **options)

    @parameterized.parameters(*torch_families.FAMILIES.items())
    @pytest.mark.matrix
    def test_at_its_size(self, name, size):
        self.check(name, size)


if __name__ == "__main__":
    absltest.main()
