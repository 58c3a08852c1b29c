"""Writes the sources of `jaxrobust-attacks`: attacks, tasks and the evaluator, on JAX alone.

These are the files that the entry modules import, with the package renamed, so that both packages
can be installed side by side. Strings also count as imports: a module's full name, also as
"module:OBJECT", or its name below the file's package, such as "sparse.sparse_rs". Imports by
`rooms.optional` are left out. If only modules of a package are imported, the package keeps only its
docstring.
"""

import ast
import io
import json
import re
import shutil
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "jaxrobust", "jaxrobust_attacks"
ENTRIES = ("jaxrobust.attacks", "jaxrobust.tasks", "jaxrobust.evaluation.engine.autoattack")
DEPENDENCIES = ("jax", "numpy", "jaxtyping")
OF_JAX = ("jaxlib", "scipy")  # dependencies of JAX itself
OPTIONAL = ("rich", "tqdm")  # nicer progress; imported in functions or `try` only
MOST_LINES = 9_000  # of code
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
_BETWEEN = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)  # statements
_INIT = '''\
"""{description}"""

from jaxrobust_attacks import attacks, tasks
from jaxrobust_attacks.attacks import *  # noqa: F403
from jaxrobust_attacks.evaluation.engine.autoattack import autoattack
from jaxrobust_attacks.evaluation.engine.result import AutoAttackResult

__version__ = "{version}"
__all__ = ["AutoAttackResult", "attacks", "autoattack", "tasks"]
__all__ += attacks.__all__
'''
_README = """\
# jaxrobust-attacks

{description} Needs only JAX. Networks are functions, NNX or Equinox modules, or pairs
(Linen module, variables).

```python
import jax
import jaxrobust_attacks as attacks

attack = attacks.apgd(norm="linf", epsilon=8 / 255, steps=10)
images_adv = attack(network, jax.random.key(0), images, labels)
result = attacks.autoattack(
    network, images, labels, norm="linf", epsilon=8 / 255, ledger="evaluation.jsonl"
)
```

Images are floats [B, H, W, C] in [0, 1]. For tasks other than classification, pass a function as
`loss`, or see `attacks.tasks`. The same files are in [jaxrobust]({address}) {version}, which also
has networks, training, data sets and a command line. Both can be installed together.
`pip install rich` adds a live panel.
"""
_PYPROJECT = """\
[build-system]
requires = {requires}
build-backend = "setuptools.build_meta"

[project]
name = "jaxrobust-attacks"
version = "{version}"
description = "{description}"
readme = "README.md"
license = "{license}"
license-files = ["LICENSE"]
requires-python = "{python}"
dependencies = {dependencies}
urls = {{ Repository = "{address}" }}

[tool.setuptools.packages.find]
include = ["jaxrobust_attacks*"]

[tool.setuptools.package-data]
jaxrobust_attacks = ["py.typed"]

[tool.mypy]
strict = true
packages = ["jaxrobust_attacks"]
untyped_calls_exclude = ["jax", "ml_dtypes"]

[[tool.mypy.overrides]]
module = ["rich.*", "scipy.*", "tqdm.*"]
ignore_missing_imports = true
"""
_DESCRIPTION = "Adversarial attacks and AutoAttack for any JAX network and any task."


