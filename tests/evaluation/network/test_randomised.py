"""How the answers of a network that draws are judged."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.network import randomised

LABELS = np.array([0, 0, 0, 0])
# Four images in four draws: right in 4, 3, 2 and 1 of them.
DRAWN = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)


def forward(number: int) -> np.ndarray:
    """Logits of three classes; a wrong answer is class 2, and closer than a right one."""
    right, wrong = (4.0, 0.0, 0.0), (0.0, 0.0, 1.0)
    return np.float32([right if row else wrong for row in DRAWN[number]])


class RulesTest(parameterized.TestCase):
    @parameterized.parameters(
        ("majority", 4, [True, True, False, False]),  # half of them is no majority
        # By the sums of probabilities 2.35 to 1.19, and 1.60 to 1.75 where one draw is right.
        ("mean", 4, [True, True, True, False]),
        ("one-draw", None, [True, True, True, True]),
    )
    def test_what_is_right(self, rule, draws, expected):
        how = randomised.verdict(rule, draws)
        found = randomised.answers(forward, how, LABELS, 3)
        self.assertEqual(found.right.tolist(), expected)
        self.assertEqual(found.once.tolist(), [True] * 4)
        self.assertTrue(found.finite.all())

    def test_a_draw_without_an_answer(self):
        def broken(number: int) -> np.ndarray:
            logits = forward(number)
            logits[0, 1] = np.nan if number == 3 else logits[0, 1]
            return logits

        found = randomised.answers(broken, randomised.verdict("majority", 4), LABELS, 3)
        self.assertEqual(found.right.tolist(), [True, True, False, False])
        self.assertEqual(found.finite.tolist(), [False, True, True, True])
        self.assertEqual(found.reached.tolist(), [-1, 2, 2, 2])

    @parameterized.parameters(
        (None, None, "majority of 20 draws", "majority"),
        ("majority", 1, "majority of 1 draws", "majority"),
        ("mean", 3, "mean of 3 draws", "mean"),
        ("one-draw", None, "one draw", ""),
        ("one-draw", 1, "one draw", ""),
    )
    def test_words_and_the_rule_of_the_search(self, rule, draws, words, tally):
        how = randomised.verdict(rule, draws)
        self.assertEqual((how.words(), how.tally), (words, tally))

    @parameterized.parameters(
        ("best", None, "rule='best' is unknown; one of majority, mean, one-draw"),
        ("one-draw", 2, "draws=2: the rule one-draw has one; leave draws out"),
        ("mean", 0, "draws=0: pass an int >= 1"),
        ("mean", True, "draws=True: pass an int >= 1"),
        (None, 2.0, "draws=2.0: pass an int >= 1"),
    )
    def test_what_cannot_be_meant(self, rule, draws, said):
        with self.assertRaisesRegex(ValueError, said):
            randomised.verdict(rule, draws)

    @parameterized.parameters(1, 7, 8, 9, 20)
    def test_which_images_stand_comes_back_from_a_record(self, n):
        values = np.arange(n) % 3 == 0
        text = randomised.packed(values)
        self.assertLen(text, 2 * -(-n // 8))
        np.testing.assert_array_equal(randomised.unpacked(text, n), values)


if __name__ == "__main__":
    absltest.main()
