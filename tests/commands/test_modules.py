"""Every command runs as a module too, under its old name as well."""

import contextlib
import io
import os
import runpy
import sys
import warnings
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust import __main__ as overview
from tests.support.paths import ROOT

OLD = {"main.py": "train", "evaluate.py": "evaluate", "data/prepare/__main__.py": "prepare"}
OLD |= {f"{name}/__main__.py": name for name in ("doctor", "estimate", "report", "models")}
# Started as processes elsewhere: flags of absl can be defined once in a process.
PROCESSES = ("train", "evaluate", "doctor")


class ModulesTest(parameterized.TestCase):
    @parameterized.parameters(*(name for name in overview.COMMANDS if name not in PROCESSES))
    def test_a_command_prints_its_help(self, name):
        printed = io.StringIO()
        with (
            mock.patch.object(sys, "argv", [name, "--help"]),
            mock.patch.dict(os.environ, JAXROBUST_ALLOCATOR="system"),  # else it starts anew
            contextlib.redirect_stdout(printed),
            warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # it is imported
            contextlib.suppress(SystemExit),
        ):
            runpy.run_module(overview.module_of(name), run_name="__main__", alter_sys=True)
        self.assertIn("--help", printed.getvalue())

    @parameterized.parameters(*OLD.items())
    def test_an_old_name_is_the_command(self, file, command):
        with mock.patch.object(runpy, "run_module") as started:
            runpy.run_path(str(ROOT / "jaxrobust" / file), run_name="__main__")
        module = overview.module_of(command)
        started.assert_called_once_with(module, run_name="__main__", alter_sys=True)

    def test_these_are_all_old_names(self):
        package = ROOT / "jaxrobust"
        text = {str(f.relative_to(package)): f.read_text() for f in Path(package).rglob("*.py")}
        passed = {name for name in text if 'run_module("jaxrobust.commands' in text[name]}
        self.assertEqual(passed, OLD.keys())


if __name__ == "__main__":
    absltest.main()
