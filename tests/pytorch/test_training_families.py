"""Networks of timm, torchvision and RobustBench next to PyTorch in process: logits and training."""

import ctypes
import gc

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from tests.support import paths, sweeps

pytest.importorskip("torch", reason=paths.PARITY)
from jaxrobust.publish import torch_networks
from jaxrobust.pytorch import agreement
from jaxrobust.pytorch import torch as interop
from tests.support import robustbench_zoo, torch_families, torch_training
from tests.support.torch_side import EXACT, check_errors, converted, differences, errors

GRADIENTS, STATISTICS = 1e-9, 1e-12  # of the largest
FAMILIES = torch_families.FAMILIES | torch_families.SINGLE


class FamiliesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            torch_networks.import_timm()
        except ImportError as error:
            raise absltest.SkipTest(paths.PARITY) from error

    @sweeps.rows(*torch_families.SMALL.items())
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


@pytest.mark.matrix
class TrainingFamiliesTest(parameterized.TestCase):
    """The bars are the issue's: most networks are at 1e-13, some magnify rounding to 1e-11."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            cls.timm = torch_networks.import_timm()
        except ImportError as error:
            raise absltest.SkipTest(paths.PARITY) from error

    def tearDown(self):
        super().tearDown()
        jax.clear_caches()  # seventy networks' programs are 17 GB
        gc.collect()
        _give_back_memory()

    @parameterized.parameters(*sorted(FAMILIES.keys() - torch_training.REFUSED.keys()))
    def test_trains(self, name):
        made, side = torch_training.network(name)
        how = {"wide": name in torch_training.WIDE, "precise": name in torch_training.PRECISE}
        found = torch_training.differences(made, side, **how)
        self.assertTrue(np.isfinite(found.losses).all(), found)
        self.assertLess(found.gradients, GRADIENTS)
        self.assertLess(found.statistics, torch_training.STATISTICS.get(name, STATISTICS))

    @parameterized.parameters(*sorted(torch_families.TORCHVISION))
    def test_torchvisions_train(self, name):
        side, options = torch_families.TORCHVISION[name]
        made = torch_families.of_torchvision(name, num_classes=torch_training.CLASSES, **options)
        found = torch_training.differences(made, side)
        self.assertTrue(np.isfinite(found.losses).all(), found)
        self.assertLess(found.gradients, GRADIENTS)
        self.assertLess(found.statistics, STATISTICS)

    @parameterized.parameters(*torch_training.REFUSED.items())
    def test_is_refused(self, name, sentence):
        with self.assertRaisesRegex(ValueError, sentence):
            torch_training.differences(*torch_training.network(name))

    def test_most_of_timms_files_train(self):
        def files(names):
            return {self.timm.model_entrypoint(name).__module__ for name in names}

        self.assertLen(files(self.timm.list_models()), 81)
        self.assertEqual(files(FAMILIES), files(self.timm.list_models()))
        self.assertGreaterEqual(len(files(FAMILIES.keys() - torch_training.REFUSED.keys())), 72)


def _give_back_memory():
    """Return freed memory to the system; glibc keeps up to a gigabyte a network's compilation."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim:
        trim(0)


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
