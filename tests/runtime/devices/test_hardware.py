import os
from pathlib import Path
from unittest import mock

import jax
from absl.testing import parameterized

from jaxrobust.runtime.devices import hardware, idle, in_use
from tests.support import sweeps


class ChipTest(parameterized.TestCase):
    @sweeps.rows(
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5 lite podslice", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("nvidia a100-sxm4-80gb", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GH200 480GB", 989e12),
    )
    def test_the_longest_name_decides(self, kind, flops):
        self.assertEqual(hardware.chip(kind).flops, flops)

    @sweeps.rows(
        "cpu",
        "",
        "TPU",
        "TPU v40",
        "NVIDIA L400",
        "NVIDIA H100",
        "AMD EPYC",
        "NVIDIA H200 MIG 1g.18gb",
    )
    def test_an_unknown_device_has_no_peak(self, kind):
        self.assertIsNone(hardware.chip(kind))

    def test_memory_of_two_chips_of_one_name(self):
        self.assertEqual(hardware.chip("NVIDIA A100-SXM4-40GB").memory, 40 * 2**30)
        self.assertEqual(hardware.chip("TPU v5 lite").memory, 16 * 2**30)

    def test_figures_are_in_one_unit(self):
        for name, chip in hardware._CHIPS.items():
            with self.subTest(name):  # bounds a unit's mistake (bits, giga, both directions) breaks
                self.assertBetween(chip.flops / chip.bandwidth, 50, 700)  # FLOP per byte
                self.assertBetween(chip.bandwidth / chip.memory, 10, 60)  # reads of all per second
                self.assertBetween(chip.bandwidth / chip.interconnect, 2, 30)


class DevicesTest(parameterized.TestCase):
    def test_one_cpu_is_one_machine_however_it_is_divided(self):
        self.assertGreater(jax.device_count(), 1)
        self.assertEqual(in_use.devices(), "1 x cpu")
        chips = [mock.Mock(platform="tpu", device_kind="TPU v4")] * 4
        with (
            mock.patch.object(jax, "devices", return_value=chips),
            mock.patch.object(jax, "device_count", return_value=4),
        ):
            self.assertEqual(in_use.devices(), "4 x TPU v4")


class IdleTest(parameterized.TestCase):
    """A machine with an accelerator that JAX has no plug-in for."""

    def said(self, *files: str, vendor: str = "0x8086", backend="cpu", platforms="") -> str | None:
        root = Path(self.create_tempdir())
        for name in (*files, "sys/bus/pci/devices/0000:00:04.0/vendor"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{vendor}\n")
        environment = {"JAX_PLATFORMS": platforms}
        with (
            mock.patch.object(jax, "default_backend", lambda: backend),
            mock.patch.dict(os.environ, environment),
        ):
            return idle.accelerator(root)

    @sweeps.rows(
        (["dev/nvidia0"], "0x10de", "an NVIDIA GPU", "jaxrobust[cuda]"),
        (["usr/lib/wsl/lib/libcuda.so.1"], "0x1414", "an NVIDIA GPU", "jaxrobust[cuda]"),
        (["dev/accel0"], "0x1ae0", "a TPU", "jaxrobust[tpu]"),
        (["dev/vfio/0"], "0x1ae0", "a TPU", "jaxrobust[tpu]"),
    )
    def test_the_line_that_installs_the_plug_in(self, files, vendor, what, extra):
        said = self.said(*files, vendor=vendor)
        self.assertStartsWith(said, f"this machine seems to have {what}, but JAX lacks its plug-in")
        self.assertIn(f"pip install -U '{extra}'", said)
        self.assertIsNone(self.said(*files, vendor=vendor, backend="gpu"))
        self.assertIsNone(self.said(*files, vendor=vendor, platforms="cpu"))

    def test_nothing_is_said_of_other_devices(self):
        self.assertIsNone(self.said())
        self.assertIsNone(self.said("dev/nvidiactl", "dev/null"))
        self.assertIsNone(self.said("dev/vfio/0"))  # a network card
