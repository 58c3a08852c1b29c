"""Plain English where a user or a newcomer reads: docstrings, messages and pages."""

import ast
import functools
import re
from pathlib import Path

from absl.testing import parameterized

from tests.support.paths import ROOT

PACKAGE = ROOT / "jaxrobust"
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs",
    "examples/README.md",
)

# A docstring's first line is imperative and true without the code; these say nothing without it.
EMPTY = re.compile(r"\bReturns? (what|how|where|which)\b")
# Words of a private vocabulary, and turns that a reader of another language stumbles over.
WORDS = re.compile(r"(?<![.\w-])(nobody|of its own|in words|rooms?|doors?|floors?)\b(?!\()", re.I)
OPERATORS = {"floor"}  # of PyTorch
# Grammatical, but no native speaker writes so; "there is no" and "no longer" are fine.
TURNS = re.compile(
    r"(?<![Tt]here )\b(is|are) (none|no (?!longer|more|less|different|sparser))\b"
    r"|\b([Ss]o many|[Aa]nother one|anew|(?<!-)[Bb]eside(?= ))\b"
)
_CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
# Where a house is drawn, it may have rooms, and where rooms are looked through.
_DRAWINGS = ("docs/architecture.md", "tools/generate/draw_architecture.py")
_DRAWINGS += ("jaxrobust/runtime/rooms.py",)
OF_A_HOUSE = {name: {"room", "rooms"} for name in _DRAWINGS}


@functools.cache
def files() -> list[Path]:
    folders = (PACKAGE, ROOT / "tools", ROOT / "configs")
    return [path for folder in folders for path in folder.rglob("*.py")]


@functools.cache
def texts(path: Path) -> list[tuple[int, str, bool]]:
    """(line, text, is a docstring) of each string that somebody may read."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node)
    }
    return [
        (node.lineno, _CODE.sub("", node.value), node in docstrings)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def pages() -> list[Path]:
    found = [*PACKAGE.rglob("*.md")]
    for name in PAGES:
        path = ROOT / name
        found += [*path.rglob("*.md")] if path.is_dir() else [path] * path.is_file()
    return sorted(found)


class EnglishTest(parameterized.TestCase):
    def test_first_lines_say_something_without_the_code(self):
        self.assertGreater(len(files()), 100)
        found = [
            f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
            for path in files()
            for line, text, is_docstring in texts(path)
            if is_docstring and EMPTY.search(text.strip().partition("\n\n")[0])
        ]
        self.assertEmpty(found)

    def test_docstrings_and_messages_use_the_words_of_the_field(self):
        found = [
            f"{path.relative_to(ROOT)}:{line}: {match[0]!r}"
            for path in files()
            for line, text, _ in texts(path)
            if (match := WORDS.search(text) or TURNS.search(text))
            and match[0].lower() not in OF_A_HOUSE.get(str(path.relative_to(ROOT)), set())
            and text not in OPERATORS
        ]
        self.assertEmpty(found)

    def test_pages_too(self):
        found = []
        for path in pages():
            name = str(path.relative_to(ROOT))
            text = _CODE.sub("", path.read_text())
            for match in (*WORDS.finditer(text), *TURNS.finditer(text)):
                if match[0].lower() not in OF_A_HOUSE.get(name, set()):
                    found.append(f"{name}: {match[0]!r}")
        self.assertEmpty(found)

    def test_of_this_test(self):
        for text, pattern, expected in (
            ("Return what a file says.", EMPTY, True),
            ("Return the names of a file.", EMPTY, False),
            ("None: nobody knows", WORDS, True),
            ("Math.floor(x)", WORDS, False),
            ("a floor of the loss", WORDS, True),
            ("outdoors and mushrooms", WORDS, False),
            ("a width of 200 is none", TURNS, True),
            ("None where there is none", TURNS, False),
            ("7 is no number", TURNS, True),
            ("there is no number", TURNS, False),
            ("the flag is no longer read", TURNS, False),
            ("the table beside a figure", TURNS, True),
            ("drawn anew, so many times, from another one", TURNS, True),
        ):
            with self.subTest(row=(text, pattern, expected)):
                self.assertEqual(bool(pattern.search(text)), expected)
