"""What the line of progress says about speed and about waiting for data."""

import time

from absl.testing import absltest, parameterized

from jaxrobust import progress


class DataWaitTest(parameterized.TestCase):
    def watch(self, waits, workers=2):
        """What is shown and said of windows that last a second and wait for data so long."""
        said = []
        now = [0.0]
        with (
            absltest.mock.patch.object(time, "perf_counter", lambda: now[0]),
            absltest.mock.patch.object(progress, "say", said.append),
            progress.Progress("train", 0, 100, 8, workers) as shown,
        ):
            with shown.waiting():
                now[0] += 30.0  # the first batch: workers start, nothing counts
            rates = []
            for step, wait in enumerate(waits, 1):
                with shown.waiting():
                    now[0] += wait
                now[0] += 1.0 - wait
                rates.append(shown.show(step, {"loss": 1.0}))
        return rates, said

    def test_share_and_speed(self):
        rates, said = self.watch([0.0, 0.04, 0.3])
        self.assertAlmostEqual(rates[1]["data_wait"], 0.04)
        self.assertAlmostEqual(rates[2]["data_wait"], 0.3)
        for rate in rates:
            self.assertAlmostEqual(rate["images_per_second"], 8)
        self.assertLen(said, 1)
        self.assertRegex(
            said[0],
            r"train: waited for data 30% of the time up to step 3; raise data.workers \(now 2 of "
            r"\d+ cores\) or choose a cheaper data.augmentation",
        )

    def test_says_so_when_it_passes_the_limit_not_in_every_line(self):
        _, said = self.watch([0.3, 0.3, 0.0, 0.3], workers=0)
        self.assertLen(said, 2)
        self.assertIn("now 0: threads", said[0])


if __name__ == "__main__":
    absltest.main()
