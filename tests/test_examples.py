"""The examples in docstrings, run as a user would, and what the package says it has."""

import doctest
import importlib
import subprocess
import sys

import jax
from absl.testing import absltest, parameterized

import jaxrobust

MODULES = (
    *("attacks", "attacks.apgd", "attacks.pgd", "attacks.fab", "attacks.square"),
    *("models", "weights.convert", "weights.loading", "evaluation.autoattack", "data.transforms"),
)
# The names of design that have one each; `attacks` itself opens with two.
EXAMPLES = 13


class ExamplesTest(parameterized.TestCase):
    @parameterized.parameters(*MODULES)
    def test_examples(self, name):
        module = importlib.import_module(f"jaxrobust.{name}")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = doctest.testmod(module)
        self.assertGreater(found.attempted, 0)
        self.assertEqual(found.failed, 0)

    def test_public_names_have_one(self):
        attacks, models = jaxrobust.attacks, jaxrobust.models
        own = [attacks.fgsm, attacks.pgd, attacks.apgd, attacks.fab, attacks.square]
        own += [models.available, models.create, models.load, jaxrobust.evaluation.autoattack]
        own += [jaxrobust.convert.from_torch, jaxrobust.convert.to_torch]
        own += [jaxrobust.data.evaluation_transform]
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
        from jaxrobust.__main__ import COMMANDS

        for command in COMMANDS:
            importlib.import_module(command.split()[2])


if __name__ == "__main__":
    absltest.main()
