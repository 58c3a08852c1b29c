"""Where RobustBench looks for files."""

from pathlib import Path

from absl.testing import absltest, parameterized

from jaxrobust import convert
from jaxrobust.publish import references
from jaxrobust.weights.naming import convert as converting
from tests.support import sweeps


class PlaceTest(parameterized.TestCase):
    @sweeps.rows(
        (  # below `model_dir`, as their own row names it
            "Singh2023Revisiting_ConvNeXt-T-ConvStem",
            "imagenet/Linf/Singh2023Revisiting_ConvNeXt-T-ConvStem.pt",
        ),
        (  # a link, which torch.hub keeps in its cache
            "Debenedetti2022Light_XCiT-S12",
            "hub/checkpoints/debenedetti2022light-xcit-s-imagenet-linf.pth.tar",
        ),
    )
    def test_place(self, key, expected):
        self.assertEqual(references.place(Path("folder"), key), Path("folder") / expected)


class ConvertedTest(absltest.TestCase):
    def test_functions_are_imported_when_they_are_asked_for(self):
        for name in ("from_torch", "to_torch"):
            self.assertIs(getattr(convert, name), getattr(converting, name))
        with self.assertRaisesRegex(AttributeError, "'jaxrobust.convert' has no attribute 'other'"):
            _ = convert.other
        self.assertFalse(hasattr(convert, "StoredNames"))  # which stands next to them there
