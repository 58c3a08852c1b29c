"""The recipes for contributors, executed in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import absltest

from tests.support.paths import ROOT

_BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def recipes() -> dict[str, list[tuple[str, str]]]:
    """The (kind, text) of the blocks of each recipe, by its page."""
    return {
        page.stem: _BLOCK.findall(page.read_text()) for page in ROOT.glob("docs/howto/add_*.md")
    }


def changed(text: str, diff: str) -> str:
    """A file with hunks applied, each of which has one place."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old, new = (
            "\n".join(line[1:] for line in lines if line[:1] != other) + "\n" for other in "+-"
        )
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.slow  # a copy of the package and a process
class RecipesTest(absltest.TestCase):
    def test_all_do_what_they_say(self):
        folder = Path(self.create_tempdir())
        for package in ("jaxrobust", "configs"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, folder / package, ignore=ignored)
        programs = [text for blocks in recipes().values() for text in self.followed(folder, blocks)]
        self.assertLen(recipes(), 4)
        (folder / "empty").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(programs)],
            cwd=folder / "empty",
            env=os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)

    def followed(self, folder: Path, blocks: list[tuple[str, str]]) -> list[str]:
        """Follow a recipe, and return its programs."""
        programs = []
        for kind, text in blocks:
            head, _, rest = text.partition("\n")
            path = folder / head.removeprefix("# ")
            if kind == "diff":
                path.write_text(changed(path.read_text(), rest))
            elif head.endswith(".py"):
                self.assertFalse(path.exists(), f"{path} is there already")
                path.write_text(rest)
            else:
                programs.append(text)
        self.assertNotEmpty(programs)
        return programs
