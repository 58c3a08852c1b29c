"""Mutation testing: which small faults in the package its tests miss, folder by folder.

python tools/plant_faults.py draw PATH ... [--count 10] [--seed 0] > faults.jsonl
python tools/plant_faults.py run faults.jsonl [--seconds 60 --out verdicts.jsonl]

`draw` writes one fault per line, each in a different file if there are enough. A line gives the
place, the old text and the new text. You can delete lines (faults that change nothing do not count)
or write them by hand, without `text` and `column` if `old` occurs once. A fault is located by its
function and line of text, so it follows a function that moves. `run` plants the faults one by one
into a clone of the last commit, and runs the tests that import the file, then those of its folder.
It prints the test that caught a fault, after checking that this test passes without it. `--seconds`
only runs the tests that import the file, including slow ones, for this much CPU time; `--out`
appends each verdict to a file, whose faults are not planted again.
"""

import argparse
import ast
import copy
import itertools
import json
import os
import random
import re
import resource
import signal
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
Fault = tuple[str, Any, ast.AST]  # its kind, the old text, and the new node


def sites(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except in texts, messages, annotations, decorators and assertions."""
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
    """Yield the faults of this node alone."""
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
    alike = len({type(one) for one in two} | {ast.Starred}) == 2  # others end in a TypeError
    if differ and alike and name not in _ALIKE:
        yield "arguments", *_with(node, args=[*two[::-1], *node.args[2:]])


def _with(node: ast.AST, **fields: Any) -> tuple[ast.AST, ast.AST]:
    other = copy.copy(node)
    other.__dict__.update(fields)
    return node, other


def draw(file: Path, dice: random.Random) -> dict[str, Any] | None:
    """Draw one fault of this file, its kind first, because there are many constants."""
    source = file.read_text()
    kinds: dict[str, list[Fault]] = defaultdict(list)
    for kind, node, other in itertools.chain(*map(faults, sites(ast.parse(source)))):
        kinds[kind].append((kind, node, other))
    if not kinds:
        return None
    kind, node, other = dice.choice(kinds[dice.choice(sorted(kinds))])
    new, old = ast.unparse(other), ast.get_source_segment(source, node)
    new = f"({new})" if isinstance(other, ast.BinOp | ast.BoolOp | ast.Compare) else new
    line = source.splitlines()[node.lineno - 1]
    indent = len(line) - len(line.lstrip())
    place = {"function": _function(ast.parse(source), node.lineno), "text": line.strip()}
    place |= {"column": node.col_offset - indent, "kind": kind}
    return {"file": str(file.relative_to(ROOT)), **place, "old": old, "new": new}


def _function(tree: ast.AST, line: int) -> str:
    """Return the name of the innermost function or class around a line, empty at module level."""
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno
        if node.lineno <= line <= node.end_lineno
    ]
    return max(around, key=lambda node: node.lineno).name if around else ""


def _places(source: str, row: dict[str, Any]) -> list[int]:
    """Find the text of a fault in a source, within its function."""
    if "text" not in row:
        return [m.start() for m in re.finditer(re.escape(row["old"]), source)]
    tree, found, start = ast.parse(source), [], 0
    for number, line in enumerate(source.splitlines(keepends=True), 1):
        at = start + len(line) - len(line.lstrip()) + row["column"]
        if line.strip() == row["text"] and source.startswith(row["old"], at):
            found += [at] * (_function(tree, number) == row["function"])
        start += len(line)
    return found


def moved(tree: Path, row: dict[str, Any]) -> Path | None:
    """Return the file that now has a fault's text: its own, or the only other; None: deleted."""
    file = tree / row["file"]
    if file.exists() and _places(file.read_text(), row):
        return file
    package = sorted((tree / file.relative_to(tree).parts[0]).rglob("*.py"))
    others = [other for other in package if _places(other.read_text(), row)]
    same_name = [other for other in others if other.name == file.name]
    return (same_name or others or [None])[0]


def planted(source: str, row: dict[str, Any]) -> str:
    """Return the source with the fault; `ValueError` if its text is missing."""
    places = _places(source, row)
    if not places or ("text" not in row and len(places) > 1):
        raise ValueError(f"{row['file']}: {row['old']!r} must occur exactly once")
    return source[: places[0]] + row["new"] + source[places[0] + len(row["old"]) :]


def tests_of(tree: Path, file: Path) -> Iterator[tuple[str, list[str]]]:
    """List the tests that import the file, its own first, and the tests of its folder."""
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


def failing(tree: Path, tests: list[str], seconds: int = 0) -> str | None:
    """Return the first of these tests that fails, or the first of all if it never ends.

    With `seconds`, slow tests run too, and whatever has not failed after this much CPU time passes.
    """

    def limit() -> None:  # of CPU time, so that other work does not affect it
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))

    marks = ["-m", "not matrix"] if seconds else []
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-rfE", *marks, *tests]
    process: Any = {"cwd": tree, "env": {**os.environ, "PYTHONPATH": str(tree)}}
    process |= {"capture_output": True, "text": True, "preexec_fn": limit if seconds else None}
    try:
        done = subprocess.run(command, timeout=10 * seconds or 600, **process)
    except subprocess.TimeoutExpired:
        return None if seconds else tests[0]
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return None
    found = re.search(r"^(?:SUB)?(?:FAILED|ERROR).*? (tests/\S+)", done.stdout, re.MULTILINE)
    return None if done.returncode in (0, 5) else found[1] if found else tests[0]  # 5: no tests


