"""Functions that a user names, from modules and files, and every way in which that fails."""

import contextlib
import dataclasses
import hashlib
import sys
from pathlib import Path

from absl.testing import parameterized

from jaxrobust.evaluation.engine import engine
from jaxrobust.runtime.commandline import functions
from tests.support import sweeps

SOURCE = """
from neighbour import WIDTH

class Made:
    @staticmethod
    def inner(x):
        return x + WIDTH

def make(x=1):
    return x + WIDTH

number = 3
"""

NETS = """import jax
import helper
def turned(x):
    return helper.bad(x)
def asked(x):
    return x if x.sum() > 0 else 2 * x
def drawn(x):
    return x @ jax.numpy.ones((3, 10))
"""


class FindTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.enter_context(contextlib.chdir(self.folder))
        path, known = list(sys.path), set(sys.modules)
        self.addCleanup(lambda: (sys.path.__setitem__(slice(None), path), self.forget(known)))

    def forget(self, known):
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(self.folder)):
                del sys.modules[name]

    def write(self, name, text) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def find(self, name):
        return functions.find("model.name", name)

    def test_of_a_file_and_its_neighbour(self):
        path = self.write("deep/nets.py", SOURCE)
        self.write("deep/neighbour.py", "WIDTH = 10")
        found = self.find("deep/nets.py:make")
        self.assertEqual(found.function(), 11)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        expected = {"name": "deep/nets.py:make", "file": "deep/nets.py", "sha256": sha256}
        self.assertEqual(found.record(), expected)
        self.assertEqual(self.find("deep/nets.py:Made.inner").function(1), 11)
        self.assertIs(self.find(f"{path}:make").function, found.function)

    def test_a_file_that_changes_is_run_again(self):
        path = self.write("nets.py", "def make(): return 1")
        first = self.find("nets.py:make")
        path.write_text("def make(): return 2")
        second = self.find("nets.py:make")
        self.assertEqual((first.function(), second.function()), (1, 2))
        self.assertNotEqual(first.sha256, second.sha256)

    def test_of_a_module_in_the_current_folder(self):
        self.write("own_package/__init__.py", "")
        path = self.write("own_package/nets.py", "def make(): return 5")
        found = self.find("own_package.nets:make")
        self.assertEqual(found.function(), 5)
        self.assertEqual(found.sha256, hashlib.sha256(path.read_bytes()).hexdigest())
        self.assertTrue(Path(found.file).samefile(path))

    def test_classes_find_their_module(self):
        """As dataclasses do, whose annotations are texts."""
        text = "from __future__ import annotations\nimport dataclasses\n"
        text += (
            "@dataclasses.dataclass\nclass Net:\n    width: dataclasses.KW_ONLY\n    n: int = 3\n"
        )
        self.write("nets.py", text)
        made = self.find("nets.py:Net").function
        self.assertLen(dataclasses.fields(made), 1)

    @sweeps.rows(
        ("nets.py:", "does not name a function; write my_package.nets:make, or my_nets.py:make"),
        (":make", "does not name a function"),
        ("nets.py:make it", "does not name a function"),
        ("none.py:make", r"cannot read none.py \(No such file.*; paths are relative to the folder"),
        ("nets.py:mak", r"nets.py has no 'mak'; did you mean make\? it has Made, make$"),
        ("nets.py:number", "number is not a function, but of type int"),
        ("no_such_package.nets:make", "the module no_such_package is neither installed nor"),
        ("jaxrobust.nothing:make", "the module jaxrobust.nothing is neither installed"),
        ("absent.py:make", r"absent.py, line 2: ModuleNotFoundError: No module named 'absent_'"),
        ("syntax.py:make", r"syntax.py, line 2: SyntaxError: "),
        ("divides.py:make", r"divides.py, line 3: ZeroDivisionError: division by zero"),
        ("inner:make", r"inner.py, line 1: ModuleNotFoundError: No module named 'absent_'"),
    )
    def test_mistakes_are_one_sentence(self, name, message):
        self.write("nets.py", SOURCE)
        self.write("neighbour.py", "WIDTH = 10")
        self.write("absent.py", "\nimport absent_")
        self.write("inner.py", "import absent_")
        self.write("syntax.py", "\ndef make(:")
        self.write("divides.py", "def half():\n    '''1'''\n    return 1 / 0\nhalf()\n")
        with self.assertRaisesRegex(ValueError, message) as caught:
            self.find(name)
        self.assertNotIn("\n", str(caught.exception))
        self.assertIn(f"model.name={name}", str(caught.exception))

    @sweeps.rows(
        ("nets.py", True),
        ("site-packages/nets.py", False),
        ("dist-packages/deep/nets.py", False),
        ("none.py", False),
    )
    def test_a_users_file_is_no_installed_one(self, name, own):
        path = self.folder / name
        if name != "none.py":
            self.write(name, "")
        self.assertEqual(functions._is_users(path), own)

    def test_python_is_no_users_file(self):
        self.assertFalse(functions._is_users(Path(dataclasses.__file__)))

    def test_nothing_is_left_of_what_failed(self):
        path, known = self.write("nets.py", "1 / 0"), set(sys.modules)
        with self.assertRaises(ValueError):
            self.find("nets.py:make")
        self.assertNotIn(str(path), functions._loaded)
        self.assertEmpty({name for name in set(sys.modules) - known if name.startswith("nets")})

    def test_installed_modules_go_before_those_beside_a_file(self):
        self.write("deep/nets.py", "import json\ndef make(): return json.dumps(1)")
        self.write("deep/json.py", "")
        self.assertEqual(self.find("deep/nets.py:make").function(), "1")
        self.assertEqual(sys.path[-1], str(self.folder / "deep"))

    def test_what_failed_is_tried_again(self):
        path = self.write("nets.py", "1 / 0")
        with self.assertRaisesRegex(ValueError, "ZeroDivisionError"):
            self.find("nets.py:make")
        path.write_text("def make(): return 1")
        self.assertEqual(self.find("nets.py:make").function(), 1)

    @sweeps.rows(
        ("turned", "helper.py, line 3", "see helper.py, line 3"),
        ("asked", "nets.py, line 6", "see nets.py, line 6"),
        ("drawn", "nets.py, line 8", ""),
    )
    def test_an_error_has_the_line_of_the_users_code(self, name, place, end):
        """JAX names the function that it traces, which is one of ours."""
        self.write("helper.py", "import numpy as np\ndef bad(x):\n    return np.asarray(x)\n")
        self.write("nets.py", NETS)
        network = functions.find("--function", f"nets.py:{name}").function
        try:  # `assertRaises` would lose the traceback
            engine.trace(engine.make(network, slots=4), (4, 4, 1))
        except Exception as error:
            caught = error
        if end:  # a sentence of ours, which names the line
            self.assertIsNone(functions.of_users(caught))
            self.assertEndsWith(str(caught), f"; {end}")
            caught = caught.__cause__
        said = functions.of_users(caught)
        self.assertStartsWith(said, f"{place}: {type(caught).__name__}: ")
        self.assertNotIn("traced for", said)

    def test_an_error_of_ours_has_none(self):
        try:
            functions.find("--function", "nets.py:none")
        except ValueError as error:
            self.assertIsNone(functions.of_users(error))
