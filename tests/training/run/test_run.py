"""The whole loop on the shipped digits: train, stop, resume, evaluate, refuse."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.data.sources import registry
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.runtime.files import jsonl
from jaxrobust.training import build
from jaxrobust.training.run import splits, stopping, trackers
from jaxrobust.weights.store import checkpoint
from tests.support import paths, result_lines, sweeps
from tests.support.modules import hidden, needs
from tests.support.recorder import DOT, Recorder
from tests.support.runs import final_state, quiet_run, run_of_class, stop_after, tiny


class LoopTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.told = told = Recorder()
        kind = trackers.TrackerKind("json", lambda: None, told.opened)

        def draw(workdir, phase):  # as `report.pictures`: of the last record, where there is one
            rows = result_lines.read(workdir)
            tested = any(r["weights"].startswith(f"{phase},") for r in rows)
            return {"dot": DOT} | ({"tested": DOT} if tested else {})

        with mock.patch.dict(trackers.KINDS, {"recorder": kind}):
            cls.workdir, cls.said = run_of_class(cls, tiny(log__to="recorder"), draw=draw)
        cls.lines = jsonl.read(cls.workdir / "metrics.jsonl")

    def test_the_learning_rate_is_that_of_the_step_that_was_done(self):
        rows = [row for row in self.lines if row.get("phase") == "train" and "lr" in row]
        schedule = build.phase(tiny(log__to="recorder"), "train", 256).schedule
        self.assertNotEmpty(rows)
        for row in rows:
            self.assertAlmostEqual(row["lr"], float(schedule(row["step"] - 1)), places=9)

    def test_prints_progress_and_the_table(self):
        self.assertIn("pretrain 3/8 loss", self.said)
        self.assertRegex(
            self.said, r"train 12/12 loss [\d.]+ batch robust [\d.]+% [\d,]+ images/s ETA 0"
        )
        self.assertRegex(self.said, r"weights +clean +robust +images")
        self.assertRegex(self.said, r"train, step \d+, ema +[\d.]+% +[\d.]+% +80  APGD-CE 3 steps")
        self.assertRegex(self.said, r"step compiled in [\d.]+ s \(compilation cache (hit|miss)\)")

    def test_records_carry_their_evidence(self):
        rows = result_lines.read(self.workdir)
        self.assertLen(rows, 2)
        for record in rows:
            for key in ("commit", "config_sha256", "weights_sha256", "seed", "versions", "device"):
                self.assertTrue(record[key] or key == "seed", key)
            self.assertEqual(record["attacks"][0]["epsilon"], 0.1)
            self.assertEqual(record["image_ids"], "0..79")
            self.assertEqual(record["preprocessing"], "none")
            self.assertBetween(record["robust"], 0, record["clean"])
        self.assertNotEqual(rows[0]["weights_sha256"], rows[1]["weights_sha256"])

    def test_metrics_are_lines_of_json(self):
        last = [x for x in self.lines if x["phase"] == "train" and "loss" in x][-1]
        self.assertEqual(last["step"], 12)
        self.assertGreater(last["images_per_second"], 0)
        self.assertTrue(any("selection_robust" in x for x in self.lines))

    @pytest.mark.slow
    def test_a_tracker_is_told_what_the_metrics_say(self):
        tests = [m for m in self.told.scalars_of if "test_robust" in m]
        self.assertEqual([m for m in self.told.scalars_of if m not in tests], self.lines)
        self.assertEqual(self.told.begun, [("pretrain", 0, 0), ("train", 0, 8)])
        found = [(r["clean"], r["robust"]) for r in result_lines.read(self.workdir)]
        self.assertEqual([(m["test_clean"], m["test_robust"]) for m in tests], found)
        self.assertEqual([(m["phase"], m["step"]) for m in tests], [("pretrain", 8), ("train", 12)])
        self.assertEqual(self.told.closed, [True])

    def test_a_tracker_knows_the_run(self):
        (about,) = self.told.about
        self.assertEqual(about["architecture"], "convnext_n")
        self.assertEqual(about["train"]["lr"], 0.01)
        self.assertEqual(about["workdir"], str(self.workdir))
        self.assertEqual(about["commit"], result_lines.read(self.workdir)[0]["commit"])
        counted = (self.workdir / "parameters.txt").read_text()
        self.assertIn(f"Total: {about['parameters']:,}", counted)

    @needs("resvg_py", "pip install resvg-py")
    def test_pictures_are_shown_at_evaluations_and_after_the_test(self):
        at = [(phase, step) for phase, step, name in self.told.images if name == "figures/dot"]
        steps = [("pretrain", 4), ("pretrain", 8), ("train", 4), ("train", 8), ("train", 12)]
        self.assertEqual(at, steps)
        tested = [where[:2] for where in self.told.images if where[2] == "figures/tested"]
        self.assertEqual(tested, [("pretrain", 8), ("train", 12)])

    def test_adversarial_phase_starts_from_the_clean_weights(self):
        clean, _ = final_state(self.workdir, tiny(), "pretrain")
        robust, _ = final_state(self.workdir, tiny())
        a, b = (np.concatenate([np.ravel(v) for v in s.params.values()]) for s in (clean, robust))
        self.assertGreater(np.corrcoef(a, b)[0, 1], 0.9)  # another seed's would be near 0

    @parameterized.parameters(3, 9, 13)
    @pytest.mark.slow
    def test_interrupted_run_ends_in_the_same_bits(self, after):
        workdir = Path(self.create_tempdir()) / "cut"
        stop_after(after, lambda: quiet_run(tiny(), workdir))
        quiet_run(tiny(), workdir)
        whole, cut = (final_state(d, tiny())[0] for d in (self.workdir, workdir))
        states = (state._replace(key=jax.random.key_data(state.key)) for state in (whole, cut))
        jax.tree.map(np.testing.assert_array_equal, *states)

    def test_rerunning_a_finished_run_only_prints(self):
        before = sorted(p for p in self.workdir.rglob("*"))
        said = quiet_run(tiny(), self.workdir)
        self.assertIn("robust", said)
        self.assertNotIn("compiled", said)
        self.assertEqual(before, sorted(p for p in self.workdir.rglob("*")))

    def test_refuses_the_workdir_of_another_config(self):
        with self.assertRaisesRegex(
            ValueError, r"(?s)a different config.*train\.lr: 0\.01 there, 0\.0"
        ):
            quiet_run(tiny(train__lr=0.02), self.workdir)

    def test_refuses_the_checkpoint_of_another_network(self):
        config = tiny()
        config.unlock().model.options.dims = (16,)
        (self.workdir / "config.json").rename(self.workdir / "kept.json")
        try:
            with self.assertRaisesRegex(ValueError, r"(?s)holds another network.*head.norm.scale"):
                quiet_run(config, self.workdir)
        finally:
            (self.workdir / "kept.json").rename(self.workdir / "config.json")


class TroubleTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_nan_names_the_step_and_the_last_checkpoint(self):
        workdir = Path(self.create_tempdir()) / "nan"
        config = tiny(pretrain__epochs=0, train__lr=1e38, train__epochs=2, trouble__skips=3)
        with self.assertRaisesRegex(
            stopping.Diverged, r"loss is (nan|inf) at step \d+.*checkpoint"
        ):
            quiet_run(config, workdir)

    @pytest.mark.slow
    def test_full_disk_names_the_last_checkpoint_and_continues(self):
        workdir = Path(self.create_tempdir()) / "full"
        config = tiny(pretrain__epochs=0)
        real = checkpoint.ocp.CheckpointManager.save

        def save(manager, step, *args, **kwargs):
            if step >= 8:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(manager, step, *args, **kwargs)

        with (
            mock.patch.object(checkpoint.ocp.CheckpointManager, "save", save),
            self.assertRaisesRegex(OSError, "disk is full.*last good one is step 4.*same command"),
        ):
            quiet_run(config, workdir)
        self.assertIn("train: step 4 of 12", quiet_run(config, workdir))

    @pytest.mark.slow
    def test_bad_record_loses_nothing(self):
        workdir = Path(self.create_tempdir()) / "record"
        config, real = tiny(pretrain__epochs=0), splits.batches

        class Damaged:
            def __init__(self, batches):
                self.batches, self.close = batches, batches.close

            def __next__(self):
                if next(counter) == 6:
                    raise registry.DataError("record 77 is damaged")
                return next(self.batches)

        counter = itertools.count()
        with (
            mock.patch.object(splits, "batches", lambda *args: Damaged(real(*args))),
            self.assertRaisesRegex(
                stopping.BadData, "record 77 is damaged. Repair .* after step 6 of"
            ),
        ):
            quiet_run(config, workdir)
        self.assertIn("train: step 6 of 12", quiet_run(config, workdir))

    @pytest.mark.slow
    def test_failing_evaluation_loses_nothing(self):
        workdir = Path(self.create_tempdir()) / "evaluation"
        config = tiny(pretrain__epochs=0)
        failure = mock.patch.object(accuracy, "count", side_effect=registry.DataError("bad image"))
        with failure, self.assertRaisesRegex(ValueError, "bad image"):
            quiet_run(config, workdir)
        said = quiet_run(config, workdir)
        self.assertIn("train: step 4 of 12", said)
        self.assertIn("train: step 4, selection split", said)  # it is made up for

    def test_workdir_that_cannot_be(self):
        file = Path(self.create_tempfile().full_path)
        with self.assertRaisesRegex(
            ValueError, "cannot write to --workdir.*name a writable folder"
        ):
            quiet_run(tiny(), file / "run")

    def test_damaged_config_is_named(self):
        workdir = Path(self.create_tempdir())
        for text in ("{", "null"):
            (workdir / "config.json").write_text(text)
            with self.assertRaisesRegex(ValueError, r"config\.json is damaged .*remove"):
                quiet_run(tiny(), workdir)

    def test_keys_of_another_version_are_refused(self):
        workdir = Path(self.create_tempdir())
        plain = json.loads(tiny().to_json())
        for noted in (plain, {"version": 0} | plain):
            (workdir / "config.json").write_text(json.dumps(noted))
            with self.assertRaisesRegex(ValueError, "has version (None|0) of the config's keys"):
                quiet_run(tiny(), workdir)

    def test_names_that_lose_checkpoints(self):
        """Orbax takes them for patterns or other paths, and reads nothing where it wrote."""
        for name in ("a[1]", "a\\b", "\udcff"):
            workdir = Path(self.create_tempdir()) / name / "run"
            said = "loses checkpoint arrays .* name another folder"
            with self.assertRaisesRegex(ValueError, said):
                quiet_run(tiny(), workdir)

    @sweeps.rows(
        ({"train__batch_size": 3}, r"train\.batch_size=3 .*8 devices; use 8"),
        ({"evaluation__batch_size": 30}, r"evaluation\.batch_size=30 .*use 24 or 32"),
        ({"train__batch_size": 512}, "exceeds the 256 images of the split"),
        ({"model__num_classes": 7}, "set num_classes=10"),
        ({"evaluation__steps": 0}, "steps=0"),
        ({"train__final_lr": 1.0}, "final_lr=1.0 must be between 0 and train.lr=0.01"),
        ({"model__options": {"remat": True}}, "options.remat is not an option; set model.remat"),
        ({"model__in_channels": 3}, "digits has 1 channels; set model.in_channels=1"),
        ({"log__to": "tensorboard"}, r"pip install 'jaxrobust\[tensorboard\]'"),
        ({"log__to": "wandb"}, r"log.to=wandb needs an extra: pip install 'jaxrobust\[wandb\]'"),
        ({"log__to": "wandb,aim"}, "names the unknown tracker 'aim'; choose from tensorboard"),
    )
    def test_refuses_before_anything_is_written(self, changes, message):
        workdir = Path(self.create_tempdir()) / "refused"
        if "log__to" in changes:
            self.enter_context(hidden("tensorboardX", "wandb"))
        with self.assertRaisesRegex(ValueError, message):
            quiet_run(tiny(**changes), workdir)
        self.assertFalse(workdir.exists())


class CommandLineTest(parameterized.TestCase):
    @parameterized.parameters((signal.SIGINT, 130), (signal.SIGTERM, 75))
    @pytest.mark.slow
    def test_signals_to_all_processes_save_and_say_how_to_resume(self, number, code):
        """As a terminal, Slurm or a machine that goes down sends them: to data workers too."""
        workdir = Path(self.create_tempdir()) / "run"
        arguments = ["--config=configs/quickstart.py", f"--workdir={workdir}"]
        arguments += ["--config.log.every_steps=1", "--config.data.workers=1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxrobust.main", *arguments],
            cwd=paths.ROOT,
            env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for line in process.stderr:
            if line.startswith("pretrain 2/"):
                os.killpg(process.pid, number)
                break
        said = process.stderr.read()
        process.stderr.close()
        self.assertEqual(process.wait(60), code, said)
        self.assertRegex(
            said, r"stopped after step \d+ of \d+, saved in .*; run the same command to continue"
        )
        self.assertNotIn("Traceback", said)
        self.assertNotEmpty(list((workdir / "pretrain" / "latest").glob("[0-9]*")))
