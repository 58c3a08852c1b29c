"""What the families of the study share: how their tables are made, and two of their checks."""

from types import SimpleNamespace

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.family import Member, Names, PaperFigures, TorchVariant
from jaxrobust.zoo.shared import common


class FamilyTest(absltest.TestCase):
    def test_positions_belong_to_one_size_of_images(self):
        said = (
            r"positions have shape \(2, 3\), but this network needs \(4, 3\); give the image_size"
        )
        with self.assertRaisesRegex(ValueError, said):
            common.refusing("positions")(np.zeros((2, 3)), (4, 3))

    def test_a_row_is_ten_classes_and_counted_at_32_pixels_where_the_study_prints_it(self):
        def variant(**options):
            return sorted(options.items())

        def maker(v, **sizes):
            raise AssertionError("made")

        networks = {
            "small": common.Study("Small", {"dim": 8}, {"remat": True}, "1.25"),
            "other": common.Study("Other", {"dim": 9}, counted="6.67", other=True),
            "large": common.Study("Large, 224 px", {"patch": 16}),
        }
        names = Names([], lambda v: [], "stem", "head")
        found = common.family("cifar_new", "New", variant, maker, names, networks, any_size=False)
        self.assertEqual((found.file, found.title, found.any_size), ("cifar_new", "New", False))
        self.assertEqual((found.maker, found.names), (maker, names))
        expected = {
            "small": [("dim", 8), ("remat", True)],
            "other": [("dim", 9)],
            "large": [("patch", 16)],
        }
        self.assertEqual(found.variants, expected)
        file = "cifar_new.py"
        small, other = PaperFigures("1.25", ""), PaperFigures("6.67", "", other=True)
        self.assertEqual(
            found.members,
            {
                "small": Member(TorchVariant(file, {"dim": 8}), small, 32, 10, "Small"),
                "other": Member(TorchVariant(file, {"dim": 9}), other, 32, 10, "Other"),
                "large": Member(TorchVariant(file, {"patch": 16}), None, 224, 10, "Large, 224 px"),
            },
        )
        self.assertEqual(found.decay_mask, "all")
        self.assertTrue(common.family("a", "A", variant, maker, names, {}).any_size)


class ChecksTest(parameterized.TestCase):
    def test_a_row(self):
        row = SimpleNamespace(depth=2, activation="gelu")
        architecture_checks.check_row(row, depth=2)
        with self.assertRaisesRegex(ValueError, "depth=2 must be at least 3"):
            architecture_checks.check_row(row, depth=3)
        row.activation = "sine"
        with self.assertRaisesRegex(
            ValueError, "activation='sine' is unknown; choose one of .*gelu"
        ):
            architecture_checks.check_row(row, depth=2)