def run(rows: list[dict[str, Any]], seconds: int = 0, out: Path | None = None) -> None:
    """Plant each fault and print the test that caught it, then the totals."""
    done = (
        [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    )
    caught = Counter(row.pop("verdict") for row in done)
    before = [{key: row[key] for key in row if key != "by"} for row in done]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        clone = ["git", "-c", "advice.detachedHead=false", "clone", "-q", str(ROOT), str(tree)]
        subprocess.run(clone, check=True)
        if (shared := ROOT.parent / "shared").exists():  # some tests read it
            Path(folder, "shared").symlink_to(shared)
        for number, row in enumerate(row for row in rows if row not in before):
            verdict, test = _judged(tree, row, seconds, number)
            caught[verdict] += 1
            line = json.dumps({**row, "verdict": verdict, "by": test})
            print(line, flush=True)
            if out:
                with out.open("a") as verdicts:
                    verdicts.write(line + "\n")
    print(*(f"{verdict} {n}" for verdict, n in sorted(caught.items())), sep=", ")


def _judged(tree: Path, row: dict[str, Any], seconds: int, number: int) -> tuple[str, str | None]:
    """Plant one fault; return the verdict and the test that caught it."""
    if not (file := moved(tree, row)):
        return "deleted", None
    healthy, verdict, test = file.read_text(), "missed", None
    file.write_text(planted(healthy, row))
    os.utime(file, (0, number + 1))  # or Python might use the previous bytecode
    for stage, tests in tests_of(tree, file.relative_to(tree)):
        runs = tests and not test and not (seconds and stage == "folder")
        if runs and (test := failing(tree, tests, seconds)):
            verdict = stage
    file.write_text(healthy)
    return (
        ("fails without it", test) if test and failing(tree, [test], seconds) else (verdict, test)
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("what", choices=("draw", "run"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.what == "run":
        lines = [line for path in given.paths for line in path.read_text().splitlines()]
        return run([json.loads(line) for line in lines], given.seconds, given.out)
    dice, paths = random.Random(given.seed), [p.resolve() for p in given.paths]
    files = sorted({f for p in paths for f in ([p] if p.is_file() else p.rglob("*.py"))})
    dice.shuffle(files)
    drawn = (row for _ in range(given.count) for f in files if (row := draw(f, dice)))
    print(*map(json.dumps, itertools.islice(drawn, given.count)), sep="\n")


if __name__ == "__main__":
    main()
