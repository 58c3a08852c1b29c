"""Runs that start from the run of another config, next to their own workdir."""

import contextlib
import json
import shutil
from pathlib import Path
from unittest import mock

import jax
import pytest
from absl.testing import parameterized

from jaxrobust.config import plain
from jaxrobust.runtime.files import jsonl, locks
from jaxrobust.training.run import run as training_run
from jaxrobust.training.run import start_runs, stopping
from jaxrobust.weights.trained import start_run
from tests.support import runs as training
from tests.support import sweeps


class Case(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.place = Path(self.create_tempdir().full_path)
        self.enterContext(contextlib.chdir(self.place))

    def start(self, name="clean", **changes) -> None:
        """A config file of clean training."""
        config = training.tiny(phases=("pretrain",), **changes)
        training.write_config(Path(f"{name}.py"), config)

    def robust(self, start="clean", **changes):
        return training.tiny(pretrain__epochs=0, init__weights=f"run:{start}.py", **changes)

    def said(self, config, workdir="runs/robust") -> str:
        return training.quiet_run(config, Path(workdir))

    def refused(self, config, words, workdir="runs/robust", kind=ValueError):
        there = sorted(self.place.rglob("*"))
        with self.assertRaisesRegex(kind, words), jax.numpy_dtype_promotion("standard"):
            training_run.run(config, Path(workdir))
        if kind is ValueError:  # before anything is written
            made = [p for p in sorted(self.place.rglob("*")) if "__pycache__" not in p.parts]
            self.assertEqual([p for p in made if p not in there and p.name != "lock"], [])


class TrainedTest(Case):
    @pytest.mark.slow
    def test_stopped_in_either_run_and_continued_it_is_what_two_commands_make(self):
        self.start()
        config, workdir = self.robust(), Path("runs/robust")
        with jax.numpy_dtype_promotion("standard"):
            training.stop_after(3, lambda: training_run.run(config, workdir), "runs/clean")
            self.assertFalse((workdir / "config.json").exists())
            self.assertIn("of pretrain in runs/clean", start_runs.again(config, workdir))
            training.stop_after(8, lambda: training_run.run(config, workdir))
        self.assertTrue(start_run.is_finished(Path("runs/clean"), self.chained(config)))
        self.assertRegex(start_runs.again(config, workdir), "continues after step . of train$")
        shutil.move("runs/clean", "elsewhere")  # a run that has begun does not need it
        self.assertNotIn("init.weights=run:", self.said(config))
        shutil.move("elsewhere", "runs/clean")

        alone = training.tiny(phases=("pretrain",))
        self.said(alone, "others/first")
        self.said(training.tiny(pretrain__epochs=0, init__weights="others/first"), "others/second")
        for ours, theirs in (("runs/clean", "others/first"), ("runs/robust", "others/second")):
            (one,), (other,) = (jsonl.read(Path(f) / "results.jsonl") for f in (ours, theirs))
            self.assertEqual(one["weights_sha256"], other["weights_sha256"])
        init = json.loads((workdir / "init.json").read_text())
        self.assertEqual(init["weights"], "run:clean.py")
        self.assertIn("runs/clean (pretrain, step 8", init["where"])

        said = self.said(self.robust(attack__epsilon=0.2, train__epochs=2), "runs/larger")
        first, *_ = said.splitlines()
        self.assertEndsWith(first, ": using the best weights of the finished run in runs/clean")
        self.assertNotIn("pretrain: step", said)

    def chained(self, config):
        return start_run.chain(config, Path("runs/robust"))[0].config

    @pytest.mark.slow
    def test_a_start_that_diverges_says_that_it_is_the_start(self):
        self.start()
        words = "the run in runs/clean, which this run starts from: .*Set trouble.rollbacks=1"
        config = self.robust(trouble__skips=1)
        with training.poisoned(range(1, 20)):
            self.refused(config, words, kind=stopping.Diverged)
        self.refused(config, words, kind=stopping.Diverged)  # and so it stays
        self.assertFalse(Path("runs/robust").exists())


class RefusedTest(Case):
    @sweeps.rows(
        (
            {"model__options": {"stem_strides": (1,), "depths": (1,), "dims": (16,)}},
            "of convnext_n with .*dims=.*16.* set model.options to match",
        ),
        ({"model__name": "convnext_n_cvst"}, "weights of convnext_n_cvst; set model.name"),
        ({"model__num_classes": 7}, "head has 7 classes, but .*; set init.head=fresh"),
        ({"model__in_channels": 3}, "images with 3 channels, but model.in_channels=1; give data"),
    )
    def test_a_start_of_another_network(self, changes, words):
        if "model__name" in changes:
            changes |= {"model__options": {}}
        self.start(**changes)
        self.refused(self.robust(), f"init.weights=run:clean.py: they.* {words}|{words}")

    def test_another_run_in_its_folder(self):
        self.start()
        folder = Path("runs/clean")
        folder.mkdir(parents=True)
        other = plain(training.tiny(phases=("pretrain",), pretrain__epochs=5))
        (folder / "config.json").write_text(json.dumps({"version": 1} | other))
        self.refused(
            self.robust(),
            "the run in runs/clean has a different config: pretrain.epochs is 5 there, 2 in the "
            "config. To start from it anyway, set init.weights=runs/clean; otherwise, move it away",
        )

    def test_a_start_that_another_process_trains(self):
        self.start()
        lock = Path("runs/clean/lock")
        lock.parent.mkdir(parents=True)
        with locks.held(lock, resource="it", otherwise="wait"):
            self.refused(
                self.robust(),
                "the run in runs/clean, which this run starts from: workdir runs/clean is in use "
                "by process .*; wait for it, end it, or repeat this command after that run has end",
            )

    @sweeps.rows("runs/clean", "../{name}/runs/clean")
    def test_the_workdir_of_the_start(self, workdir):
        self.start()
        workdir = workdir.format(name=self.place.name)
        words = "init.weights=run:clean.py is the run in .*runs/clean itself; choose another --w"
        self.refused(self.robust(), words, workdir)

    @sweeps.rows(
        ("run:larger_radios:vit_s_cvst", "no such file; did you mean larger_radius?"),
        ("run:larger_radius:vit_x", "model=vit_x is not a valid value; one of convnext_t_"),
        ("run:", "no such file"),
    )
    def test_no_such_config(self, weights, words):
        config = training.tiny(pretrain__epochs=0, init__weights=weights)
        self.refused(config, f"init.weights={weights}: .*{words}")

    def test_own_mistakes_come_before_the_training_of_the_start(self):
        self.start()
        self.refused(self.robust(train__lr=-1.0), "train.lr")


class StateTest(Case):
    def test_what_is_said_of_a_start_names_the_command_that_makes_it(self):
        self.start()
        for named, file in (
            ("clean.py", "clean.py"),
            ("larger_radius:vit_s_cvst", "configs/larger_radius.py:vit_s_cvst"),
        ):
            run = start_run.StartRun(named, Path("runs/x"), training.tiny())
            said = start_runs._said(run, start_run.ABSENT)
            self.assertEndsWith(said, f"jaxrobust train --config {file} --workdir runs/x")

    def test_a_run_that_has_begun_or_names_no_run_waits_for_none(self):
        place = Path("runs/robust")
        with mock.patch.object(start_runs, "_states", side_effect=AssertionError("looked")):
            for config, begun in ((self.robust(), True), (training.tiny(), False)):
                with mock.patch.object(start_runs, "steps", return_value=[3] * begun) as steps:
                    self.assertEqual(start_runs.before(config, place), [])
                self.assertEqual(steps.mock_calls, [mock.call(place / "train" / "latest")] * begun)

    def test_starts_from_the_first_that_is_not_finished_on(self):
        runs = [start_run.StartRun(n, Path(f"runs/{n}"), training.tiny()) for n in ("b", "a")]
        for states, expected in (
            ((start_run.FINISHED, start_run.ABSENT), []),
            ((start_run.BEGUN, start_run.FINISHED), ["b"]),
            ((start_run.ABSENT, start_run.BEGUN), ["a", "b"]),
        ):
            found = list(zip(runs, states, strict=True))
            with (
                mock.patch.object(start_runs, "_states", return_value=found),
                mock.patch.object(start_runs, "say") as say,
            ):
                listed = start_runs.before(self.robust(), Path("runs/robust"))
            self.assertEqual([run.folder.name for run in listed], expected)
            self.assertLen(say.call_args_list, 1 if not expected else 2)


class ExplainedTest(parameterized.TestCase):
    def test_a_start_s_mistake_names_the_start(self):
        run = start_run.StartRun("clean.py", Path("runs/clean"), training.tiny())
        words = "the run in runs/clean, which this run starts from: "
        for kind in (ValueError, *stopping.Stopped.__subclasses__()):
            with self.assertRaises(kind) as caught, start_runs.explained(run):
                raise kind("it diverges")
            self.assertEqual(str(caught.exception), f"{words}it diverges")
            self.assertIs(type(caught.exception), kind)
        with self.assertRaises(OSError) as caught, start_runs.explained(run):
            raise OSError("a full disk")
        self.assertEqual(str(caught.exception), "a full disk")

    @sweeps.rows(
        ([], "of runs/robust"),
        ([("robust", "stopped")], "of runs/robust"),
        ([("robust", "latest"), ("clean", "latest")], "of runs/robust"),
        ([("clean", "stopped")], "of runs/clean in runs/clean"),
        ([("clean", "latest"), ("far", "latest")], "of runs/clean in runs/clean"),
        ([("far", "latest")], "of runs/far in runs/far"),
    )
    def test_what_the_same_command_does_is_of_the_run_that_has_begun(self, begun, said):
        starts = [
            start_run.StartRun(n, Path(f"runs/{n}"), training.tiny()) for n in ("clean", "far")
        ]
        there = [Path("runs") / name / "train" / kind for name, kind in begun]
        with (
            mock.patch.object(start_runs.start_run, "chain", return_value=starts),
            mock.patch.object(start_runs, "steps", lambda place: [1] if place in there else []),
            mock.patch.object(start_runs.stopping, "again", lambda folder, phases: f"of {folder}"),
        ):
            self.assertEqual(start_runs.again(training.tiny(), Path("runs/robust")), said)
