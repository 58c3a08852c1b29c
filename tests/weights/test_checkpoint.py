"""Which folders are checkpoints, and which of them is the newest."""

from pathlib import Path

from absl.testing import absltest

from jaxrobust.weights.store import checkpoint


class StepsTest(absltest.TestCase):
    def test_they_are_in_the_order_of_their_numbers(self):
        folder = Path(self.create_tempdir())
        for name in ("9", "10", "100", "0", "007", "12.orbax-checkpoint-tmp", "latest"):
            (folder / name).mkdir()
        (folder / "11").write_text("a file")
        self.assertEqual(checkpoint.steps(folder), [0, 9, 10, 100])


if __name__ == "__main__":
    absltest.main()
