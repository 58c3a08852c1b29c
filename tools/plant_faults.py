"""Which small faults in the package its tests let through: mutation testing, folder by folder.

python tools/plant_faults.py draw PATH ... [--count 10] [--seed 0] > faults.jsonl
python tools/plant_faults.py run faults.jsonl

`draw` writes one fault a line, each in another of the files while there are enough. A line says
what stands where and what is to stand there instead: lines can be taken out (a fault that changes
nothing is none) or written by hand, without `line` and `column` where the text is there once.
`run` plants one after the other into a clone of the last commit, and runs with each the tests that
import its file, then those of its folder. It prints which test caught it, after a look that this
one passes without the fault.
"""

import argparse
import ast
import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PAIRS = "Lt LtE|Gt GtE|Eq NotEq|In NotIn|Is IsNot|Add Sub|Mult Div|And Or|BitAnd BitOr"
_PAIRS += "|min max|minimum maximum|argmin argmax|any all|zeros ones|mean sum"
_OTHER = {a: b for pair in _PAIRS.split("|") for a, b in [pair.split(), pair.split()[::-1]]}
_OTHER |= dict(floor="ceil")
_TEXT = {"print", "flag", "warn", "warning", "info", "add_argument", "join"}
_ALIKE = {"min", "max", "minimum", "maximum", "isinstance", "getattr", "map", "add", "multiply"}
_NO_CODE = ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom
Fault = tuple[str, Any, ast.AST]  # its kind, what stands there, what is to stand there instead


