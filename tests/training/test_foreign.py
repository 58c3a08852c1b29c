"""A run of a network that is not ours, from the first step to its record."""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from jaxrobust.commands.conversion import export_weights
from jaxrobust.publish import export_torch
from jaxrobust.training import build
from jaxrobust.training.run import run as training_run
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.store import hashes
from tests.support import result_lines
from tests.support import runs as training
from tests.support.evaluations import call
from tests.support.foreign import written


def config(name="my_nets.py:make", **changes):
    found = training.tiny(
        **{"pretrain__epochs": 1, "pretrain__warmup_epochs": 0, "train__epochs": 2} | changes
    )
    with found.unlocked():
        found.model.name, found.model.options = name, ConfigDict({"width": 4})
        if name.endswith("linear"):
            found.model.options = ConfigDict()
    return found


@pytest.mark.slow
class RunTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.enterClassContext(contextlib.chdir(folder))
        cls.source = written(Path.cwd())
        cls.said = training.quiet_run(config(), Path("run"))
        cls.record = {
            "name": "my_nets.py:make",
            "file": "my_nets.py",
            "sha256": hashes.file_sha256(cls.source),
        }

    def test_trains_both_phases_and_says_who_made_the_network(self):
        self.assertIn("my_nets.py:make on digits", self.said)
        first, second = result_lines.read(Path("run"))
        for record in (first, second):
            self.assertEqual(record["function"], self.record)
            self.assertLen(record["weights_sha256"], 64)
        self.assertStartsWith(first["weights"], "pretrain")
        self.assertNotEqual(first["weights_sha256"], second["weights_sha256"])
        self.assertEqual(json.loads(Path("run/function.json").read_text()), self.record)

    @pytest.mark.slow
    def test_interrupted_run_ends_in_the_same_bits(self):
        training.stop_after(7, lambda: training.quiet_run(config(), Path("stopped")))
        training.quiet_run(config(), Path("stopped"))
        ours, theirs = (training.final_state(Path(p), config())[0] for p in ("stopped", "run"))
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
        jax.tree.map(np.testing.assert_array_equal, ours.stats, theirs.stats)

    def test_is_evaluated(self):
        trained = result_lines.read(Path("run"))[-1]
        code, printed, said = call(workdir="run", attack="clean", out="out")
        self.assertEqual(code, 0, said)
        (record,) = result_lines.read(Path("out"))
        for key in ("weights", "weights_sha256", "config_sha256", "clean", "function"):
            self.assertEqual(record[key], trained[key], key)
        self.assertIn("my_nets.py:make (train, step 8, ema), float32", printed)

    def test_is_attacked_and_again_where_its_file_has_changed(self):
        given = {"workdir": "run", "attack": "apgd-ce", "n": 8, "epsilon": "0.02", "out": "again"}
        code, _, said = call(**given)
        self.assertEqual(code, 0, said)
        self.assertIn("already done", call(**given)[2])
        text = self.source.read_text()
        self.addCleanup(self.source.write_text, text)
        changed = "WARNING: my_nets.py has changed since the run in run began .*then"
        self.source.write_text(f"{text}\n# A comment computes nothing.\n")
        said = call(**given)[2]
        self.assertIn("already done", said)
        self.assertRegex(said, changed)
        self.source.write_text(text.replace("nnx.gelu", "nnx.relu"))
        said = call(**given)[2]
        self.assertNotIn("already done", said)
        self.assertRegex(said, changed)
        first, second = result_lines.read(Path("again"))
        self.assertEqual(first["weights_sha256"], second["weights_sha256"])
        self.assertNotEqual(first["function"], second["function"])
        self.assertNotEqual(first["evaluation"], second["evaluation"])
        with self.subTest("the run says so too"):
            said = training.quiet_run(config(), Path("run"))
            self.assertRegex(said, changed)

    def test_another_run_starts_from_it(self):
        asked = config(pretrain__epochs=0)
        with asked.unlocked():
            asked.init.weights = "run"
        start, record = start_weights.of_config(asked)
        self.assertLen(start.matched, 2 * 4 + 2 + 4)
        self.assertIn("run (train, step 8, ema)", record["where"])
        with asked.unlocked():
            asked.init.head = "fresh"
        with self.assertRaisesRegex(ValueError, "the head of my_nets.py:make is unknown; let"):
            start_weights.of_config(asked)
        with asked.unlocked():
            asked.init.head, asked.model.options.width = "keep", 8
        with self.assertRaisesRegex(ValueError, r"with width=4.*with width=8; set model.options"):
            start_weights.of_config(asked)

    @pytest.mark.slow
    def test_a_file_of_its_weights(self):
        (_, weights), trained = self.best(), result_lines.read(Path("run"))[-1]
        arrays = {k: np.asarray(v) for k, v in (weights.params | weights.stats).items()}
        save_file(arrays, "own.safetensors")
        given = {"model": "my_nets.py:make", "weights": "own.safetensors", "dataset": "digits"}
        given |= {"split": "test[:80]", "attack": "clean", "out": "of_file"}
        code, _, said = call(**given, options="{'width': 4}")
        self.assertEqual(code, 0, said)
        (record,) = result_lines.read(Path("of_file"))
        for key in ("weights_sha256", "clean"):
            self.assertEqual(record[key], trained[key], key)
        code, _, said = call(**given, options="{'width': 8}")
        self.assertEqual(code, 2)
        self.assertRegex(said, r"(?s)own.safetensors: .*blocks.0.conv.bias: shape \(4,\)")

    def best(self):
        from jaxrobust.weights.trained import runs

        return runs.run_weights(Path("run"))

    def test_is_not_exported(self):
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit):
            export_weights.main(["--workdir", "run", "--layout", "module", "--out", "ship"])
        with self.assertRaisesRegex(ValueError, "my_nets.py:make is your own function, but this"):
            export_torch.of_run(Path("run"), None, None)
        self.assertFalse(Path("ship").exists())

    def test_where_its_file_is_gone(self):
        with contextlib.chdir(self.create_tempdir().full_path):
            run = os.path.relpath(self.source.parent / "run")
            code, _, said = call(workdir=run, attack="clean")
            self.assertEqual(code, 2)
            self.assertRegex(
                said, "model.name=my_nets.py:make: cannot read my_nets.py .*; paths are relative to"
            )
            self.assertEqual(said.count("\n"), 1)


class FunctionsTest(absltest.TestCase):
    """A pair of functions, and what is refused before anything is written."""

    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.chdir(self.create_tempdir().full_path))
        written(Path.cwd())

    def test_a_pair_of_functions_trains(self):
        asked = config("my_nets.py:linear", train__epochs=1, train__warmup_epochs=0)
        training.quiet_run(asked, Path("run"))
        self.assertLen(result_lines.read(Path("run")), 2)

    def test_operations_are_counted(self):
        asked = config("my_nets.py:linear", attack__steps=2)
        # One product of 64 pixels and 10 classes: 3 passes of the update, 5 of APGD.
        self.assertEqual(build.flops_per_image(asked, "train"), 2 * 64 * 10 * (3 + 5))

    def test_mistakes_leave_nothing(self):
        for name, message in {
            "my_nets.py:mak": r"no 'mak'; did you mean make\? it has Block, Net, make, linear",
            "my_nets:make_it": "my_nets has no 'make_it'",
            "their_nets:make": "the module their_nets is neither installed nor in",
            "my_nets.py:Block": r"unknown option \['width'\] for my_nets.py:Block; it accepts",
        }.items():
            with self.assertRaisesRegex(ValueError, message):
                training_run.run(config(name), Path("run"))
            self.assertFalse(Path("run").exists())
