"""Modules under the names that they had."""

import ast
import importlib
import subprocess
import sys
import warnings

import pytest
from absl.testing import absltest, parameterized

import jaxrobust
from jaxrobust.runtime import moved
from tests.support import paths

MODULES = sorted(old for old, new in moved.names().items() if ":" not in new)
PACKAGES = sorted(old for old in MODULES if moved.names()[old].startswith(f"{old}."))


def bound(package: str) -> set[str]:
    """The names that a package's `__init__` imports from its modules, or defines."""
    file = paths.ROOT.joinpath(*package.split("."), "__init__.py")
    nodes = ast.parse(file.read_text()).body if file.is_file() else []
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    functions = [
        n for n in imports if not paths.ROOT.joinpath(*(n.module or "").split(".")).is_dir()
    ]
    return own | {a.asname or a.name for n in functions for a in n.names}


class MovedTest(parameterized.TestCase):
    def test_every_name_of_before_is_the_module_of_today(self):
        for old in set(MODULES) - set(PACKAGES):
            if "commands" in moved.names()[old] or "torch_" in old:  # flags are defined once
                continue
            with self.subTest(old), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.assertIs(
                    importlib.import_module(old), importlib.import_module(moved.names()[old])
                )

    def test_a_module_of_today_keeps_its_own_name(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            found = importlib.import_module("jaxrobust.runtime.jsonl")
        self.assertEqual(found.__spec__.name, found.__name__)
        self.assertEqual(found.__name__, "jaxrobust.runtime.files.jsonl")

    @parameterized.parameters(*PACKAGES)
    def test_a_package_has_the_names_of_the_module_whose_place_it_took(self, package):
        new = importlib.import_module(moved.names()[package])
        own = (
            n for n, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__
        )
        name = next(n for n in own if n[0] != "_")
        with self.assertWarnsRegex(FutureWarning, f"{package}.{name} is {new.__name__}.{name} tod"):
            self.assertIs(getattr(importlib.import_module(package), name), getattr(new, name))
        with self.assertRaisesRegex(AttributeError, "has no attribute 'nothing'"):
            importlib.import_module(package).nothing  # noqa: B018

    def test_no_function_of_a_package_is_hidden(self):
        """An import of `package.name` binds `name` in the package, whatever stood there."""
        for old in MODULES:
            package, _, name = old.rpartition(".")
            self.assertNotIn(name, bound(package), old)

    def test_a_function_that_moved(self):
        for module, name in (("import_torch", "import_weights"), ("certificate", "certificate")):
            old = importlib.import_module(f"jaxrobust.convert.{module}")
            new = importlib.import_module(f"jaxrobust.commands.conversion.{name}")
            with self.assertWarnsRegex(FutureWarning, f"{module}.main is jaxrobust.commands"):
                self.assertIs(old.main, new.main)
            with self.assertRaisesRegex(AttributeError, "has no attribute 'nothing'"):
                old.nothing  # noqa: B018

    def test_it_is_told(self):
        code = "from jaxrobust.weights.loading import load; import jaxrobust; assert load"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("jaxrobust.weights.loading is jaxrobust.weights.load today", done.stderr)

    @pytest.mark.slow
    def test_a_command_of_before(self):
        done = subprocess.run(
            [sys.executable, "-m", "jaxrobust.scaling", "5e9"], capture_output=True, text=True
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("rounded", done.stdout)

    def test_public_functions_stay_functions(self):
        for name in ("autoattack", "worst_case"):
            self.assertTrue(callable(getattr(jaxrobust.evaluation, name)), name)


if __name__ == "__main__":
    absltest.main()
