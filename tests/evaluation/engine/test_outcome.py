"""What attacks leave, image by image: which stand, by one draw too, and what they become."""

from types import SimpleNamespace

import numpy as np
from absl.testing import absltest

from jaxrobust.evaluation.engine import outcome

CLEAN = np.array([True, True, True, False])
SETTINGS = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]


def begun(once: np.ndarray | None = None) -> outcome.Outcome:
    return outcome.Outcome.of(CLEAN, SETTINGS, {}, once)


class OutcomeTest(absltest.TestCase):
    def test_what_is_wrong_as_it_is_does_not_stand(self):
        made = begun()
        np.testing.assert_array_equal(made.standing, CLEAN)
        self.assertEqual([made.names[i] for i in made.fooled_by], ["", "", "", "clean"])
        made.strike("b (full)", [1])
        made.strike("replay", [2])
        names = [made.names[i] for i in made.fooled_by]
        self.assertEqual(names, ["", "b (full)", "replay", "clean"])
        np.testing.assert_array_equal(made.standing, [True, False, False, False])
        self.assertTrue(CLEAN[1])  # which belongs to the caller

    def test_images_that_are_left_aside_stand_again_afterwards(self):
        once = np.array([True, True, False, True])
        made, aside = begun(once), np.array([True, False, True, True])
        attacked = made.without(aside)
        np.testing.assert_array_equal(attacked.standing, [False, True, False, False])
        np.testing.assert_array_equal(attacked.once, [False, True, False, True])
        self.assertEqual((made.aside, attacked.aside), (0, 2))  # the last does not stand
        attacked.strike("a", [1])
        attacked.once[1] = False
        made.take(attacked, aside)
        np.testing.assert_array_equal(made.standing, [True, False, True, False])
        np.testing.assert_array_equal(made.once, [True, False, False, True])

    def test_an_image_that_stands_by_one_draw_is_attacked(self):
        np.testing.assert_array_equal(begun().of_interest(), CLEAN)
        by_one = np.array([False, False, False, True])
        np.testing.assert_array_equal(begun(by_one).of_interest(), [True] * 4)

    def test_reached(self):
        logits = np.float32([[3, 2, 1], [3, 2, 1], [0, np.nan, 1], [0, 1, np.inf]])
        found = outcome.reached(logits, np.array([0, 2, 0, 0]))
        self.assertEqual(found.tolist(), [1, 0, -1, -1])


if __name__ == "__main__":
    absltest.main()
