"""What the line of progress says about speed and about waiting for data."""

import time

from absl.testing import absltest, parameterized

from jaxrobust import progress


class Watcher:
    """A thread pool that knows when the device will be done."""

    def __init__(self, now):
        self.now = now

    def submit(self, function, done):
        return absltest.mock.Mock(done=lambda: done[0] <= self.now[0], result=lambda: done[0])

    def shutdown(self, wait):
        pass


class DataWaitTest(parameterized.TestCase):
    def watch(self, steps, workers=2):
        """What is shown and said of steps of a second.

        A step is (seconds until its batch is there, seconds until the device is done with the step
        before), both from when the batch is asked for.
        """
        said, now, done = [], [0.0], [0.0]
        with (
            absltest.mock.patch.object(time, "perf_counter", lambda: now[0]),
            absltest.mock.patch.object(progress, "say", said.append),
            absltest.mock.patch.object(progress, "ThreadPoolExecutor", lambda *_: Watcher(now)),
            progress.Progress("train", 0, 100, 8, workers) as shown,
        ):
            with shown.waiting():
                now[0] += 30.0  # the first batch: workers start, nothing counts
            shown.dispatched(done)
            rates = []
            for step, (batch, device) in enumerate(steps, 1):
                done[0] = now[0] + device
                with shown.waiting():
                    now[0] += batch
                shown.dispatched(done)
                now[0] += 1.0 - batch
                rates.append(shown.show(step, {"loss": 1.0}))
        return rates, said

    def test_only_the_time_without_a_step_counts(self):
        """Data that is slower than the loop, but not than the device, is no bottleneck."""
        rates, said = self.watch([(0.9, 0.95), (0.9, 0.88), (0.9, -0.1)])
        for rate, share in zip(rates, (0.0, 0.02, 0.9), strict=True):
            self.assertAlmostEqual(rate["data_wait"], share)
        self.assertLen(said, 1)

    def test_share_and_speed(self):
        rates, said = self.watch([(0.0, 0.0), (0.04, 0.0), (0.3, 0.0)])
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
        _, said = self.watch([(0.3, 0.0), (0.3, 0.0), (0.0, 0.0), (0.3, 0.0)], workers=0)
        self.assertLen(said, 2)
        self.assertIn("now 0: threads", said[0])


if __name__ == "__main__":
    absltest.main()
