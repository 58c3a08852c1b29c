"""A run whose workdir is in a bucket."""

import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxrobust.commands import compare, report
from jaxrobust.commands.results import runs
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.runtime.files import buckets, jsonl
from jaxrobust.training.run import start_runs
from tests.support import processes
from tests.support.bucket import BucketCase
from tests.support.command_line import called
from tests.support.evaluations import call, trained
from tests.support.runs import final_state, one_phase, quiet_run

_TIMES = ("data_wait", "images_per", "mfu", "memory", "chip")


class RunCase(BucketCase):
    def assert_same(self, run: Path, disk: Path, config: ConfigDict) -> None:
        """Compare two finished runs, but for what depends on time."""
        for name in ("config.json", "data.json", "train/selection.jsonl"):
            self.assertEqual((run / name).read_text(), (disk / name).read_text())
        rows = [self.learnt(place) for place in (run, disk)]
        self.assertEqual(*rows)
        states = [final_state(place, config) for place in (run, disk)]
        states = [jax.device_get(s._replace(key=jax.random.key_data(s.key))) for s, _ in states]
        jax.tree.map(np.testing.assert_array_equal, *states)

    def learnt(self, run: Path) -> list[dict]:
        """The lines of the metrics, without times."""
        rows = jsonl.read(run / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.startswith(_TIMES)} for row in rows]


class TrainingTest(RunCase):
    # Tasks of Orbax fail after the first one that did, and nothing awaits them.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.slow
    def test_gone_while_training_and_continued_in_the_same_bits(self):
        # What an evaluation finds changes no bit of the training, but takes long to compile.
        reached = {"clean": 0.5, "robust": 0.25, "images": 80}
        self.enter_context(mock.patch.object(accuracy, "count", return_value=reached))
        config, disk = one_phase(), Path(self.create_tempdir()) / "run"
        quiet_run(config, disk)
        run = self.opened()
        with (
            self.server.refusing("POST .*/latest/8/"),
            self.assertRaisesRegex(buckets.BucketError, "the last complete checkpoint .* step 4$"),
        ):
            quiet_run(config, run)
        self.assertRegex(start_runs.again(config, run), "continues .* step 4")
        with self.server.refusing("^GET"):
            sentence = "run the same command to continue at the last complete checkpoint"
            self.assertEqual(start_runs.again(config, run), sentence)
        self.killed()
        run = self.opened()
        quiet_run(config, run)
        self.assert_same(run, disk, config)


class HostsTest(RunCase):
    @pytest.mark.slow
    def test_two_of_which_one_is_killed_end_as_on_a_disk(self):
        folder, changes = Path(self.create_tempdir()), {"mesh__fsdp": 2, "test__steps": 1}
        command = [*processes.written(folder, **changes), "--multihost"]
        disk, config = folder / "run", one_phase(**changes)
        codes, said = processes.wait(processes.start(2, 1, [*command, f"--workdir={disk}"]), 600)
        self.assertEqual(codes, [0, 0], said)
        command += [f"--workdir={self.address}"]
        pod = processes.start(2, 1, command)
        for text in pod[0].stderr:
            if text.startswith("train 9/12"):
                break
        pod[1].kill()
        codes, _ = processes.wait(pod, 600)
        self.assertEqual(codes, [75, -9])
        codes, said = processes.wait(processes.start(2, 1, command), 600)
        self.assertEqual(codes, [0, 0], said)
        self.assertRegex(said[0], "train: step [48] of 12")
        self.assert_same(self.opened(), disk, config)


class CommandsTest(BucketCase):
    @pytest.mark.slow
    def test_listed_reported_compared_and_evaluated(self):
        trained(self.opened())
        buckets.close()
        found = {"attack": "clean", "n": 8, "workdir": self.address}
        code, _, said = call(**found)
        self.assertEqual(code, 0, said)
        code, _, said = call(**found, phase="pretrain")
        self.assertEqual(code, 0, said)
        buckets.close()
        mounted = str(self.objects / "runs" / "1")
        code, _, said = call(**found | {"workdir": mounted, "attack": "fgsm", "threat": "linf:0.1"})
        self.assertEqual(code, 0, said)
        self.assertIn("evaluation/results.jsonl.part-000001", self.names())
        for command, *words in (
            (runs, self.address.removesuffix("/1")),
            (report, self.address),
            (compare, *(f"{self.address}#{number}" for number in self.numbers())),
        ):
            code, out, said = called(command, *words)
            self.assertFalse(code, said)
            self.assertNotIn("/tmp/", out + said)
            buckets.close()
        self.assertIn("report.html", self.names())

    def numbers(self) -> list[str]:
        """Of the evaluations of the run."""
        files = sorted((self.objects / "runs/1/evaluation").glob("results.jsonl.part-*"))
        lines = "".join(file.read_text() for file in files).splitlines()
        return [json.loads(line)["evaluation"] for line in lines]
