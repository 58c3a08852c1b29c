"""The list of the longest tests, which a folder's run leaves out."""

import ast

from absl.testing import absltest

from tests.conftest import THOROUGH


class ThoroughTest(absltest.TestCase):
    def test_every_line_names_a_test_that_there_is(self):
        lines = THOROUGH.read_text().split()
        self.assertNotEmpty(lines)
        self.assertEqual(lines, sorted(set(lines)))
        for line in lines:
            with self.subTest(line):
                file, of, name = line.split("::")
                tree = ast.parse((THOROUGH.parent / file).read_text())
                (found,) = (c for c in tree.body if isinstance(c, ast.ClassDef) and c.name == of)
                methods = [f.name for f in found.body if isinstance(f, ast.FunctionDef)]
                self.assertTrue(
                    any(name.startswith(method) for method in methods if "test" in method)
                )


if __name__ == "__main__":
    absltest.main()
