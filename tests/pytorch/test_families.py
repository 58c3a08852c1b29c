"""timm's families through `interop.torch` against PyTorch in process, in float64 and float32."""

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from tests.support import paths

pytest.importorskip("torch", reason=paths.PARITY)
from jaxrobust.publish import torch_networks
from jaxrobust.pytorch import agreement
from jaxrobust.pytorch import torch as interop
from tests.support import torch_families
from tests.support.torch_side import EXACT, check_errors, converted, differences, errors


class FamiliesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            torch_networks.import_timm()
        except ImportError as error:
            raise absltest.SkipTest(paths.PARITY) from error

    @parameterized.parameters(*torch_families.SMALL.items())
    @pytest.mark.slow
    def test_small(self, name, options):
        images = torch_families.images(64)
        network = converted(torch_families.network(name, **options), images.shape[1:])
        logits, gradients = differences(network, images)
        bars = torch_families.LESS_EXACT.get(name, EXACT)
        self.assertLess(logits.max(), bars[0])
        self.assertLess(gradients.max(), bars[1])

    @parameterized.parameters(*torch_families.FAMILIES.items())
    @pytest.mark.matrix
    def test_at_its_size(self, name, size):
        found = errors(torch_families.network(name), torch_families.images(size, 16))
        check_errors(self, found, torch_families.LESS_EXACT.get(name, EXACT))

    @parameterized.parameters(*torch_families.SINGLE.items())
    @pytest.mark.matrix
    def test_in_float32(self, name, size):
        network = interop.converted(torch_families.network(name).float(), (size, size, 3))
        images = torch_families.images(size).astype(np.float32)
        agreement.compared(network, images)  # it raises where they differ


if __name__ == "__main__":
    absltest.main()
