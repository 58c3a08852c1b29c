"""Which folders are checkpoints, and which of them is the newest."""

from pathlib import Path

import numpy as np
from absl.testing import absltest

from jaxrobust.weights.store import checkpoint


class StepsTest(absltest.TestCase):
    def test_they_are_in_the_order_of_their_numbers(self):
        folder = Path(self.create_tempdir())
        for name in ("9", "10", "100", "0", "007", "12.orbax-checkpoint-tmp", "latest"):
            (folder / name).mkdir()
        (folder / "11").write_text("a file")
        self.assertEqual(checkpoint.steps(folder), [0, 9, 10, 100])


class KeptTest(absltest.TestCase):
    def opened(self, folder: Path, **how) -> checkpoint.Checkpoints:
        made = checkpoint.Checkpoints(folder, **how)
        self.addCleanup(made.close)
        return made

    def test_a_new_step_replaces_the_one_before(self):
        folder = Path(self.create_tempdir())
        last = self.opened(folder)
        for step in (3, 5):
            last.save(step, {"w": np.full(2, step, np.float32)}, {"step": step})
        last.wait()
        self.assertEqual((checkpoint.steps(folder), last.latest_step()), ([5], 5))
        self.assertEqual(last.meta(5), {"step": 5})

    def test_only_who_keeps_the_last_removes_those_before(self):
        """At the start too: a kill may have left two."""
        folder = Path(self.create_tempdir())
        every = self.opened(folder, keep_all=True)
        for step in (3, 5):
            every.save(step, {"w": np.full(2, step, np.float32)}, {})
        every.wait()
        for how in ({"read_only": True}, {"keep_all": True}):
            self.opened(folder, **how)
            self.assertEqual(checkpoint.steps(folder), [3, 5], how)
        self.opened(folder)
        self.assertEqual(checkpoint.steps(folder), [5])


if __name__ == "__main__":
    absltest.main()
