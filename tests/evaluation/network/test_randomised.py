"""How the answers of a network that draws are judged."""

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.network import randomised
from tests.support import sweeps


class RulesTest(parameterized.TestCase):
    @sweeps.rows(
        (None, None, "majority of 20 draws", "majority"),
        ("majority", 1, "majority of 1 draws", "majority"),
        ("mean", 3, "mean of 3 draws", "mean"),
        ("one-draw", None, "one draw", ""),
        ("one-draw", 1, "one draw", ""),
    )
    def test_words_and_the_rule_of_the_search(self, rule, draws, words, tally):
        how = randomised.verdict(rule, draws)
        self.assertEqual((how.words(), how.tally), (words, tally))

    @sweeps.rows(
        ("best", None, "rule='best' is unknown; choose one of majority, mean, one-draw"),
        ("one-draw", 2, "draws=2 contradicts the rule one-draw; leave draws out"),
        ("mean", 0, "draws=0 must be an int >= 1"),
        ("mean", True, "draws=True must be an int >= 1"),
        (None, 2.0, "draws=2.0 must be an int >= 1"),
    )
    def test_what_cannot_be_meant(self, rule, draws, said):
        with self.assertRaisesRegex(ValueError, said):
            randomised.verdict(rule, draws)

    @sweeps.rows(1, 7, 8, 9, 20)
    def test_which_images_stand_comes_back_from_a_record(self, n):
        values = np.arange(n) % 3 == 0
        text = randomised.packed(values)
        self.assertLen(text, 2 * -(-n // 8))
        np.testing.assert_array_equal(randomised.unpacked(text, n), values)
