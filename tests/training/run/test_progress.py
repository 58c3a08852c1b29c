"""What the line of progress says about speed and about waiting for data."""

import contextlib
import io
import os
import sys
import time
from types import SimpleNamespace

import jax
from absl.testing import absltest, parameterized

from jaxrobust.config import Values
from jaxrobust.runtime.devices import compilation, hardware
from jaxrobust.runtime.text import panel
from jaxrobust.training.run import phase_progress
from tests.support import screens, sweeps


def progress(batch=8, *, workers=2, step=0, total=100, phases=("train",), **settings):
    """The line of a phase of 100 steps."""
    config = {"train": SimpleNamespace(batch_size=batch)}
    config = Values(config | {"phases": phases, "data": SimpleNamespace(workers=workers)})
    return phase_progress.Progress(config, "train", step, total, **settings)


class Watcher:
    """A thread pool that knows when the device will be done."""

    def __init__(self, now):
        self.now = now

    def submit(self, function, step, done):
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
            absltest.mock.patch.object(phase_progress, "say", said.append),
            absltest.mock.patch.object(
                phase_progress, "ThreadPoolExecutor", lambda *_: Watcher(now)
            ),
            progress(workers=workers) as shown,
        ):
            with shown.waiting():
                now[0] += 30.0  # the first batch: workers start, nothing counts
            shown.dispatched(0, done)
            rates = []
            for step, (batch, device) in enumerate(steps, 1):
                done[0] = now[0] + device
                with shown.waiting():
                    now[0] += batch
                shown.dispatched(step, done)
                now[0] += 1.0 - batch
                rates.append(shown.show(step, {"loss": 1.0}))
        return rates, said

    def test_only_the_time_without_a_step_counts(self):
        """Data that is slower than the loop, but not than the device, is not a bottleneck."""
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
            r"train: spent 30% of the time up to step 3 waiting for data; raise data.workers \(now "
            r"2 of \d+ cores\) or choose a cheaper data.augmentation",
        )

    def test_says_so_when_it_passes_the_limit_not_in_every_line(self):
        _, said = self.watch([(0.3, 0.0), (0.3, 0.0), (0.0, 0.0), (0.3, 0.0)], workers=0)
        self.assertLen(said, 2)
        self.assertIn("now 0: threads", said[0])


@contextlib.contextmanager
def pod(*, chips, kind, peak):
    """(clock, what is said) where JAX has these devices."""
    device = absltest.mock.Mock(device_kind=kind)
    device.memory_stats = lambda: peak and {"peak_bytes_in_use": peak[0]}
    now, said = [0.0], []
    patch = absltest.mock.patch.object
    with (
        patch(jax, "device_count", lambda: chips),
        patch(jax, "devices", lambda: [device]),
        patch(jax, "local_devices", lambda: [device] * chips),
        patch(jax, "default_backend", lambda: kind),
        patch(time, "perf_counter", lambda: now[0]),
        patch(phase_progress, "say", said.append),
    ):
        yield now, said


