"""The size of the package, which only falls.

`python -m tests.test_budget > tests/budget.txt` writes today's figures as limits, which fail when
they are 2% too high. `USED` lines of the issues' allowances, `ALLOWED`, raise limits of lines.
"""

import ast
import subprocess
import sys
from collections import Counter

from absl.testing import absltest

from tests.support import paths
from tests.support.layers import FLOOR, PACKAGE, arrows, room

ALLOWED = {"attacks": 1200, "seeds": 1500, "GPU kernels": 2500, "encoders": 3500}
USED = dict.fromkeys(ALLOWED, 0)
WORDS = {"given", "known", "seen", "own", "kept", "how", "whole", "made", "ours", "beside"}
ENTRIES = ("training.run.run", "training.update.step", "models.families.convnext")
# All in one process, which imports JAX once.
LOADED = """
import importlib, sys
for entry in sys.argv[1:]:
    ours = lambda: [name for name in sys.modules if name.split(".")[0] == "jaxrobust"]
    for name in ours():
        del sys.modules[name]
    importlib.import_module(f"jaxrobust.{entry}")
    print(len(ours()))
"""


def lines(folder: str, *patterns: str) -> int:
    files = {file for pattern in patterns for file in (paths.ROOT / folder).rglob(pattern)}
    return sum(file.read_bytes().count(b"\n") for file in files)


def loaded() -> list[int]:
    """Return the number of modules that each of the entries loads."""
    command = [sys.executable, "-c", LOADED, *ENTRIES]
    return [int(line) for line in subprocess.check_output(command, cwd=paths.ROOT).split()]


def of_file(file) -> Counter[str]:
    top, nodes = file.relative_to(PACKAGE).parts[0], [*ast.walk(ast.parse(file.read_text()))]
    found = Counter({f"lines of {top}": len(file.read_text().splitlines())})
    for node in nodes:
        found[f"nodes of {top}"] += 1
        if isinstance(node, ast.arguments):
            named = [arg.arg for arg in (*node.posonlyargs, *node.args, *node.kwonlyargs)]
            rest = [arg.arg for arg in (node.vararg, node.kwarg) if arg]
            found["parameters of private words"] += len(WORDS.intersection(named + rest))
            found["functions of more than 8 parameters"] += len(named) > 8
    return found


def figures() -> dict[str, int]:
    files = [*PACKAGE.rglob("*.py")]
    data = [file for file in PACKAGE.rglob("*.*") if file.is_file()]
    pairs = {(room(a), room(b)) for a, b in arrows() if room(a) != room(b)}
    return {
        **sum(map(of_file, files), Counter()),
        **{f"modules loaded by {k}": n for k, n in zip(ENTRIES, loaded(), strict=True)},
        "arrows": len(pairs),
        "arrows up": sum(FLOOR[a] <= FLOOR[b] for a, b in pairs),
        "bytes of data": sum(f.stat().st_size for f in data if f.suffix not in (".py", ".pyc")),
        "files": len(files),
        "lines of golden text": lines("tests", "*.txt", "*.json", "*.csv", "*.md"),
        "lines of tests": lines("tests", "*.py"),
        "lines of tools": lines("tools", "*.py"),
        "rooms": len(FLOOR),
    }


class BudgetTest(absltest.TestCase):
    def test_figures_only_fall(self):
        rows = (paths.ROOT / "tests/budget.txt").read_text().splitlines()
        limits = {name: int(number) for number, name in (row.split(" ", 1) for row in rows)}
        today = figures()
        self.assertEqual(today.keys(), limits.keys())
        self.assertTrue(all(USED[issue] <= ALLOWED[issue] for issue in ALLOWED))
        for name, limit in limits.items():
            with self.subTest(name):
                most = limit + sum(USED.values()) * name.startswith("lines of")
                self.assertLessEqual(today[name], most, "make something smaller")
                self.assertGreaterEqual(today[name], 0.98 * limit - 2, "lower the limit")


if __name__ == "__main__":
    print(*(f"{n} {name}" for name, n in sorted(figures().items())), sep="\n")
