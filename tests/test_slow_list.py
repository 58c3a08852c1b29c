"""The list of the longest tests, which only `python tools/check.py --slow` runs."""

import ast

from absl.testing import absltest

from tests.conftest import SLOW


class SlowListTest(absltest.TestCase):
    def test_every_line_names_a_test_that_there_is(self):
        lines = SLOW.read_text().split()
        self.assertNotEmpty(lines)
        self.assertEqual(lines, sorted(set(lines)))
        for line in lines:
            with self.subTest(line):
                file, of, name = line.split("::")
                tree = ast.parse((SLOW.parent / file).read_text())
                (found,) = (c for c in tree.body if isinstance(c, ast.ClassDef) and c.name == of)
                methods = [f.name for f in found.body if isinstance(f, ast.FunctionDef)]
                self.assertTrue(
                    any(name.startswith(method) for method in methods if "test" in method)
                )


if __name__ == "__main__":
    absltest.main()
