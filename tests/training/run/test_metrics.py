import os
import types
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest

from jaxrobust.runtime.files import jsonl
from jaxrobust.training.run import metrics, trackers
from tests.support import paths

ROOT = paths.ROOT


class MetricsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = Path(self.create_tempdir())
        self.path = self.workdir / "metrics.jsonl"

    def writer(self, phase, *, start=0, enabled=True):
        run = types.SimpleNamespace(
            workdir=self.workdir, name=phase, trackers=trackers.NONE, earlier_steps=0
        )
        return metrics.writer(run, start, enabled=enabled)

    def write(self, phase, start, steps):
        write = self.writer(phase, start=start)
        for step in steps:
            write(step, {"loss": step / 2})

    def test_resuming_leaves_each_step_once(self):
        self.write("pretrain", 0, [5])
        self.write("train", 0, [1, 2, 3])
        with self.path.open("a") as lines:
            lines.write('{"phase": "tra')  # killed while writing
        self.write("train", 1, [2, 3, 4])
        seen = [(row["phase"], row["step"]) for row in jsonl.read(self.path)]
        expected = [("pretrain", 5), ("train", 1), ("train", 2), ("train", 3), ("train", 4)]
        self.assertEqual(seen, expected)

    def test_other_processes_write_nothing(self):
        self.writer("train", enabled=False)(1, {"loss": 1.0})
        self.assertFalse(self.path.exists())

    def test_table_of_the_parameters(self):
        params = {"a.kernel": np.zeros((2, 3), np.float32), "a.bias": np.zeros(3, np.float32)}
        said = metrics.parameters(self.workdir, params, enabled=True)
        self.assertEqual(said, f"9 parameters in 2 arrays, listed in {self.workdir}/parameters.txt")
        table = (self.workdir / "parameters.txt").read_text()
        self.assertRegex(table, r"a\.kernel +\| \(2, 3\) +\| float32 +\| 6 ")
        self.assertIn("Total: 9", table)
        other = self.workdir / "other"
        metrics.parameters(other, params, enabled=False)
        self.assertFalse(other.exists())

    def test_nothing_is_open_between_two_lines(self):
        write = self.writer("train")
        for step in (1, 2):
            write(step, {"loss": 1.0})
            self.assertEqual(jsonl.read(self.path)[-1]["step"], step)
            links = Path("/proc/self/fd").glob("*")
            targets = [os.readlink(link) for link in links if link.is_symlink()]
            self.assertNotIn(str(self.path), targets)

    def test_replace_puts_the_content_on_disk_before_it_gives_it_the_name(self):
        events, sync, move = [], os.fsync, os.replace
        self.path.write_text("old")

        def synced(descriptor):
            sync(descriptor)
            events.append(("synced", os.fstat(descriptor).st_size))

        def moved(*names):
            events.append(("moved", self.path.read_text()))
            move(*names)

        with mock.patch.object(os, "fsync", synced), mock.patch.object(os, "replace", moved):
            jsonl.replace(self.path, "newer")
        self.assertEqual(events, [("synced", 5), ("moved", "old")])
        self.assertEqual(self.path.read_text(), "newer")
