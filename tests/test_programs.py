"""The programs of `examples/`: they open as notebooks, run, and print what they say."""

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from tests.support.paths import NO_SHARED, ROOT, SHARED

EXAMPLES = ROOT / "examples"
CIFAR = SHARED / "data" / "tensorflow_datasets" / "cifar10"
# What each needs next to the package.
NEEDS = {
    "adversarial_finetuning": (),
    "autoattack_equinox": ("equinox",),
    "autoattack_haiku": ("haiku",),
    "autoattack_linen": (),
    "autoattack_nnx": (),
    "to_pytorch": ("torch",),
    "train_my_torch_network": ("torch",),
}
# A trained network differs with the processor; seeds move these accuracies by several images.
POINTS = 6.0


def written(name: str) -> set[str]:
    """The folders and files that an example writes, as its text has them."""
    text = (EXAMPLES / f"{name}.py").read_text()
    return set(re.findall(r'"runs/\w+"|out=Path\("\w+"\)', text))


def cells(name: str) -> list[str]:
    return (EXAMPLES / f"{name}.py").read_text().split("\n# %%")


def said(name: str) -> list[str]:
    """The lines that an example says it prints."""
    return [line[6:] for line in cells(name)[-1].splitlines() if line.startswith("#     ")]


def figures(line: str) -> tuple[list[str], list[float]]:
    """The words of a line, and its percentages."""
    percent = r"([\d.]+)%"
    return re.sub(percent, "%", line).split(), [float(p) for p in re.findall(percent, line)]


def run(test: absltest.TestCase, *words: str | Path, cwd: str | Path) -> list[str]:
    """The lines that a program of Python's prints, started as a user does."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # of 8 devices
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["TFDS_DATA_DIR"] = str(CIFAR.parent)
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    test.assertEqual(done.returncode, 0, done.stderr)
    test.assertNotIn("Traceback", done.stderr)
    return done.stdout.splitlines()


class ProgramsTest(parameterized.TestCase):
    folder = Path(tempfile.gettempdir()) / f"examples-{os.getpid()}"  # of all of them

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder, ignore_errors=True)
        super().tearDownClass()

    def test_all_are_here(self):
        files = {path.stem for path in EXAMPLES.glob("*.py")}
        others = {"my_nets", "my_losses", "my_config", "torch_harnesses"}
        self.assertEqual(files, NEEDS.keys() | others)
        # torchvision tries `import pytorch`, and `my_nets.py:make` puts this folder on the path.
        self.assertNotIn("pytorch", files)

    @parameterized.parameters(*NEEDS)
    def test_opens_as_a_notebook(self, name):
        head, *rest = cells(name)
        self.assertTrue(ast.get_docstring(ast.parse(head)))
        kinds = [cell.startswith(" [markdown]") for cell in rest]
        self.assertEqual(kinds, [True, False] * (len(kinds) // 2) + [True])  # in turn
        for cell, is_text in zip(rest, kinds, strict=True):
            body = cell.partition("\n")[2]
            if is_text:
                self.assertTrue(all(line[:1] in ("", "#") for line in body.splitlines()))
            else:
                ast.parse(body)

    @parameterized.parameters(*(name for name in NEEDS if name.startswith("autoattack")))
    def test_autoattack_is_short(self, name):
        code = cells(name)[-2].strip().splitlines()
        self.assertLessEqual(len(code), 8, code)
        self.assertTrue(any("evaluation.autoattack(" in line for line in code))

    def test_no_two_write_the_same_folder(self):
        """So that all run in one folder, one after the other."""
        places = [place for name in NEEDS for place in written(name)]
        self.assertGreater(len(places), 3)
        self.assertLen(set(places), len(places))

    @parameterized.parameters(*NEEDS)
    @pytest.mark.slow
    def test_prints_what_it_says(self, name):
        for module in NEEDS[name]:
            if not find_spec(module):
                self.skipTest(f"needs {module}")
        if "cifar10" in cells(name)[1] and not CIFAR.is_dir():
            self.skipTest(NO_SHARED)
        self.folder.mkdir(exist_ok=True)
        printed = run(self, EXAMPLES / f"{name}.py", cwd=self.folder)
        self.assertNotEmpty(said(name))
        for line in said(name):
            words, numbers = figures(line)
            (found,) = [p for p in printed if figures(p)[0][: len(words)] == words]
            for ours, theirs in zip(numbers, figures(found)[1], strict=True):
                self.assertAlmostEqual(ours, theirs, delta=POINTS, msg=found)


class OwnNetworksTest(parameterized.TestCase):
    @parameterized.parameters("make", "make_linen")
    def test_are_networks(self, function):
        with contextlib.chdir(ROOT), jax.numpy_dtype_promotion("standard"):
            sizes = {"num_classes": 10, "image_size": 8, "in_channels": 1}
            net = models.create(f"examples/my_nets.py:{function}", **sizes, width=8)
            params, stats = jax.jit(net.init)(jax.random.key(0))
            images = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
            logits = jax.jit(net.apply)(params, stats, images)[0]
        self.assertEqual(logits.shape, (4, 10))
        self.assertGreater(np.ptp(logits, axis=0).min(), 1e-3)

    @pytest.mark.slow
    def test_train_and_are_evaluated(self):
        """As the docstring of the config says."""
        workdir = Path(self.create_tempdir()) / "run"
        command = [
            "-m",
            "jaxrobust.main",
            "--config",
            "examples/my_config.py",
            f"--workdir={workdir}",
        ]
        printed = run(self, *command, cwd=ROOT)
        rows = [figures(line)[1] for line in printed if re.match(r"(pre)?train, step", line)]
        text = ast.get_docstring(ast.parse((EXAMPLES / "my_config.py").read_text()))
        for ours, theirs in zip([x for row in rows for x in row], figures(text)[1], strict=True):
            self.assertAlmostEqual(ours, theirs, delta=POINTS)
        command = ["-m", "jaxrobust.evaluate", f"--workdir={workdir}", "--attack=apgd-ce", "--n=50"]
        printed = run(self, *command, cwd=ROOT)
        self.assertIn("examples/my_nets.py:make (train, step 380, ema), float32", printed)
