"""Fields of classes with their meaning, from the comments in the source."""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple


class CommentedField(NamedTuple):
    """A field of a class: its type and default as written, and its comments."""

    name: str
    kind: str
    default: str
    meaning: str


def fields(kind: type) -> list[CommentedField]:
    """List the annotated fields of a class, in order, with the comments above or after them."""
    source = inspect.getsource(kind)
    comments = _comments(source)
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    found = []
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            default = ast.unparse(line.value) if line.value else ""
            said = _meaning(comments, line.lineno, line.end_lineno or line.lineno)
            found.append(
                CommentedField(line.target.id, ast.unparse(line.annotation), default, said)
            )
    return found


def of_name(module: Any, name: str) -> str:
    """Return the comment above or after the assignment of a module's name."""
    source = inspect.getsource(module)
    for node in ast.parse(source).body:
        targets: Iterator[Any] = iter(())
        if isinstance(node, ast.Assign):
            targets = iter(node.targets)
        elif isinstance(node, ast.AnnAssign):
            targets = iter([node.target])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return _meaning(_comments(source), node.lineno, node.lineno)
    return ""


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Map line numbers to comments, and whether a comment is alone on its line."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# type:"):
            text = token.string.lstrip("# ").partition("  # ")[0]
            found[token.start[0]] = (text, not token.line[: token.start[1]].strip())
    return found


def _meaning(comments: dict[int, tuple[str, bool]], first: int, last: int) -> str:
    above: list[str] = []
    line = first - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    behind = [comments[n][0] for n in range(first, last + 1) if n in comments]
    return ". ".join(filter(None, (" ".join(above).rstrip("."), " ".join(behind)))).strip()
