"""L0 AutoAttack: Sparse-PGD with both gradients, then Sparse-RS."""

from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest

from jaxrobust.evaluation.records import verdicts
from tests.support.ensemble import IMAGES, LABELS, NETS, evaluate

STEPS = {"sparse-pgd": {"steps": 1}, "sparse-pgd-p": {"steps": 3}, "sparse-rs": {"steps": 100}}
N = 64


def pixels(result):
    """Count the changed pixels of each adversarial image."""
    return (result.images_adv != IMAGES[:N]).any(3).sum((1, 2))


@pytest.mark.computes
class SparseAutoAttackTest(absltest.TestCase):
    def evaluate(self, epsilon, **changes):
        settings = {"norm": "L0", "epsilon": epsilon, "overrides": STEPS, "batch_size": 8}
        return evaluate(NETS["lin"], IMAGES[:N], LABELS[:N], **settings | changes)

    def test_cascade(self):
        path = Path(self.create_tempdir()) / "ledger.jsonl"
        result = self.evaluate(6, ledger=path)
        fooled = result.clean & ~result.robust
        self.assertContainsSubset(("sparse-pgd", "sparse-pgd-p"), result.fooled_by)
        self.assertEqual([cost.attack for cost in result.costs], [*STEPS])
        self.assertTrue(result.robust.any())
        np.testing.assert_array_equal(result.verdicts.norms[fooled], pixels(result)[fooled])
        self.assertBetween(pixels(result)[fooled].min(), 1, 6)
        self.assertLessEqual(pixels(result).max(), 6)
        classes = np.asarray(NETS["lin"](result.images_adv)).argmax(1)
        np.testing.assert_array_equal(classes == LABELS[:N], result.robust)
        self.assertEqual(result.costs[2].backward, 0)
        again = self.evaluate(6, ledger=path)
        self.assertEqual(sum(cost.forward for cost in again.costs), 0)
        np.testing.assert_array_equal(again.fooled_by, result.fooled_by)

    def test_other_radii_replay(self):
        found, paths = {}, []
        for epsilon in (3, 9):
            paths.append(Path(self.create_tempdir()) / "ledger.jsonl")
            found[epsilon] = self.evaluate(epsilon, ledger=paths[-1])
        result = self.evaluate(6, replay=paths)
        by_replay = result.fooled_by == verdicts.REPLAY
        self.assertTrue(by_replay[found[3].clean & ~found[3].robust].all())
        self.assertLessEqual(pixels(result).max(), 6)
        self.assertTrue((pixels(result)[by_replay] > 3).any())  # pulled in from the larger radius


if __name__ == "__main__":
    absltest.main()
