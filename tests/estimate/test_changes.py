"""Which words of a command line change the config."""

from absl.testing import absltest, parameterized

from jaxrobust.estimate import changes


class DividedTest(parameterized.TestCase):
    @parameterized.parameters(
        ("quickstart --on cpu", "quickstart --on cpu", ""),
        ("--config.seed=1 quickstart --on cpu", "quickstart --on cpu", "--config.seed=1"),
        ("quickstart --config.seed 1 --on cpu", "quickstart --on cpu", "--config.seed 1"),
        # A negative number is a value, and a flag is none.
        ("quickstart --config.seed -1 --on cpu", "quickstart --on cpu", "--config.seed -1"),
        ("q --config.data.strict --on cpu", "q --on cpu", "--config.data.strict"),
        ("q --noconfig.data.strict --on cpu", "q --on cpu", "--noconfig.data.strict"),
        ("q -config.seed=1 --on cpu", "q --on cpu", "-config.seed=1"),
        ("q --configs.seed=1", "q --configs.seed=1", ""),
    )
    def test_each_word_goes_to_one_side(self, words, own, changing):
        found = changes.divided(words.split())
        self.assertEqual(found, (own.split(), changing.split()))


if __name__ == "__main__":
    absltest.main()
