"""Every command prints its help, and runs as a module of its old name too."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

from absl.testing import parameterized

from jaxrobust import __main__ as overview
from tests.support.commands import run_command
from tests.support.paths import ROOT

OLD = {"main.py": "train", "evaluate.py": "evaluate", "data/prepare/__main__.py": "prepare"}
OLD |= {f"{name}/__main__.py": name for name in ("doctor", "report", "models")}
OLD |= {f"convert/{name}_torch.py": name for name in ("import", "export")}
OLD |= {"convert/certificate.py": "certificate"}
# Started as processes elsewhere: flags of absl can be defined once in a process.
PROCESSES = ("train", "evaluate", "doctor")


class ModulesTest(parameterized.TestCase):
    def test_a_command_prints_its_help(self):
        for name in (name for name in overview.COMMANDS if name not in PROCESSES):
            with self.subTest(name=name):
                printed = io.StringIO()
                with (
                    mock.patch.object(sys, "argv", [name, "--help"]),
                    mock.patch.dict(
                        os.environ, JAXROBUST_ALLOCATOR="system"
                    ),  # else it starts anew
                    contextlib.redirect_stdout(printed),
                    contextlib.suppress(SystemExit),
                ):
                    overview.run(name)
                self.assertIn(f"jaxrobust {name} ", printed.getvalue())

    def test_a_long_help_is_asked_for(self):
        for name in PROCESSES:
            lengths = []
            for word in ("--help", "--help-all"):
                code, printed, error = run_command([name, word], ROOT)
                self.assertEqual(code, 0, error)
                self.assertNotIn("[no]", printed)
                self.assertEqual("--help-all lists all flags." in printed, word == "--help")
                lengths.append(len(printed))
            self.assertLess(lengths[0], lengths[1])

    def test_an_old_name_is_the_command(self):
        for file, command in OLD.items():
            with self.subTest(row=(file, command)):
                with mock.patch.object(overview, "run") as started, contextlib.suppress(SystemExit):
                    runpy.run_path(str(ROOT / "jaxrobust" / file), run_name="__main__")
                started.assert_called_once_with(command)

    def test_a_module_of_a_command_is_not_started_itself(self):
        """It would end with 0 and have done nothing."""
        words = [sys.executable, "-m", "jaxrobust.commands.compare", "A", "B"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("run a command as `python -m jaxrobust COMMAND`", done.stderr)

    def test_a_full_disk_is_one_sentence(self):
        words = [sys.executable, "-m", "jaxrobust"]
        with open("/dev/full", "w") as full:
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        said = "jaxrobust: cannot write the output: no space left on the device\n"
        self.assertEqual((done.returncode, done.stderr), (3, said))

    def test_these_are_all_old_names(self):
        package = ROOT / "jaxrobust"
        text = {str(f.relative_to(package)): f.read_text() for f in Path(package).rglob("*.py")}
        passed = {name for name in text if "from jaxrobust.__main__ import run" in text[name]}
        self.assertEqual(passed, OLD.keys())
