"""Where the time of a run goes: what is recorded, what a restart undoes, and that it adds up."""

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import parameterized

from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.files import jsonl
from jaxrobust.training.run import goodput
from tests.support import sweeps

CHILD = """
import os, signal, sys, time
from pathlib import Path
from tests.support.runs import one_phase, quiet_run
from jaxrobust.training.run import goodput, splits

def device_batch(mesh, batch, real=splits.device_batch, seen=[]):
    seen.append(0)
    if len(seen) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(mesh, batch)

splits.device_batch, goodput.EVERY_S = device_batch, 0.0
print(time.time(), flush=True)
quiet_run(one_phase(train__epochs=2), Path(sys.argv[1]))
print(time.time())
"""


def at(second: float) -> str:
    return datetime.datetime.fromtimestamp(second, datetime.UTC).isoformat()


def start(second: float, alive: float | None = None) -> dict:
    return {"start": at(second), "alive": None if alive is None else at(alive)}


def line(second: float, step: int, phase: str = "train", **seconds: float) -> dict:
    return {"time": at(second), "phase": phase, "step": step, "seconds": seconds}


FIRST = [start(0), line(5, 0, starting=5.0), line(25, 10, training=18.0, data=2.0)]
MORE = [*FIRST, line(28, 10, saving=3.0), line(48, 20, training=20.0)]


class TotalTest(parameterized.TestCase):
    @sweeps.rows(
        (FIRST, 18.0, 0.0, 0.0, 0),
        # It ends with everything saved, and continues at the same step.
        ([*MORE, start(60, 48), line(70, 20, starting=10.0)], 38.0, 0.0, 12.0, 1),
        # Killed after step 20, it continues at 10: half of the work, and the last seconds.
        ([*MORE, start(60, 50), line(70, 10, starting=10.0)], 18.0, 22.0, 10.0, 1),
        # It continues within a line, then at the start; work is undone only once.
        ([*MORE, start(60), line(61, 15, starting=1.0)], 28.0, 10.0, 12.0, 1),
        ([*MORE, start(60), line(61, 15), line(62, 10), line(63, 0)], 0.0, 43.0, 12.0, 1),
        # Another phase does not undo this one; a sign of life before the last line is outdated.
        ([*MORE, start(60, 30), line(70, 0, "more", training=10.0)], 48.0, 0.0, 12.0, 1),
    )
    def test_what_going_back_undoes(self, rows, training, repeated, between, restarts):
        found = goodput.total(rows)
        self.assertAlmostEqual(found.seconds["training"], training)
        self.assertAlmostEqual(found.seconds["repeated"], repeated)
        self.assertAlmostEqual(found.between, between)
        self.assertEqual(found.restarts, restarts)
        self.assertEqual(goodput.total([]), None)

    def test_the_sentence_and_the_json(self):
        found = goodput.total([*MORE, start(60, 50), line(70, 10, starting=10.0)])
        self.assertEqual(
            found.line(),
            "Goodput 30.0%. Working time 1:00: work repeated after a restart or a rollback 36.7%, "
            "training 30.0%, starting 25.0%, saving 5.0%, waiting for data 3.3%. In addition, no "
            "process ran for 0:10 before 1 restart.",
        )
        given = found.plain()
        self.assertEqual((given["share"], given["between_restarts"]), (0.3, 10.0))


class ClockTest(parameterized.TestCase):
    def test_kinds_and_lines(self):
        folder, now, compiled = Path(self.create_tempdir()), [100.0], [3.0]
        self.enter_context(mock.patch.object(time, "perf_counter", lambda: now[0]))
        self.enter_context(mock.patch.object(compilation, "seconds", lambda: compiled[0]))
        with goodput.Clock(folder) as unused:
            unused.reached("train", 0)
        self.assertFalse((folder / goodput.FILE).exists())  # nothing was left to do
        (folder / "lock").touch()
        os.utime(folder / "lock", (7, 7))
        with goodput.Clock(folder) as clock:
            now[0] += 4
            with clock.of("training"):
                clock.reached("train", 2, write=True)
                now[0] += 8
                clock.move("data", 1.5)
                with clock.of("evaluating"):
                    now[0], compiled[0] = now[0] + 6, compiled[0] + 5
                clock.reached("train", 3)  # not a minute later
                now[0] += goodput.EVERY_S
                clock.reached("train", 4)
            now[0] += 2
        first, *rows = jsonl.read(folder / goodput.FILE)
        self.assertEqual(first["alive"], "1970-01-01T00:00:07+00:00")
        self.assertEqual([row["step"] for row in rows], [2, 4, 4])
        spent = {"compiling": 5.0, "training": 66.5, "data": 1.5, "evaluating": 1.0}
        self.assertEqual(
            [row["seconds"] for row in rows], [{"starting": 4.0}, spent, {"starting": 2.0}]
        )


@pytest.mark.slow
class KilledTest(parameterized.TestCase):
    def test_the_sum_is_the_wall_time(self):
        run = Path(self.create_tempdir()) / "run"
        clocks = []
        for kill, code in ((7, -9), (0, 0)):
            words = [sys.executable, "-c", CHILD, str(run), str(kill)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
            self.assertEqual(done.returncode, code)
            clocks += map(float, done.stdout.split())
        found = goodput.total(jsonl.read(run / goodput.FILE))
        wall = clocks[-1] - clocks[0]
        self.assertAlmostEqual(sum(found.seconds.values()) + found.between, wall, delta=1.0)
        self.assertEqual(found.restarts, 1)
        self.assertTrue(all(seconds > 0 for seconds in found.seconds.values()), found)
