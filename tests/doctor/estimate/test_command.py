"""`jaxrobust estimate`: its mistakes as one sentence, its answers as JSON."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from jaxrobust.doctor.estimate import account, account_lines, changes
from jaxrobust.doctor.estimate import command as estimates
from jaxrobust.doctor.estimate.command import EstimateSettings
from jaxrobust.doctor.programs import topology
from tests.support import paths, sweeps
from tests.support.commands import run_command
from tests.support.estimates import H100
from tools.generate import refresh_configs

TINY = """
from jaxrobust.config import base


def get_config():
    config = base()
    config.model.update(name="convnext_n", num_classes=10, image_size=8, in_channels=1)
    config.model.options = {"stem_strides": (1,), "depths": (1,), "dims": (8,)}
    config.data.update(name="digits", train_split="train[:10%]", augmentation="none")
    config.data.update(selection_split="test[:50]", test_split="test")
    config.attack.update(epsilon=0.1, steps=1)
    config.train.update(epochs=2, batch_size=32, warmup_epochs=1, from_random=True)
    config.evaluation.update(batch_size=40, steps=2)
    config.test.update(batch_size=40, steps=2, images=200)
    config.alarm.update(every_steps=100, images=1)
    return config
"""


def command(*arguments, program=("-m", "jaxrobust", "estimate")):
    """Return the last line of stdout as JSON, and all of it."""
    done = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=paths.ROOT,
        env=os.environ | {"JAXROBUST_ALLOCATOR": "system"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


class CommandTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_measured_on_the_cpu(self):
        """The program, on data that ships; numbers are this machine's and only plausible."""
        file = self.create_tempfile("tiny.py", TINY).full_path
        words = (file, "--on", "cpu", "--seconds", "0.1", "--images", "0", "--json")
        found, out = command(*words)
        (row,) = found["phases"]
        self.assertTrue(found["measured"] and row["measured_with_data"])
        self.assertIsNone(found["utilisation"])
        self.assertNotIn("autoattack", found)
        self.assertEqual(row["steps"], 2 * (row["images_per_epoch"] // 32))
        self.assertAlmostEqual(row["images_per_s"], 32 / row["step_s"], delta=1e-6)
        self.assertAlmostEqual(sum(row["parts_s"].values()), row["seconds"], delta=1e-9)
        for part in ("steps", "selection", "test", "compile", "checkpoints"):
            self.assertGreater(row["parts_s"][part], 0, part)
        self.assertGreater(row["memory_bytes"], 0)
        self.assertIn("were measured briefly on this machine", out)

    @pytest.mark.slow
    @absltest.skipUnless(
        importlib.util.find_spec("libtpu"), "needs the TPU compiler: pip install -e '.[tpu-aot]'"
    )
    def test_the_roofline_is_that_of_bench_step(self):
        file = self.create_tempfile("tiny.py", TINY).full_path
        words = (file, "--fsdp", "0", "--json")
        (row,) = command(*words, "--on", "v5e:2x2", "--images", "0")[0]["phases"]
        words = (*words, "--topology", "v5e:2x2", "--batch", "8")
        step, _ = command(*words, program=(paths.ROOT / "tools/bench_step.py",))
        for key, value in row["roofline"].items():
            self.assertEqual(value, step[key], key)
        self.assertEqual(row["memory_bytes"], step["memory_bytes"])
        self.assertAlmostEqual(row["executed_flops_per_image"], step["flops_executable"] / 8)


class WordsTest(parameterized.TestCase):
    """What a command line means, before anything is computed."""

    @sweeps.rows(
        ("quickstart --on cpu", "quickstart --on cpu", ""),
        ("--config.seed=1 quickstart --on cpu", "quickstart --on cpu", "--config.seed=1"),
        ("quickstart --config.seed 1 --on cpu", "quickstart --on cpu", "--config.seed 1"),
        # A negative number is a value, and a flag is none.
        ("quickstart --config.seed -1 --on cpu", "quickstart --on cpu", "--config.seed -1"),
        ("q --config.data.strict --on cpu", "q --on cpu", "--config.data.strict"),
        ("q --noconfig.data.strict --on cpu", "q --on cpu", "--noconfig.data.strict"),
        ("q --config.data.strict -on cpu", "q -on cpu", "--config.data.strict"),
        ("q --config.train.lr .5 -fast", "q -fast", "--config.train.lr .5"),
        ("q -config.seed=1 --on cpu", "q --on cpu", "-config.seed=1"),
        ("q --configs.seed=1", "q --configs.seed=1", ""),
    )
    def test_changes_of_the_config_are_apart(self, words, others, changing):
        divided = changes.divided(words.split())
        self.assertEqual(divided, (others.split(), changing.split()))

    @sweeps.rows(
        ("price", (1e-9,), (0.0, float("inf"), float("nan"))),
        ("utilisation", (1.0, 1e-9), (0.0, 1.001)),
        ("robust", (0.0, 1.0), (-0.01, 1.01, float("nan"))),
        ("seconds", (1e-9, 3599.9), (0.0, 3600.0)),
        ("batch", (1,), (0,)),
        ("images", (0,), (-1,)),
        ("num_slices", (1, 2), (0,)),
    )
    def test_ranges(self, name, inside, outside):
        usual = {"config": "quickstart", "on": "h100:8", "robust": 0.5}
        for value in inside:
            estimates.check(EstimateSettings(**(usual | {name: value})))
        for value in outside:
            with self.assertRaisesRegex(ValueError, f"--{name}"):
                estimates.check(EstimateSettings(**(usual | {name: value})))

    @sweeps.rows((True, False, True), (True, True, False), (False, False, False))
    def test_the_compiler_of_chips_that_are_not_here(self, compiles, fast, asked):
        self.enterContext(contextlib.chdir(self.create_tempdir().full_path))
        config = refresh_configs.load("larger_radius:convnext_t_cvst,start=trained")
        training = {"hours": 2.5, "chip_hours": 160.0}
        account_of = mock.Mock(return_value={"known": ["a"], "training": training})
        chips, there = mock.Mock(return_value=["chips"]), H100._replace(compiles=compiles)
        with (
            mock.patch.object(estimates.targets, "prepare"),
            mock.patch.object(estimates.targets, "target", return_value=there),
            mock.patch.object(changes, "configured", return_value=config),
            mock.patch.object(account, "account", account_of),
            mock.patch.object(topology, "devices", chips),
            mock.patch.object(account_lines, "page", return_value="the page"),
        ):
            settings = EstimateSettings(config="larger_radius", on="v5e:2x4", robust=0.5, fast=fast)
            found = estimates.answer(settings, ["--config.seed=1"], 0.0)
        called = [mock.call("v5e:2x4", flag="--on", slices=1)] if asked else []
        self.assertEqual(chips.mock_calls, called)
        first, *starts = account_of.call_args_list
        self.assertEqual(first.kwargs["chips"], ["chips"] if asked else None)
        self.assertEqual(first.kwargs["start"], 0.0)
        self.assertEqual((len(found["starts"]), len(starts)), (2, 2))
        self.assertStartsWith(found["known"][1], "It starts from runs/revisiting_at-convnext")


class QuickCommandTest(parameterized.TestCase):
    """Commands that only look and count, in forks of one process."""

    def estimate(self, *words):
        return run_command(["estimate", *words], paths.ROOT)

    def test_the_config_changes_as_for_training(self):
        changes = ("--config.pretrain.epochs=0", "--config.train.epochs", "4")
        words = ("configs/cifar_study.py:base,seed=1", "--on", "h100:2", "--images", "0", "--json")
        code, out, err = self.estimate(*words, *changes, "--config.attack.epsilon=4/255")
        self.assertEqual(code, 0, err)
        found = json.loads(out.splitlines()[-1])
        (row,) = found["phases"]
        self.assertEqual((row["phase"], row["epochs"]), ("train", 4))
        self.assertEqual(row["steps"], 4 * (20_000 // 128))
        self.assertEqual(found["config"], "cifar_study-base-seed=1")

    @sweeps.rows(
        ("--on cpu --price 2", "--on cpu has no chips; name some with --on, such as v5e:8x8"),
        ("--on h100:1 --price cheap", "--price=cheap is not a number"),
        ("--on h100:1 --price -1", "--price=-1.0 must be above 0"),
        ("--on abacus:8", "'abacus' is not a known device; one of cpu, gpu"),
        ("--on h10:8", "'h10' is not a known device; did you mean h100?"),
        ("--on v5e:3x3", "--on v5e:3x3 is not a slice of TPU v5e; write, for example, v5e:4x4"),
        ("--on v5e", "lacks the number of chips; write, for example, v5e:4x4"),
        ("--on gpu", "JAX finds no GPU on this machine; write cpu, gpu or tpu"),
        ("--on h100:1 --utilisation 0", "above 0 and at most 1"),
        ("--on cpu --utilisation 0.5", "is measured; leave it out"),
        ("--on h100:1 --robust 2", "from 0 to 1"),
        ("--on h100:1 --images 400", "--images=400 is more than the 397 images of the split"),
        ("", "required: --on"),
        ("--on h100:1 --on h100:2", "--on is given more than once"),
        (
            "--on h100:1 --prise 2",
            "--prise is not a flag; did you mean --price? --help-all lists all flags",
        ),
        ("--on h100:1 --config.train.epoch=2", "unknown config key 'epoch'; did you mean 'epochs'"),
        ("--on h100:1 --config.train.epochs=x", "--config.train.epochs=x is not a whole number"),
        (
            "--on h100:192",
            "pretrain.batch_size=64 cannot be split over 192 devices; use 192 or 384",
        ),
        ("--on h100:1 --config.data.name=folder:/nowhere", "/nowhere"),
        (
            "--on h100:8 --num_slices 2",
            "--num_slices 2 counts TPU slices; name one after --on, such",
        ),
    )
    def test_mistakes_are_one_sentence(self, words, sentence):
        self.refused(("quickstart", *words.split()), sentence)

    @pytest.mark.slow  # 1 to 3 s each
    @sweeps.rows(
        (
            "--on h100:1 --config.train.epochs=2",
            "warmup_epochs=2 must be at least 0 and below epochs=2; shorten it to 1 or less, or",
        ),
        (
            "--on h100:1 --config.train.epochs=1",
            "warmup_epochs=2 must be at least 0 and below epochs=1; set it to 0, or train longer",
        ),
        ("--on h100:8 --fsdp 3", "mesh.fsdp=3 does not divide the 8 chips; use one of 1, 2, 4, 8"),
        ("--on h100:1 --config.data.name=flowers", "flowers"),
        ("--on h100:1 --config=other", "give the config as the first argument, without --config"),
    )
    def test_more_mistakes_are_one_sentence(self, words, sentence):
        self.refused(("quickstart", *words.split()), sentence)

    @sweeps.rows(
        ("nothing_of_the_kind", ": nothing_of_the_kind: no such file; give a file, or"),
        ("quickstart:seed=1", "takes no arguments; leave out what follows the colon"),
        ("configs/cifar_study.py:best", "run=best is not a valid value; one of base, patch"),
        ("configs/cifar_study.py", "give the run after a colon, one of base, patch"),
    )
    def test_a_config_that_does_not_exist(self, config, sentence):
        self.refused((config, "--on", "h100:1"), sentence)

    def refused(self, words, sentence):
        """Check that a command ends with 2 and one line."""
        code, out, err = self.estimate(*words)
        self.assertEqual((code, out), (2, ""), err)
        self.assertIn(sentence, err)
        # What takes longer than a second on a busy machine is announced before.
        said = [line for line in err.strip().splitlines() if not line.endswith(" ...")]
        self.assertLen(said, 1)
