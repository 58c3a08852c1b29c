"""The lists of tests that `pytest` leaves to `tools/check.py`: of a landing, and slow ones."""

import ast
import functools
from pathlib import Path

from absl.testing import absltest

from tests.conftest import LISTS


class ListsTest(absltest.TestCase):
    def test_every_line_names_a_test_that_there_is(self):
        for path in LISTS.values():
            lines = path.read_text().splitlines()
            self.assertNotEmpty(lines)
            self.assertEqual(lines, sorted(set(lines)))
            self.assertEmpty([line for line in lines if not _is_there(path.parent, line)])

    def test_marks_stand_below_parameters(self):
        """Above `parameterized`, which makes an iterator of the test, pytest does not see them."""
        lost = []
        for path in sorted(Path(__file__).parent.rglob("test_*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
                kinds = [name.partition(".")[0] for name in names]
                if "parameterized" in kinds[kinds.index("pytest") :] if "pytest" in kinds else ():
                    lost.append(f"{path.name}: {node.name}")
        self.assertEmpty(lost)


def _is_there(folder: Path, line: str) -> bool:
    file, of, *name = line.split("::")  # a whole class without a name
    classes = _classes(folder / file)
    functions = (f for c in classes for f in c.body if isinstance(f, ast.FunctionDef))  # inherited
    tests = [f.name for f in functions if "test" in f.name]
    known = not name or any(name[0].startswith(test) for test in tests)
    return known and of in (c.name for c in classes)


@functools.cache
def _classes(file: Path) -> list[ast.ClassDef]:
    return [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
