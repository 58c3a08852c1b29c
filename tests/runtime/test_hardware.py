import jax
from absl.testing import absltest, parameterized

from jaxrobust.runtime import hardware


class ChipTest(parameterized.TestCase):
    @parameterized.parameters(
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

    @parameterized.parameters("cpu", "", "TPU", "TPU v40", "NVIDIA L400", "NVIDIA H100", "AMD EPYC")
    def test_an_unknown_device_has_no_peak(self, kind):
        self.assertIsNone(hardware.chip(kind))

    def test_a_slice_of_a_gpu_is_not_the_gpu(self):
        self.assertIsNone(hardware.chip("NVIDIA H200 MIG 1g.18gb"))

    def test_this_machine_s_devices_have_none(self):
        self.assertIsNone(hardware.chip(jax.devices("cpu")[0].device_kind))

    def test_memory_of_two_chips_of_one_name(self):
        self.assertEqual(hardware.chip("NVIDIA A100-SXM4-40GB").memory, 40 * 2**30)
        self.assertEqual(hardware.chip("TPU v5 lite").memory, 16 * 2**30)

    def test_figures_are_in_one_unit(self):
        for name, chip in hardware._CHIPS.items():
            with self.subTest(name):  # bounds a unit's mistake (bits, giga, both directions) breaks
                self.assertBetween(chip.flops / chip.bandwidth, 50, 700)  # FLOP per byte
                self.assertBetween(chip.bandwidth / chip.memory, 10, 60)  # reads of all per second
                self.assertBetween(chip.bandwidth / chip.interconnect, 2, 30)


if __name__ == "__main__":
    absltest.main()
