"""Devices by their names."""

from unittest import mock

import jax
from absl.testing import parameterized

from jaxrobust.doctor.estimate import devices


class TargetTest(parameterized.TestCase):
    def test_chips_by_name(self):
        for name, kind, chips, flops in (
            ("v5e:8x8", "TPU v5e", 64, 197e12),
            ("v5p:2x2x4", "TPU v5p", 16, 459e12),
            ("v4:2x2x2", "TPU v4", 8, 275e12),
            ("v5p:16x16x24", "TPU v5p", 6144, 459e12),
            ("v5e:1x1", "TPU v5e", 1, 197e12),
            ("v7x:4x4x4", "TPU7x", 128, 1153.5e12),  # Ironwood: JAX counts halves of chips
            ("h100:8", "NVIDIA H100 SXM", 8, 989e12),
            ("a100:2", "NVIDIA A100-SXM4-80GB", 2, 312e12),  # which most clouds rent by that name
            ("a100-80gb:2", "NVIDIA A100-SXM4-80GB", 2, 312e12),
            ("a100-40gb:1", "NVIDIA A100-SXM4-40GB", 1, 312e12),
        ):
            with self.subTest(row=(name, kind, chips, flops)):
                found = devices.target(name)
                self.assertEqual((found.kind, found.chips, found.chip.flops), (kind, chips, flops))
                self.assertFalse(found.here)

    @parameterized.product(
        kind=("v5e", "v6e"),
        sides=((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    )
    def test_slices_in_a_plane(self, kind, sides):
        rows, columns = sides
        self.assertEqual(devices.target(f"{kind}:{rows}x{columns}").chips, rows * columns)
        if rows != columns:
            with self.assertRaisesRegex(ValueError, "is not a slice of TPU"):
                devices.target(f"{kind}:{columns}x{rows}")

    def test_slices_in_space(self):
        for kind, shape, rented in (
            ("v4", "2x2x1", True), ("v4", "2x2x2", True), ("v4", "2x4x4", True),
            ("v4", "4x4x4", True),
            ("v4", "16x16x16", True),  # 4,096 chips are the largest
            ("v4", "16x16x20", False), ("v4", "2x4x8", False), ("v4", "4x4", False),
            ("v7x", "2x2x1", True), ("v7x", "16x24x24", True), ("v7x", "16x24x28", False),
            ("v5p", "16x16x24", True), ("v5p", "16x16x28", False), ("v5p", "4x4x4x4", False),
        ):  # fmt: skip
            with self.subTest(row=(kind, shape, rented)):
                if rented:
                    self.assertIsNotNone(devices.target(f"{kind}:{shape}"))
                else:
                    with self.assertRaisesRegex(ValueError, "is not a slice of TPU"):
                        devices.target(f"{kind}:{shape}")

    def test_every_name_is_listed_with_its_peaks(self):
        for name in devices._KINDS:
            shape = "2x2x1" if name in devices._LARGEST else "2x2" if name.startswith("v") else "4"
            self.assertIsNotNone(devices.target(f"{name}:{shape}").chip, name)

    def test_what_is_no_device(self):
        for name, sentence in (
            ("v5q:8x8", "not a known device"),
            ("h100", "lacks the number of chips"),
            ("h100:8x8", "lacks the number of chips"),
            ("v5e:", "lacks the number of chips"),
            ("v5e:0x4", "lacks the number of chips"),
            ("v5e:3x3", "is not a slice of TPU v5e; write, for example, v5e:4x4"),
            ("v5e:16", "is not a slice of TPU v5e"),
            ("v6e:2x2x2", "is not a slice of TPU v6e; write, for example, v6e:4x4"),
            ("v4:8x8", "is not a slice of TPU v4; write, for example, v4:2x2x4"),
            ("v5p:2x2x3", "is not a slice of TPU v5p; write, for example, v5p:2x2x4 or v5p:4x4x8"),
            ("v7x:4x4", "is not a slice of TPU v7x; write, for example, v7x:2x2x4"),
            ("v5p:64x64x64", "is not a slice of TPU v5p"),
        ):
            with self.subTest(row=(name, sentence)), self.assertRaisesRegex(ValueError, sentence):
                devices.target(name)

    def test_hours_are_of_whole_chips(self):
        for name, counted, rented in (("v7x:2x2x1", 8, 4), ("v5p:2x2x1", 4, 4), ("h100:8", 8, 8)):
            with self.subTest(row=(name, counted, rented)):
                found = devices.target(name)
                self.assertEqual((found.chips, found.whole), (counted, rented))

    def test_a_device_that_is_not_here(self):
        with (
            mock.patch.object(jax, "devices", side_effect=RuntimeError("none")),
            self.assertRaisesRegex(ValueError, "JAX finds no GPU on this machine"),
        ):
            devices.target("gpu")
