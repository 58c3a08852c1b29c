"""The network and the images that an analysis looks at."""

from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.analysis.networks import network_sample
from jaxrobust.analysis.networks.network_sample import NetworkSample


class SeenTest(parameterized.TestCase):
    def seen(self, **flags) -> NetworkSample:
        """The sample of a function, which has no phases, and of digits."""
        file = Path(self.create_tempdir(), "own.py")
        file.write_text("def logits(x):\n    return x.reshape(len(x), -1)[:, :10]\n")
        named = {"function": f"{file}:logits", "dataset": "digits", "norm": "linf", "epsilon": 0.1}
        return network_sample.seen(named | flags)

    def test_a_function_and_the_first_images(self):
        sample = self.seen(n=3)
        self.assertRegex(sample.name, r"own\.py:logits$")  # and nothing behind it
        images, labels = data.load("digits", split="test[:3]", image_size=8)[:2]
        np.testing.assert_array_equal(sample.images, images)
        np.testing.assert_array_equal(sample.labels, labels)
        self.assertEqual(sample.ids.tolist(), [0, 1, 2])

    def test_0_is_all_images(self):
        self.assertLen(self.seen(n=0, split="test[:7]").images, 7)

    @parameterized.parameters(-1, 100_001)
    def test_no_number_of_images(self, n):
        with self.assertRaisesRegex(ValueError, f"--n={n} must be"):
            self.seen(n=n)

    def test_a_name_of_19_letters_is_cut_to_18(self):
        sample = self.seen(n=1)._replace(classes=("a" * 18, "b" * 19))
        self.assertEqual([sample.called(k) for k in range(3)], ["a" * 18, "b" * 17 + "…", "2"])


if __name__ == "__main__":
    absltest.main()