def closure() -> dict[str, Path]:
    """Find the modules of the wheel from the imports of its entry modules.

    Raises:
      ValueError: a module imports a package that the wheel does not depend on.
    """
    files: dict[str, Path] = {}
    todo = list(ENTRIES)
    while todo:
        name = todo.pop()
        if name in files or name == OLD or (path := _file(name)) is None:
            continue
        files[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        for imported, at_top in _imports(tree):
            top = imported.partition(".")[0]
            if top != OLD and not _is_allowed(top, at_top):
                raise ValueError(
                    f"{path.relative_to(ROOT)} imports {top}, on which jaxrobust-attacks does not "
                    "depend; move what needs it to a file that the wheel leaves out"
                )
            todo.append(imported if _file(imported) else imported.rpartition(".")[0])
        todo += [f"{prefix}{text}" for text in _strings(tree) for prefix in ("", f"{package}.")]
    return files


def _file(name: str) -> Path | None:
    if not name.startswith(OLD) or not re.fullmatch(r"\w+(\.\w+)*", name):
        return None
    path = ROOT / name.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _is_allowed(top: str, at_top: bool) -> bool:
    needed = (*DEPENDENCIES, *OF_JAX, *sys.stdlib_module_names)
    return top in needed or (top in OPTIONAL and not at_top)


def _imports(tree: ast.AST, at_top: bool = True) -> Iterator[tuple[str, bool]]:
    """Yield the dotted names of imports, and whether importing the file always runs them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", at_top) for alias in node.names)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.Try)
            yield from _imports(node, at_top and not inside)


def _strings(node: ast.AST) -> Iterator[str]:
    """Yield possible imports from strings with a dot."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "optional":
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
        yield node.value.partition(":")[0]
    for child in ast.iter_child_nodes(node):
        yield from _strings(child)


def renamed(source: str, rooms: frozenset[str]) -> str:
    """Rename the package in code and texts, except where a text means the large package.

    >>> renamed("from jaxrobust import attacks  # `jaxrobust train`", frozenset({"attacks"}))
    'from jaxrobust_attacks import attacks  # `jaxrobust train`'
    >>> renamed("jaxrobust.attacks.pgd:pgd, jaxrobust.zoo", frozenset({"attacks"}))
    'jaxrobust_attacks.attacks.pgd:pgd, jaxrobust.zoo'
    """
    modules = "|".join(sorted(rooms))
    return re.sub(
        rf"\bjaxrobust(?=\.(?:__|{{|(?:{modules})\b))"  # a module, an attribute, an f-string's name
        r"|(?<=from )jaxrobust(?= import)|(?<=import )jaxrobust\b(?![.-])"
        r'|(?<=optional\(")jaxrobust\b',  # left out here, whatever the large package has
        NEW,
        source,
    ).replace("install a newer jaxrobust", "install a newer jaxrobust-attacks")


def code_lines(source: str) -> int:
    """Count the lines with code, without blank lines, comments and docstrings."""
    lines: set[int] = set()
    begins = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _LAYOUT:
            continue
        if token.type not in _BETWEEN and not (begins and token.type == tokenize.STRING):
            lines.update(range(token.start[0], token.end[0] + 1))
        begins = token.type in _BETWEEN
    return len(lines)


def write(folder: Path, version: str) -> int:
    """Write the wheel's sources into a folder, and count their lines of code.

    Raises:
      ValueError: the wheel would be too large, or would need another package.
    """
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, requires = about["project"], about["build-system"]["requires"]
    texts = {path: path.read_text() for path in closure().values()}
    for package in {folder for path in texts for folder in path.relative_to(ROOT).parents[:-1]}:
        path = ROOT / package / "__init__.py"
        if path not in texts:  # only its modules are imported
            texts[path] = f'"""{ast.get_docstring(ast.parse(path.read_text()))}"""\n'
    rooms = frozenset(path.relative_to(ROOT).with_suffix("").parts[1] for path in texts)
    words = {"description": _DESCRIPTION, "version": version, "license": project["license"]}
    texts[ROOT / OLD / "__init__.py"] = _INIT.format(**words)
    for path, text in texts.items():
        target = folder / NEW / path.relative_to(ROOT / OLD)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(text, rooms))
    (folder / NEW / "py.typed").touch()
    shutil.copy(ROOT / "LICENSE", folder)
    needed = [d for d in project["dependencies"] if re.split(r"\W", d)[0] in DEPENDENCIES]
    words |= {"python": project["requires-python"], "address": project["urls"]["Repository"]}
    words |= {"dependencies": json.dumps(needed), "requires": json.dumps(requires)}
    (folder / "pyproject.toml").write_text(_PYPROJECT.format(**words))
    (folder / "README.md").write_text(_README.format(**words))
    lines = sum(map(code_lines, texts.values()))
    if lines > MOST_LINES:
        raise ValueError(
            f"jaxrobust-attacks has {lines:,} lines of code, more than {MOST_LINES:,}; let "
            "attacks, tasks and the evaluator import less"
        )
    return lines
