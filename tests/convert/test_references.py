"""Where RobustBench looks for files."""

from pathlib import Path

from absl.testing import absltest, parameterized

from jaxrobust.convert import references


class PlaceTest(parameterized.TestCase):
    @parameterized.parameters(
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


if __name__ == "__main__":
    absltest.main()
