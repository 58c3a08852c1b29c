"""What is said of progress: times for people, and lines that fit a terminal."""

from absl.testing import absltest, parameterized

from jaxrobust.runtime.text import progress


class ClockTest(parameterized.TestCase):
    @parameterized.parameters(
        (0, "0:00"), (59.9, "0:59"), (61, "1:01"), (600, "10:00"),
        (3600, "1:00:00"), (3 * 3600 + 4 * 60 + 5, "3:04:05"), (100 * 3600, "100:00:00"),
    )  # fmt: skip
    def test_times(self, seconds, said):
        self.assertEqual(progress.clock(seconds), said)


if __name__ == "__main__":
    absltest.main()
