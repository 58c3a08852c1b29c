"""What somebody may have meant, at the end of a message and at its beginning."""

from absl.testing import parameterized

from jaxrobust.runtime.text import spelling
from tests.support import sweeps

KNOWN = ["digits", "cifar10"]


class SpellingTest(parameterized.TestCase):
    @sweeps.rows(
        ("digitz", "did you mean digits?", "did you mean digits? "),
        ("digits", "did you mean digits?", ""),
        ("x", "one of digits, cifar10", ""),
    )
    def test_the_nearest_word(self, word, end, beginning):
        self.assertEqual(spelling.meant(word, KNOWN), end)
        self.assertEqual(spelling.near(word, iter(KNOWN)), beginning)

    def test_a_word_of_ones_own_would_do_as_well(self):
        self.assertEqual(
            spelling.meant("x", KNOWN, give="a file or "), "a file or one of digits, cifar10"
        )

    @sweeps.rows(
        ("Linf", "linf"), (" L2", "l2"), ("L1 ", "l1"), ("L3", "L3"), ("linfinity", "linfinity")
    )
    def test_norms(self, given, spelled):
        self.assertEqual(spelling.norm(given), spelled)

    @sweeps.rows(
        ("CIFAR-10", "cifar10"),
        ("cifar_100", "cifar100"),
        (" ImageNet-1k", "imagenet2012"),
        ("imagenet", "imagenet2012"),
        ("torch/cifar10", "cifar10"),
        ("tfds/imagenet2012", "imagenet2012"),
        ("torch/mnist", "torch/mnist"),
        ("folder:cifar-10", "folder:cifar-10"),
        ("runs/cifar10", "runs/cifar10"),
    )
    def test_data_sets(self, given, spelled):
        self.assertEqual(spelling.dataset(given), spelled)

    @sweeps.rows((0, "0 steps"), (1, "1 step"), (2, "2 steps"))
    def test_numbers_of_things(self, number, words):
        self.assertEqual(spelling.counted(number, "step"), words)
