"""The examples in docstrings, run as a user would, and what the package says it has."""

import contextlib
import doctest
import importlib
import io
import os
import re
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import jaxrobust
from jaxrobust import attacks, data
from jaxrobust.__main__ import COMMANDS, main, module_of
from tests.support import paths

MODULES = (
    *("attacks", "attacks.apgd", "attacks.pgd", "attacks.fab", "attacks.square"),
    *("attacks.minimum_norm.ddn", "attacks.minimum_norm.fmn"),
    *("attacks.sparse.sparse_pgd", "attacks.sparse.sparse_rs"),
    *("models", "weights.naming.convert", "weights.load", "evaluation.engine.autoattack"),
    "tasks.segmentation",
    *("config", "data.stream.arrays", "data.transforms.preparing"),
)
# The names of design that have one each; `attacks` itself opens with two.
EXAMPLES = 13


class ExamplesTest(parameterized.TestCase):
    @parameterized.parameters(*MODULES)
    @pytest.mark.slow
    def test_examples(self, name):
        module = importlib.import_module(f"jaxrobust.{name}")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = doctest.testmod(module)
        self.assertGreater(found.attempted, 0)
        self.assertEqual(found.failed, 0)

    def test_public_names_have_one(self):
        attacks, models = jaxrobust.attacks, jaxrobust.models
        own = [attacks.fgsm, attacks.pgd, attacks.apgd, attacks.fab, attacks.square]
        own += [attacks.ddn, attacks.fmn, attacks.sparse_pgd, attacks.sparse_rs]
        own += [models.available, models.create, jaxrobust.load, models.module]
        own += [jaxrobust.evaluation.autoattack]
        own += [jaxrobust.convert.from_torch, jaxrobust.convert.to_torch]
        own += [jaxrobust.data.evaluation_transform, jaxrobust.data.load]
        for function in own:
            self.assertIn(">>>", function.__doc__, function)


class PackageTest(absltest.TestCase):
    def test_says_what_it_has(self):
        names = dir(jaxrobust)
        self.assertContainsSubset(["attacks", "convert", "models", "__version__"], names)
        for name in jaxrobust.__all__:
            self.assertTrue(hasattr(jaxrobust, name))
        with self.assertRaisesRegex(AttributeError, "has no attribute 'nothing'"):
            jaxrobust.nothing  # noqa: B018

    def test_commands_exist(self):
        done = subprocess.run(
            [sys.executable, "-m", "jaxrobust"], capture_output=True, text=True, check=True
        )
        self.assertIn(f"jaxrobust {jaxrobust.__version__}", done.stdout)
        lines = done.stdout.splitlines()
        self.assertLessEqual(max(map(len, lines)), 80)
        for name in COMMANDS:
            self.assertTrue([line for line in lines if line.startswith(f"  {name} ")], name)
            self.assertIsNotNone(importlib.util.find_spec(module_of(name)), name)

    def test_a_command_is_the_module_of_its_name(self):
        with mock.patch("sys.argv", ["jaxrobust", "models", "convnext_n"]):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                main()
        self.assertIn("convnext_n", out.getvalue())

    def test_a_reader_that_has_enough_is_no_error(self):
        """As `| head` goes after its lines; 141 is what a shell says of SIGPIPE."""
        for words in (["scaling", "5e9"], ["models", "vit_s"]):
            read, write = os.pipe()
            os.close(read)
            with self.subTest(words), open(write, "wb") as nobody:
                command = [sys.executable, "-m", "jaxrobust", *words]
                done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True)
                self.assertEqual(done.returncode, 141, done.stderr)
                self.assertNotIn("pipe", done.stderr.lower())

    @pytest.mark.slow
    @jax.numpy_dtype_promotion("standard")
    @jax.numpy_rank_promotion("allow")
    def test_pages_of_attacks_run(self):
        """Each task of a newcomer is one cell of at most 12 lines."""
        for page in ("attacks_in_jax", "any_task"):
            text, names = (paths.ROOT / f"docs/howto/{page}.md").read_text(), {}
            for cell in re.findall(r"```\{code-cell\} ipython3\n(.*?)```", text, re.DOTALL):
                self.assertLessEqual(len([*filter(None, cell.splitlines())]), 12, cell)
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(cell, names)
                self.assertEqual(bool(out.getvalue()), "print(" in cell, cell)

    def test_the_gallery_text_runs(self):
        """The cells of the pull request for optax, with a small network in place of the page's."""
        text = (paths.ROOT / "examples/optax_gallery.md").read_text()
        cells = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        model = nnx.Sequential(
            lambda x: x.reshape(len(x), -1), nnx.Linear(64, 10, rngs=nnx.Rngs(0))
        )
        images, labels, *_ = data.load("digits", split="test", n=16)
        labels = np.asarray(model(images).argmax(1))
        names = {"EPSILON": 0.02, "model": model, "images": images, "labels": labels, "jax": jax}
        for cell in cells:
            exec(cell, names)
        loss = lambda x: attacks.ce_loss(model(x), jnp.asarray(labels)).sum()  # noqa: E731
        gradient, by_hand = jax.jit(jax.grad(loss)), images
        for _ in range(10):
            ascent = gradient(jnp.asarray(by_hand))
            moved = np.clip(
                by_hand + np.float32(0.004) * np.sign(ascent), images - 0.02, images + 0.02
            )
            by_hand = np.clip(moved, 0, 1)
        np.testing.assert_allclose(names["adversarial_images"], by_hand, rtol=0, atol=1e-6)
        self.assertEqual(names["result"].clean.mean(), 1)

    def test_version_and_typing_errors(self):
        for words, code, said in (
            (["--version"], None, f"jaxrobust {jaxrobust.__version__}"),
            (["evalute"], 2, "jaxrobust: evalute is not a command; did you mean evaluate?"),
            (["fly"], 2, "jaxrobust: fly is not a command; one of new, check, train, evaluate, "),
            (
                ["models", "--nme=x"],
                2,
                "jaxrobust: --nme is not a flag; --help-all lists all flags",
            ),
        ):
            out = io.StringIO()
            with (
                self.subTest(words),
                mock.patch("sys.argv", ["jaxrobust", *words]),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(out),
            ):
                left = None
                try:
                    main()
                except SystemExit as error:
                    left = error.code
                self.assertEqual(left, code)
                self.assertStartsWith(out.getvalue(), said)
