"""The pages of the reference, generated from the code: names, keys, fields, checks, errors."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints, is_typeddict

from jaxrobust import config
from jaxrobust.__main__ import COMMANDS, module_of
from jaxrobust.doctor import config_checks, network_checks
from jaxrobust.evaluation.records import record
from tools.docs import comments, public
from tools.docs.docstrings import cell, escaped, myst

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jaxrobust"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Format a table with cells in MyST."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)


def code(text: str) -> str:
    """Format a text as code for a cell; "" stays empty."""
    return f"`{text}`".replace("|", r"\|") if text else ""


def api() -> str:
    """Document every public name: its signature, its docstring, its fields."""
    found = []
    for title, names in public.sections().items():
        module = title if title.startswith("jaxrobust") else ""
        intro = myst(inspect.getdoc(_module(module)) or "") if module else ""
        found += [f"## {title}", intro, *map(documented, names)]
    return "\n\n".join(filter(None, found))


def _module(name: str) -> ModuleType:
    return __import__(name, fromlist=["x"])


def documented(name: str) -> str:
    """Document a public name by a directive for a function, a class or a constant."""
    value, full = public.value(name), f"jaxrobust.{name}"
    if inspect.isclass(value):
        kind, head, body = "class", f"{full}{signature(value)}", _class(value)
    elif callable(value):
        kind, head, body = (
            "function",
            f"{full}{signature(value)}",
            myst(inspect.getdoc(value) or ""),
        )
    else:
        kind, head, body = "data", full, _constant(name, value)
    return f"::::{{py:{kind}}} {head}\n{body}\n::::"


def signature(value: Any) -> str:
    """Write parameters and defaults without types, which the docstring has."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return "()"
    words, keywords = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keywords:
            words.append("*")
        keywords = keywords or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        star = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        words.append(star + p.name + ("" if p.default is p.empty else f"={_default(p.default)}"))
    return f"({', '.join(words)})"


def _default(value: Any) -> str:
    plain = isinstance(value, str | int | float | bool | None) or type(value) is tuple
    return repr(value) if plain else "..."


