"""Devices of an estimate: what JAX is told of them, and which programs can be compiled."""

from types import SimpleNamespace
from unittest import mock

import jax
from absl.testing import parameterized

from jaxrobust.doctor.estimate import devices
from jaxrobust.doctor.programs import topology
from tests.support import sweeps


class DevicesTest(parameterized.TestCase):
    @sweeps.rows(("cpu", 1), ("gpu", 3))
    def test_devices_that_are_here(self, name, count):
        chips = [SimpleNamespace(device_kind="NVIDIA H100 SXM")] * 3
        with mock.patch.object(jax, "devices", return_value=chips):
            target = devices.target(name)
        self.assertEqual((target.name, target.chips, target.kind), (name, count, "NVIDIA H100 SXM"))
        self.assertTrue(target.here and target.compiles)
        self.assertEqual(target.float32, count * target.chip.flops / 2)

    @sweeps.rows(
        ("cpu", True, False),
        ("gpu", False, False),
        ("v5e:2x2", True, True),
        ("v4:2x2x1", True, True),
        ("v6e:2x2", True, True),
        ("h100:8", True, False),
    )
    def test_what_jax_is_told_before_it_is_imported(self, name, cpu, tpu):
        with mock.patch.dict("os.environ", clear=True):
            devices.prepare(name)
            environment = dict(devices.os.environ)
        self.assertEqual(environment.get("JAX_PLATFORMS"), "cpu" if cpu else None)
        self.assertEqual(topology.ENVIRONMENT.items() <= environment.items(), tpu)

    @sweeps.rows(("1x1", 1, True, False), ("2x2", 4, True, True), ("2x2", 4, False, False))
    def test_compilers_of_tpus(self, shape, chips, installed, compiles):
        spec = object() if installed else None
        with mock.patch.object(devices.importlib.util, "find_spec", return_value=spec):
            target = devices.target(f"v5e:{shape}")
            self.assertEqual((target.chips, target.compiles), (chips, compiles))
            self.assertEqual(devices.target("h100:8").compiles, installed)
            self.assertFalse(devices.target("h100:16").compiles)
            self.assertFalse(devices.target("a100:8").compiles)
            self.assertEqual(devices.target(f"v5e:{shape}", 3)[2::4], (3 * chips, 3))
