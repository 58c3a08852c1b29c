"""`python -m jaxrobust.doctor.estimate`: its mistakes as one sentence, its answers as JSON."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from absl.testing import absltest, parameterized

from tests.support import paths, sweeps
from tests.support.commands import commands

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


def command(*arguments):
    """Return the exit code, stdout and stderr of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxrobust.doctor.estimate", *arguments],
        cwd=paths.ROOT,
        env=os.environ | {"JAXROBUST_ALLOCATOR": "system"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


class CommandTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_measured_on_the_cpu(self):
        """The program, on data that ships; numbers are this machine's and only plausible."""
        file = self.create_tempfile("tiny.py", TINY).full_path
        words = (file, "--on", "cpu", "--seconds", "0.1", "--images", "0", "--json")
        code, out, err = command(*words)
        self.assertEqual(code, 0, err)
        found = json.loads(out.splitlines()[-1])
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
        self.assertIn("Measured on this machine", out)

    @pytest.mark.slow
    @absltest.skipUnless(
        importlib.util.find_spec("libtpu"), "needs the TPU compiler: pip install -e '.[tpu-aot]'"
    )
    def test_the_roofline_is_that_of_bench_step(self):
        file = self.create_tempfile("tiny.py", TINY).full_path
        code, out, err = command(file, "--on", "v5e:2x2", "--fsdp", "0", "--images", "0", "--json")
        self.assertEqual(code, 0, err)
        (row,) = json.loads(out.splitlines()[-1])["phases"]
        words = (file, "--topology", "v5e:2x2", "--batch", "8", "--fsdp", "0", "--json")
        done = subprocess.run(
            [sys.executable, paths.ROOT / "tools/bench_step.py", *words],
            env=os.environ | {"JAXROBUST_ALLOCATOR": "system"},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        theirs = json.loads(done.stdout.splitlines()[-1])
        for key, value in row["roofline"].items():
            self.assertEqual(value, theirs[key], key)
        self.assertEqual(row["memory_bytes"], theirs["memory_bytes"])
        self.assertAlmostEqual(row["executed_flops_per_image"], theirs["flops_executable"] / 8)


class QuickCommandTest(parameterized.TestCase):
    """Commands that only look and count, in forks of one process."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_command = cls.enterClassContext(commands())

    def estimate(self, *words):
        return self.run_command(["estimate", *words], paths.ROOT)

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
        ("--on abacus:8", "'abacus' is no device that is known; one of cpu, gpu"),
        ("--on h10:8", "'h10' is no device that is known; did you mean h100?"),
        ("--on v5e:3x3", "--on v5e:3x3 is no slice of TPU v5e; write one such as v5e:4x4"),
        ("--on v5e", "does not say how many chips; write one such as v5e:4x4"),
        ("--on gpu", "JAX finds no GPU on this machine; write cpu, gpu or tpu"),
        ("--on h100:1 --utilisation 0", "above 0 and at most 1"),
        ("--on cpu --utilisation 0.5", "is measured; leave it out"),
        ("--on h100:1 --robust 2", "from 0 to 1"),
        ("--on h100:1 --images 400", "--images=400 is more than the 397 images of the split"),
        ("", "required: --on"),
        ("--on h100:1 --on h100:2", "--on is given more than once"),
        ("--on h100:1 --prise 2", "--prise is no flag; did you mean --price? --help lists them"),
        ("--on h100:1 --config.train.epoch=2", "unknown config key 'epoch'; did you mean 'epochs'"),
        ("--on h100:1 --config.train.epochs=x", "--config.train.epochs=x is no whole number"),
        (
            "--on h100:192",
            "pretrain.batch_size=64 cannot be split over 192 devices; use 192 or 384",
        ),
        ("--on h100:1 --config.data.name=folder:/nowhere", "/nowhere"),
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
        ("--on h100:8 --fsdp 3", "mesh.fsdp=3 does not divide the 8 chips; one of 1, 2, 4, 8"),
        ("--on h100:1 --config.data.name=flowers", "flowers"),
    )
    def test_more_mistakes_are_one_sentence(self, words, sentence):
        self.refused(("quickstart", *words.split()), sentence)

    @sweeps.rows(
        ("nothing_of_the_kind", "--config nothing_of_the_kind: no such file; give one, or"),
        ("quickstart:seed=1", "takes no arguments; leave out what stands behind the colon"),
        ("configs/cifar_study.py:best", "run=best is not among its values; one of base, patch"),
        ("configs/cifar_study.py", "say which run behind a colon, one of base, patch"),
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