def _class(value: type) -> str:
    said = myst(inspect.getdoc(value) or "")
    if not (hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__")):
        return said
    rows = [(code(f.name), code(f.kind), cell(f.meaning)) for f in comments.fields(value)]
    methods = [
        f":::{{py:method}} {name}{signature(member)}\n{myst(inspect.getdoc(member) or '')}\n:::"
        for name, member in vars(value).items()
        if inspect.isfunction(member) and not name.startswith("_") and member.__doc__
    ]
    return "\n\n".join([said, table(("field", "type", "meaning"), rows), *methods])


def _constant(name: str, value: Any) -> str:
    module, own = PACKAGE / Path(*name.split(".")[:-1]) / "__init__.py", name.rpartition(".")[2]
    said = ""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and own in [alias.name for alias in node.names]:
            said = comments.of_name(_module(str(node.module)), own)
    keys = ", ".join(code(str(key)) for key in value) if isinstance(value, Mapping) else ""
    return f"{escaped(said[:1].upper() + said[1:])}.\n\nKeys: {keys}."


def keys() -> str:
    """List every key of a config with its default and its meaning, by section."""
    found = []
    for section, kind in _sections():
        rows = [
            (code(f.name), code(f.default), cell(f.meaning))
            for f in comments.fields(kind)
            if not f.kind.endswith("Section")
        ]
        said = escaped(inspect.cleandoc(vars(kind)["__doc__"] or ""))
        title = f"## {section}" if section else "## The config itself"
        found += [title, said, table(("key", "default", "meaning"), rows)]
    return "\n\n".join(filter(None, found))


def _sections() -> Iterator[tuple[str, type]]:
    yield "", config.Config
    for name, kind in get_type_hints(config.Config).items():
        if config.Section in getattr(kind, "__mro__", ()):
            yield f"`{name}`", kind
    yield "`pretrain`, `train` and other phases", config.PhaseSection


def fields() -> str:
    """List every field of a record, and the keys of those that are dictionaries."""
    found = [
        "## A record",
        escaped(inspect.cleandoc(record.AccuracyRecord.__doc__ or "").partition("\n\nAttr")[0]),
        table(
            ("field", "type", "is written", "meaning"),
            [
                (code(f.name), code(f.kind), _written(f.default), cell(f.meaning))
                for f in comments.fields(record.AccuracyRecord)
                if "_NEVER" not in f.default
            ],
        ),
    ]
    for name, kind in vars(record).items():
        if is_typeddict(kind):
            rows = [(code(f.name), code(f.kind), cell(f.meaning)) for f in comments.fields(kind)]
            said = myst(inspect.getdoc(kind) or "")
            found += [f"## {name}", said, table(("key", "type", "meaning"), rows)]
    return "\n\n".join(found)


def _written(default: str) -> str:
    words = {"always": "always", "of_evaluation": "of evaluations"}
    return words.get(default.partition("(")[0], "where it is known")


def checks() -> str:
    """List the checks of `jaxrobust doctor`: measurement, cause and remedy."""
    found = []
    for title, rows in (
        ("Of a network", network_checks.NETWORK_CHECKS),
        ("Of a config", config_checks.CONFIG_CHECKS),
    ):
        found.append(f"## {title}")
        for row in rows:
            said = [f"### {row.name}", escaped(row.measures)]
            said += [f"- Usual cause: {escaped(row.cause)}", f"- Remedy: {escaped(row.remedy)}"]
            found.append("\n".join([*said[:1], "", said[1], "", *said[2:], *_more(row)]))
    return "\n\n".join(found)


def _more(row: Any) -> list[str]:
    after = ", ".join(map(code, row.follows))
    lines = [f"- Paper: {escaped(row.paper)}"] if row.paper else []
    return lines + ([f"- Yellow, not red, where it may follow from {after}"] if after else [])


def refusals() -> str:
    """List the package's error messages with their remedies."""
    folders = sorted(path for path in PACKAGE.iterdir() if path.is_dir())
    return "\n\n".join(filter(None, map(refusals_of, folders)))


def refusals_of(folder: Path) -> str:
    """List the error messages of one folder of the package; "" if there are none."""
    rows = {
        (cell(_begun(wrong)), cell(_begun(remedy)))
        for file in sorted(folder.rglob("*.py"))
        for wrong, remedy in messages(file.read_text())
    }
    listed = table(("what it says", "what to do"), sorted(rows))
    return f"## `jaxrobust.{folder.name}`\n\n{listed}" if rows else ""


def _begun(sentence: str) -> str:
    """Capitalize a sentence, unless it begins with a word to be typed."""
    typed = re.match(r"jaxrobust |pip |[\w.]+[=(_/]", sentence)
    return sentence if typed else sentence[:1].upper() + sentence[1:]


def messages(source: str) -> Iterator[tuple[str, str]]:
    """Yield the error messages of a source, split into problem and remedy.

    Values that are filled in at run time are written as `…`. Messages without a remedy are left
    out: only developers can fix their causes, or the remedy is computed.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = _text(node.exc.args[0])
            wrong, semicolon, remedy = text.partition("; ")
            if semicolon and len(wrong) > 8 and re.search(r"[a-z]{3}", remedy):
                yield wrong, remedy


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join("…" if isinstance(v, ast.FormattedValue) else _text(v) for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def commands() -> str:
    """List the commands with their purpose, from the first lines of their help."""
    found = []
    for name, row in COMMANDS.items():
        file = ROOT / Path(*module_of(name).split("."))
        said = ast.get_docstring(ast.parse(file.with_suffix(".py").read_text())) or ""
        body = said.partition("\n\n")[2]
        usage = f"jaxrobust {name} {row.usage}".strip()
        found.append(f"## {name}\n\nIt {escaped(row.does)}.\n\n```\n{usage}\n```\n\n{myst(body)}")
    return "\n\n".join(found)


PAGES: dict[str, Callable[[], str]] = {
    "api": api,
    "config": keys,
    "records": fields,
    "doctor": checks,
    "errors": refusals,
    "commands": commands,
}