def sites(tree: ast.AST) -> Iterator[ast.AST]:
    """Give all nodes but those of texts, messages, annotations, decorators and assertions."""
    told = isinstance(tree, ast.Call) and ast.unparse(tree.func).split(".")[-1] in _TEXT
    if told or isinstance(tree, _NO_CODE):
        return
    yield tree
    for name, value in ast.iter_fields(tree):
        if name not in ("annotation", "returns", "decorator_list", "bases"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from sites(child)


def faults(node: ast.AST) -> Iterator[Fault]:
    """Give the single faults of this node alone."""
    match node:
        case ast.Compare(ops=[op]) if other := _OTHER.get(type(op).__name__):
            yield "comparison", *_with(node, ops=[getattr(ast, other)()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if other := _OTHER.get(type(op).__name__):
            yield "operator", *_with(node, op=getattr(ast, other)())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "sign", node, operand
        case ast.Constant(value=bool() | int() | float() as value):
            more = not value if isinstance(value, bool) else value + 1
            yield "constant", node, ast.Constant(2 * value or 1.0 if type(value) is float else more)
        case ast.If(test=test) | ast.IfExp(test=test):
            yield from (("condition", test, ast.Constant(value)) for value in (True, False))
        case ast.Slice(lower=ast.Constant(value=int(value))):
            yield "slice", *_with(node, lower=ast.Constant(value + 1))
        case ast.Expr(value=ast.Call()) | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", node, ast.Pass()
        case ast.Call():
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[Fault]:
    for gone in node.keywords:
        if gone.arg not in (None, "help", "metavar"):
            yield "keyword", *_with(node, keywords=[k for k in node.keywords if k is not gone])
    *owner, name = ast.unparse(node.func).split(".")
    if name in _OTHER:
        yield "name", *_with(node, func=ast.Name(".".join([*owner, _OTHER[name]])))
    two = node.args[:2]
    differ = len({ast.dump(one) for one in two}) == 2
    alike = len({type(one) for one in two} | {ast.Starred}) == 2  # what is not ends in a TypeError
    if differ and alike and name not in _ALIKE:
        yield "arguments", *_with(node, args=[*two[::-1], *node.args[2:]])


def _with(node: ast.AST, **fields: Any) -> tuple[ast.AST, ast.AST]:
    other = copy.copy(node)
    other.__dict__.update(fields)
    return node, other


def draw(file: Path, dice: random.Random) -> dict[str, Any] | None:
    """Return one fault of this file, of a kind that is drawn first: there are many constants."""
    source = file.read_text()
    kinds: dict[str, list[Fault]] = defaultdict(list)
    for kind, node, other in itertools.chain(*map(faults, sites(ast.parse(source)))):
        kinds[kind].append((kind, node, other))
    if not kinds:
        return None
    kind, node, other = dice.choice(kinds[dice.choice(sorted(kinds))])
    new, old = ast.unparse(other), ast.get_source_segment(source, node)
    new = f"({new})" if isinstance(other, ast.BinOp | ast.BoolOp | ast.Compare) else new
    place = {"line": node.lineno, "column": node.col_offset}
    return {"file": str(file.relative_to(ROOT)), **place, "kind": kind, "old": old, "new": new}


def planted(source: str, row: dict[str, Any]) -> str:
    """Return the source with the fault; `ValueError` where its text does not stand there."""
    lines = source.splitlines(keepends=True)
    at = sum(map(len, lines[: row.get("line", 1) - 1])) + row.get("column", 0)
    if "line" not in row and source.count(row["old"]) == 1:
        at = source.index(row["old"])
    if not source.startswith(row["old"], at):
        raise ValueError(f"{row['file']}: {row['old']!r} does not stand there, or not once")
    return source[:at] + row["new"] + source[at + len(row["old"]) :]


def tests_of(tree: Path, file: Path) -> Iterator[tuple[str, list[str]]]:
    """Give the tests that import the file, those of its name first, and the tests of its folder."""
    room = Path("tests", file.parts[1])
    own = (tree / room).is_dir()
    parent, stem = ".".join(file.parts[:-1]), file.stem
    imports = re.compile(rf"from {parent} import [^()\n]*(\([^)]*)?\b{stem}\b|{parent}\.{stem}\b")
    searched = room if own and room.name != "commands" else "tests"  # with what they start
    tests = sorted(
        (tree / searched).rglob("test_*.py"), key=lambda t: (t.stem != f"test_{stem}", t)
    )
    near = [t for t in tests if t.stem == f"test_{stem}" or imports.search(t.read_text())]
    names = [str(t.relative_to(tree)) for t in near]
    yield "near", names
    yield "folder", [str(room), *(f"--ignore={name}" for name in names)] if own else []


def failing(tree: Path, tests: list[str]) -> str | None:
    """Return the first of these tests that fails, or the first of all if it never ends."""
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-rfE", *tests]
    how: Any = {"cwd": tree, "env": {**os.environ, "PYTHONPATH": str(tree)}, "timeout": 600}
    try:
        done = subprocess.run(command, capture_output=True, text=True, **how)
    except subprocess.TimeoutExpired:
        return tests[0]
    found = re.search(r"^(?:SUB)?(?:FAILED|ERROR).*? (tests/\S+)", done.stdout, re.MULTILINE)
    return (
        None if done.returncode in (0, 5) else found[1] if found else tests[0]
    )  # 5: there are none


def run(rows: list[dict[str, Any]]) -> None:
    """Plant each fault and print what caught it, then the sums."""
    caught: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(
            ["git", "-c", "advice.detachedHead=false", "clone", "-q", str(ROOT), str(tree)],
            check=True,
        )
        for number, row in enumerate(rows, 1):
            file, verdict, test = tree / row["file"], "missed", None
            healthy = file.read_text()
            file.write_text(planted(healthy, row))
            os.utime(file, (0, number))  # or Python might take the bytecode of the one before
            for stage, tests in tests_of(tree, Path(row["file"])):
                if tests and not test and (test := failing(tree, tests)):
                    verdict = stage
            file.write_text(healthy)
            if test and failing(tree, [test]):
                verdict = "fails without it"
            caught[verdict] += 1
            print(verdict, json.dumps({**row, "by": test}), flush=True)
    print(*(f"{verdict} {n}" for verdict, n in sorted(caught.items())), sep=", ")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("what", choices=("draw", "run"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.what == "run":
        lines = [line for path in given.paths for line in path.read_text().splitlines()]
        return run([json.loads(line) for line in lines])
    dice, paths = random.Random(given.seed), [p.resolve() for p in given.paths]
    files = sorted({f for p in paths for f in ([p] if p.is_file() else p.rglob("*.py"))})
    dice.shuffle(files)
    drawn = (row for _ in range(given.count) for f in files if (row := draw(f, dice)))
    print(*map(json.dumps, itertools.islice(drawn, given.count)), sep="\n")


if __name__ == "__main__":
    main()
