"""The oldest and the newest versions: which they are, and what is run on them."""

import contextlib
import io
import os
import re
import subprocess
import tomllib
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from tests.support import paths
from tools import check_versions


def project() -> dict:
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]


class FloorsTest(absltest.TestCase):
    def test_every_dependency_has_one(self):
        """Without, the oldest environment would get a package's first version ever."""
        named = [*project()["dependencies"], *project()["optional-dependencies"]["test"]]
        self.assertEmpty([text for text in named if not re.search(r">=\d", text)])

    def test_oldest_python(self):
        minor = project()["requires-python"].removeprefix(">=")
        self.assertEqual(minor, ".".join(map(str, check_versions.OLDEST)))


class InterpretersTest(absltest.TestCase):
    def test_the_highest_first_and_none_that_cannot_run(self):
        folder = Path(self.create_tempdir())
        for name, body in {
            "python3.15": "echo 3 15",
            "python3.14": "exit 1",  # pyenv's, for a version that is not chosen
            "python3.13": "echo Python",
            "versions/3.12.9/bin/python3": "echo 3 12",
            "versions/3.10.1/bin/python3": "echo 3 10",
        }.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        given = {"PATH": str(folder), "PYENV_ROOT": str(folder)}
        with mock.patch.dict(os.environ, given):
            found = check_versions.interpreters()
        own = [path for _, path in found if path == check_versions.sys.executable]
        self.assertLen(own, 1)
        stubs = [(version, path) for version, path in found if path not in own]
        expected = [
            ((3, 15), f"{folder}/python3.15"),
            ((3, 12), f"{folder}/versions/3.12.9/bin/python3"),
        ]
        self.assertEqual(
            stubs, [row for row in expected if row[0] != check_versions.sys.version_info[:2]]
        )
        self.assertEqual(found, sorted(found, reverse=True))


class MainTest(parameterized.TestCase):
    def run_main(self, *arguments, versions=None, pythons=((3, 13), (3, 12)), fails=(), tests=0):
        """(exit code, commands, what is said), where commands that name one of `fails` fail."""
        commands = []

        def run(command, **unused):
            commands.append(" ".join(map(str, command)))
            failed = any(word in commands[-1] for word in fails)
            code = tests if "pytest" in command else int(failed)
            return subprocess.CompletedProcess(command, code)

        said = io.StringIO()
        with (
            mock.patch.object(check_versions.subprocess, "run", run),
            # These tests may run in the very environment that would be removed.
            mock.patch.object(check_versions.shutil, "rmtree"),
            mock.patch.object(check_versions, "versions", versions or (lambda python: python)),
            mock.patch.object(
                check_versions, "interpreters", lambda: [(v, f"python{v[1]}") for v in pythons]
            ),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            code = check_versions.main(list(arguments))
        return code, commands, said.getvalue()

    def test_both(self):
        code, commands, said = self.run_main("tests/attacks", "-x")
        self.assertEqual(code, 0)
        root = paths.ROOT
        inside = {name: f"{root}/.venv-{name}/bin/python" for name in ("oldest", "newest")}
        self.assertEqual(
            commands,
            [
                f"python12 -m venv {root}/.venv-oldest",
                f"{inside['oldest']} -m pip install -q uv",
                f"{inside['oldest']} -m uv pip install -q --python {root}/.venv-oldest "
                "--resolution lowest-direct -e .[test]",
                f"{inside['oldest']} -m pytest tests/attacks -x",
                f"python13 -m venv {root}/.venv-newest",
                f"{inside['newest']} -m pip install -q --upgrade -e .[test]",
                f"{inside['newest']} -m pytest tests/attacks -x",
            ],
        )
        self.assertIn(f"oldest: {inside['oldest']}\n", said)

    def test_the_highest_python_for_which_everything_installs(self):
        _, commands, said = self.run_main("newest", fails=("python13 -m venv",))
        self.assertIn("newest: no environment for Python 3.13\n", said)
        self.assertStartsWith(commands[1], "python12 -m venv")
        self.assertIn("-m pytest", commands[-1])

    def test_nothing_newer(self):
        code, commands, said = self.run_main("newest", versions=lambda python: "the same")
        self.assertEqual(code, 0)
        self.assertIn("newest: this machine has nothing newer than what runs here", said)
        self.assertFalse(any("pytest" in command for command in commands))
