"""What AutoAttack's attacks cost, against a count by hand from their papers."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.attacks import ensembles


class CostTest(parameterized.TestCase):
    @parameterized.parameters(
        # A step of APGD is one forward and one backward pass; the start takes one more of each.
        ("apgd-ce", "linf", 1, 1, 101 * 2),
        ("apgd-t", "linf", 1, 1, 9 * 101 * 2),
        # FAB differentiates all ten logits, or one difference; then it looks where it has come.
        ("fab", "linf", 2, 10, 5 * 100 * 12),
        ("fab-t", "l2", 2, 1, 9 * 100 * 3),
        ("square", "linf", 1, 0, 5001),
    )
    def test_passes(self, name, norm, forward, backward, most):
        setting = ensembles.base(name, norm)
        self.assertEqual(ensembles.forward(setting), forward)
        self.assertEqual(ensembles.backward(setting, 10), backward)
        self.assertEqual(ensembles.passes(setting, 10), forward + backward)
        self.assertEqual(ensembles.most_passes(setting, 10), most)

    def test_draws_of_a_random_network_are_passes(self):
        of_rand = ensembles.plan("linf", "rand", None, None)[0]
        self.assertEqual((ensembles.forward(of_rand), ensembles.backward(of_rand, 10)), (20, 20))


class TargetsTest(absltest.TestCase):
    def test_of_equal_logits_the_last_class_comes_first(self):
        logits = np.float32([[0.5, 3.0, 0.5, 1.0, 0.5], [9.0, 2.0, 2.0, 2.0, 2.0]])
        likely = ensembles.ranks(logits, np.array([1, 0]), 3)
        self.assertEqual(likely.tolist(), [[3, 4, 2], [4, 3, 2]])


if __name__ == "__main__":
    absltest.main()
