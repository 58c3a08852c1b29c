"""Stages on several hosts: all choose and attack, the first one exports, and all end together."""

from pathlib import Path

import pytest
from absl.testing import absltest

import jaxrobust
from jaxrobust.runtime.files import jsonl
from jaxrobust.weights.trained import kept
from tests.support.processes import start, wait, written

PATIENCE = 600  # seconds: a training and two evaluations are compiled, in each process
THEN = "select,apgd-ce:linf:0.1+l2:0.5,export:jaxrobust"


class PodTest(absltest.TestCase):
    @pytest.mark.slow
    def test_two_processes(self):
        folder = Path(self.create_tempdir().full_path)
        run = folder / "run"
        command = written(folder, train__epochs=2, test__steps=1, test__images=40)
        command += [f"--workdir={run}", "--multihost", f"--then={THEN}", "--noestimate"]
        codes, said = wait(start(2, 1, command), PATIENCE)
        self.assertEqual(codes, [0, 0], said)
        chosen = kept.selected(run)
        rows = jsonl.read(run / "evaluation" / "results.jsonl")
        self.assertEqual([row["method"] for row in rows], ["apgd-ce", "apgd-ce", "union"])
        self.assertEqual({row["weights_sha256"] for row in rows}, {chosen.weights_sha256})
        notes = jsonl.read(run / "stages.jsonl")
        self.assertEqual([row["stage"] for row in notes], THEN.split(","))
        self.assertEqual(jaxrobust.load(str(run / "export" / "jaxrobust")).about["image_size"], 8)
        for stage in THEN.split(","):
            self.assertIn(f"{stage}: begins", said[0])
            self.assertNotIn(f"{stage}: begins", said[1])  # the first one speaks for all

        codes, said = wait(start(2, 1, command), PATIENCE)
        self.assertEqual(codes, [0, 0], said)
        self.assertEqual(said[0].count("already done, see"), 3)

        (run / "export" / "jaxrobust" / "config.json").write_text("{}")
        codes, said = wait(start(2, 1, command), PATIENCE)  # the first one refuses for both
        self.assertEqual(codes, [2, 2], said)
        for words in said:
            self.assertIn("contains something other than the export of these weights", words)
