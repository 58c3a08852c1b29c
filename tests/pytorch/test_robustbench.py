"""RobustBench's zoo through `interop.torch` against PyTorch in process, in float64 and float32."""

import pytest
from absl.testing import absltest, parameterized

from tests.support import paths

pytest.importorskip("torch", reason=paths.PARITY)
from jaxrobust.publish import torch_networks
from jaxrobust.pytorch import torch as interop
from tests.support import robustbench_zoo
from tests.support.torch_side import EXACT, check_errors, errors


class ZooTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            torch_networks.import_robustbench()
        except ImportError as error:
            raise absltest.SkipTest(str(error)) from error

    @parameterized.parameters(*robustbench_zoo.NETWORKS, *robustbench_zoo.LARGE)
    @pytest.mark.matrix
    def test_is_pytorchs(self, key):
        images = robustbench_zoo.images(key)
        at_once = 1 if key in robustbench_zoo.LARGE else None
        check_errors(self, errors(robustbench_zoo.network(key), images, at_once), EXACT)

    @parameterized.parameters(*robustbench_zoo.REFUSED.items())
    @pytest.mark.matrix
    def test_is_refused(self, key, message):
        with self.assertRaisesRegex(ValueError, message):
            side = robustbench_zoo.SIDES[key.split("/")[0]]
            interop.converted(robustbench_zoo.module(key).eval(), (side, side, 3))

    @pytest.mark.matrix
    def test_every_id_is_one_of_them(self):
        listed = {*robustbench_zoo.NETWORKS, *robustbench_zoo.LARGE, *robustbench_zoo.REFUSED}
        kinds: dict[str, list[str]] = {}
        for key in robustbench_zoo.ids():
            if key in robustbench_zoo.OUT:
                with self.assertRaises((AssertionError, RuntimeError), msg=key):
                    robustbench_zoo.module(key)
            else:
                kind = robustbench_zoo.kind(robustbench_zoo.module(key))
                kinds.setdefault(kind, []).append(key)
        self.assertSequenceEqual(sorted(listed), sorted(keys[0] for keys in kinds.values()))


if __name__ == "__main__":
    absltest.main()
