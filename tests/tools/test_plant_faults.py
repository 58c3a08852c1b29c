"""Faults that the tool draws: each changes one thing, and none a text."""

import ast
import json
import subprocess
import sys
from pathlib import Path

from absl.testing import parameterized

from tests.support.paths import ROOT
from tools import plant_faults


def all_faults(source: str) -> set[str]:
    """Every fault of a source, as `what stands there -> what is to stand there`."""
    sites = plant_faults.sites(ast.parse(source))
    found = [fault for site in sites for fault in plant_faults.faults(site)]
    return {f"{ast.unparse(node)} -> {ast.unparse(other)}" for _, node, other in found}


class FaultsTest(parameterized.TestCase):
    def test_all_of_a_line(self):
        for source, expected in (
            ("a < b", {"a < b -> a <= b"}),
            ("a + b and c", {"a + b -> a - b", "a + b and c -> a + b or c"}),
            ("not -a", {"not -a -> -a", "-a -> a"}),
            ("x = 0.5 if a else b", {"0.5 -> 1.0", "a -> True", "a -> False"}),
            ("x[1:]", {"1 -> 2", "1: -> 2:"}),
            ("x = min(a, b)", {"min(a, b) -> max(a, b)"}),
            ("x = f(a, b, k=c)", {"f(a, b, k=c) -> f(a, b)", "f(a, b, k=c) -> f(b, a, k=c)"}),
            ("x.y = a", {"x.y = a -> pass"}),
            ('"""Text."""\ndef f(x: tuple[1, 2]) -> 3:\n    raise E(f"{1 + 2}")', set()),
            ("print(1 + 2)", {"print(1 + 2) -> pass"}),
        ):
            with self.subTest(row=(source, expected)):
                self.assertEqual(all_faults(source), expected)

    def test_only_what_was_drawn_is_another_text(self):
        row = {"file": "f.py", "function": "", "text": "b = 1", "column": 4, "old": "1", "new": "2"}
        self.assertEqual(plant_faults.planted("a = 1\nb = 1\n", row), "a = 1\nb = 2\n")
        with self.assertRaisesRegex(ValueError, "must occur exactly once"):
            plant_faults.planted("a = 1\nb = 1\n", {"file": "f.py", "old": "1", "new": "2"})

    def test_a_fault_follows_its_function(self):
        row = {"file": "p/a.py", "function": "f", "text": "return 1", "column": 7}
        row |= {"old": "1", "new": "2"}
        tree = Path(self.create_tempdir().full_path)
        (tree / "p/q").mkdir(parents=True)
        (tree / "p/a.py").write_text("def g():\n    return 1\n")
        self.assertIsNone(plant_faults.moved(tree, row))
        text = "class C:\n    def f():\n        return 1\n"
        (tree / "p/q/b.py").write_text(text)
        self.assertEqual(plant_faults.moved(tree, row), tree / "p/q/b.py")
        self.assertEqual(plant_faults.planted(text, row), text.replace("1", "2"))

    def test_a_seed_draws_the_same_in_several_files(self):
        command = [sys.executable, "tools/plant_faults.py", "draw", "jaxrobust/attacks"]
        command += ["--count", "8", "--seed", "4"]
        twice = [subprocess.check_output(command, cwd=ROOT, text=True) for _ in range(2)]
        self.assertEqual(*twice)
        rows = [json.loads(line) for line in twice[0].splitlines()]
        self.assertLen({row["file"] for row in rows}, 8)
        for row in rows:
            source = (ROOT / row["file"]).read_text()
            ast.parse(plant_faults.planted(source, row))

    def test_the_tests_of_the_name_come_first(self):
        file = Path("jaxrobust/attacks/geometry/balls.py")
        (_, near), (_, room) = plant_faults.tests_of(ROOT, file)
        self.assertEqual((near[0], room[0]), ("tests/attacks/test_balls.py", "tests/attacks"))
        self.assertIn("tests/attacks/test_apgd.py", near)  # which imports it
        self.assertIn("--ignore=tests/attacks/test_apgd.py", room)  # which has passed
