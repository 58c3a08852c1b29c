"""Whether two splits share images, as far as their names say."""

from absl.testing import absltest, parameterized

from jaxrobust.data import splits


class OverlapTest(parameterized.TestCase):
    @parameterized.parameters(
        ("test", "test", True),
        ("test", "test[:1000]", True),
        ("test[:1000]", "test[1000:]", False),
        ("test[:1000]", "test[999:]", True),
        ("train[98%:]", "train[:98%]", False),
        ("train[90%:]", "train[:98%]", True),
        ("val", "validation", True),
        ("train", "test", False),
        ("validation@selection", "validation@robustbench", False),
        ("validation@robustbench[:1000]", "validation@robustbench[:500]", True),
        ("validation", "val@robustbench", True),
        ("test[:1000]", "test[90%:]", True),  # it may
    )
    def test_by_their_names(self, one, other, expected):
        self.assertEqual(splits.overlap(one, other), expected)
        self.assertEqual(splits.overlap(other, one), expected)


if __name__ == "__main__":
    absltest.main()