class CostTest(parameterized.TestCase):
    def costs(self, *, batch=8, flops_per_image=None, **devices):
        """(lines, figures) of a step of a second, after 10 chip-hours."""
        lines = io.StringIO()
        with (
            pod(**devices) as (now, said),
            absltest.mock.patch.object(sys, "stderr", lines),
            progress(batch, flops_per_image=flops_per_image, chip_hours=10.0) as shown,
        ):
            now[0] += 1.0
            figures = shown.show(1, {"loss": 2.1234, "clean": 0.954})
        return [*lines.getvalue().splitlines(), *said], figures

    def test_a_line_on_one_cpu_device_is_about_speed_alone(self):
        lines, shown = self.costs(chips=1, kind="cpu", peak=None)
        self.assertEqual(lines, ["train 1/100 loss 2.1234 batch clean 95.4% 8 images/s ETA 1:39"])
        self.assertEqual(shown["images_per_second_per_chip"], 8)
        self.assertNoCommonElements(shown, ("mfu", "peak_memory_bytes"))

    def test_no_time_left_before_there_is_a_speed(self):
        """A trace that begins after the last step leaves out the time of all of them."""
        with (
            pod(chips=1, kind="cpu", peak=None),
            absltest.mock.patch.object(sys, "stderr", io.StringIO()) as lines,
            progress() as shown,
        ):
            shown.resume(2)
            shown.show(2, {"loss": 1.0})
        self.assertEndsWith(lines.getvalue(), "0 images/s ETA unknown\n")

    def test_what_a_pod_costs(self):
        """64 v5e, each of which takes an image a second."""
        flops = 0.25 * hardware.chip("TPU v5e").flops
        lines, shown = self.costs(
            chips=64, kind="TPU v5e", peak=[12 * 2**30], batch=64, flops_per_image=flops
        )
        said = "train: at most 12.0 of 16 GiB in use per device, 10.0 chip-hours so far on 64"
        self.assertEqual(
            lines,
            [
                "train 1/100 loss 2.1234 batch clean 95.4% 1 images/s/chip MFU 25.0% ETA 1:39",
                f"{said} devices",
                f"{said} devices",  # at the end again
            ],
        )
        self.assertEqual(shown["images_per_second"], 64)
        self.assertEqual(shown["images_per_second_per_chip"], 1)
        self.assertAlmostEqual(shown["mfu"], 0.25)
        self.assertEqual(shown["peak_memory_bytes"], 12 * 2**30)
        self.assertAlmostEqual(shown["chip_hours"], 10 + 64 / 3600)

    def test_an_unknown_device_has_no_utilisation(self):
        lines, shown = self.costs(chips=2, kind="Toy 1", peak=[2**30], flops_per_image=1e9)
        self.assertNotIn("mfu", shown)
        self.assertIn("4 images/s/chip ETA", lines[0])
        self.assertIn("at most 1.0 GiB in use per device, ", lines[1])

    def test_memory_is_said_again_when_it_has_grown(self):
        peak = [2**30]
        with (
            pod(chips=1, kind="Toy 1", peak=peak) as (_, said),
            progress() as shown,
        ):
            for step, more in enumerate((2**30, 2**30 + 2**20, 2**31, 2**31), 1):
                peak[0] = more
                shown.show(step, {"loss": 1.0})
        self.assertLen(said, 3)  # at first, when it doubled, at the end
        self.assertIn("at most 2.0 GiB", said[1])

    @sweeps.rows(
        (100, "loss 2.1234 batch clean 95.4% robust 45.1%", "pretrain done, train now"),
        (40, "loss 2.1234", "pretrain done, train now"),
        (24, "loss 2.1234", "train now"),
    )
    def test_what_a_terminal_is_too_narrow_for_is_left_out(self, columns, learns, phases):
        """The time left stays."""
        with (
            terminal(columns) as (screen, now),
            progress(step=12000, total=62500, phases=("pretrain", "train")) as shown,
        ):
            now[0] += 1
            shown.show(12001, {"loss": 2.1234, "clean": 0.954, "robust": 0.451})
        lines = screens.last_frame(screen.getvalue())
        self.assertLess(max(map(len, lines)), columns)
        rows = dict(line.strip("│ ").split(maxsplit=1) for line in lines if " " in line.strip())
        self.assertEqual((rows["learns"], rows["phases"]), (learns, phases))
        self.assertEqual((rows["left"], rows["speed"]), ("14:01:39", "8 images/s"))
        self.assertEqual(rows["step"], "12,001 of 62,500")
        self.assertStartsWith(rows["19%"], "━")

    def test_the_panel_moves_with_every_step(self):
        """Also where a line of figures comes much later; the time left is known from the second."""
        with terminal(80) as (screen, now), progress() as shown:
            for step in (1, 2, 3):
                now[0] += 2
                shown.dispatched(step, {"loss": 1.0})
                self.assertEqual(shown._last_step.result(), now[0])
        text = screens.plain(screen.getvalue())
        for step, left in ((0, "unknown"), (1, "unknown"), (2, "3:16"), (3, "3:14")):
            self.assertRegex(text, rf"step +{step} of 100 [ │]*\n[│ ]*left +{left} ")

    @sweeps.rows(
        (100, "compiling the step (took 41 s last time)"), (40, "compiling the step (took 41 s")
    )
    def test_the_panel_is_there_before_the_first_step_and_says_what_compiles(self, columns, now):
        cache = self.create_tempdir().full_path
        self.enter_context(absltest.mock.patch.dict(os.environ, XDG_CACHE_HOME=cache))
        compilation.remember("step of train", 41.2, hit=False)
        phases = ("pretrain", "train")
        with (
            terminal(columns) as (screen, _),
            phase_progress.begun("train", 0, 100, phases=phases),
        ):
            self.assertIn("pretrain done, train now", screen.getvalue())
            with phase_progress.compiling("train", "the step", "step of train", always=True):
                lines = screens.last_frame(screen.getvalue())
            self.assertLess(max(map(len, lines)), columns)
            rows = dict(line.strip("│ ").split(maxsplit=1) for line in lines if "now  " in line)
            self.assertStartsWith(rows["now"], now)
            self.assertNotIn("train:", screens.plain(screen.getvalue()))
            with progress(phases=phases):
                lines = screens.last_frame(screen.getvalue())  # of the same panel
            self.assertIn("step   0 of 100", " ".join(lines))
            self.assertNotIn("compiling", " ".join(lines))
            self.assertTrue(panel.is_live())

    def test_a_pipe_gets_a_line_of_what_compiles(self):
        with (
            pod(chips=1, kind="cpu", peak=None) as (_, said),
            absltest.mock.patch.object(compilation, "expected", return_value="took 41 s last time"),
            absltest.mock.patch.object(compilation, "remember"),
            absltest.mock.patch.object(sys, "stderr", io.StringIO()) as lines,
            phase_progress.begun("train", 0, 100, phases=("train",)),
            phase_progress.compiling("train", "the step", "step of train", always=True),
        ):
            pass
        self.assertEqual(said, ["train: compiling the step (took 41 s last time)"])
        self.assertEqual(lines.getvalue(), "")


@contextlib.contextmanager
def terminal(columns):
    """(what is written on it, the clock) of a terminal of that width."""
    screen = io.StringIO()
    screen.isatty, screen.fileno = lambda: True, lambda: 2
    size = os.terminal_size((columns, 30))
    patch = absltest.mock.patch.object
    with (
        pod(chips=1, kind="cpu", peak=None) as (now, _),
        patch(sys, "stderr", screen),
        patch(os, "get_terminal_size", lambda *_: size),
        absltest.mock.patch.dict(os.environ, TERM="xterm"),
        patch(panel, "_EVERY_S", -1.0),
    ):
        yield screen, now
