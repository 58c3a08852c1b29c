"""The rooms of the package, their order, and who imports whom."""

import ast
import functools
from pathlib import Path

from tests.support.paths import ROOT

PACKAGE = ROOT / "jaxrobust"

# Who stands further down may be imported; those of one line do not know each other.
ROOMS = (
    {"runtime"},
    {"types"},
    {"data"},
    {"attacks", "models"},
    {"config", "tasks"},
    {"weights"},
    {"evaluation"},
    {"training"},
    {"publish", "doctor"},
    {"report"},
    {"results"},
    {"commands"},
    {"zoo", "pytorch", "papers"},  # optional: nothing imports them
    {"doors"},  # `convert` and `interop`: names of `publish` and `pytorch` that stay
    {"__main__"},  # and the entry points `main` and `evaluate`
)
FLOOR = {name: number for number, names in enumerate(ROOMS) for name in names}


def modules() -> dict[str, Path]:
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
        for p in sorted(PACKAGE.rglob("*.py"))
        if p != PACKAGE / "__init__.py"
    }


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported dotted name, is at module level)."""
    found: list[tuple[str, bool]] = []
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), True)]
    while todo:
        node, outside = todo.pop()
        if isinstance(node, ast.Import):
            found += [(alias.name, outside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", outside) for alias in node.names]
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue  # an entry point runs what it is for
        typed = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or typed
        outside = outside and not inside
        inner = ast.iter_child_nodes(node)  # no expression imports anything
        todo += [(child, outside) for child in inner if not isinstance(child, ast.expr)]
    return found


def room(module: str) -> str:
    """The room of a module; entry points, which only call `__main__.run`, stand above all."""
    is_entry = module.endswith("__main__") or module in ("main", "evaluate")
    top = "__main__" if is_entry else module.split(".")[0]
    return "doors" if top in ("convert", "interop") else top


@functools.cache
def arrows() -> list[tuple[str, str]]:
    """(module, module that it imports), of the package; a name of a module counts as the module."""
    known, found = modules(), set()
    for module, path in known.items():
        for name, _ in imports(path):
            name = name.removeprefix("jaxrobust.") if name.startswith("jaxrobust.") else ""
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name != module:
                found.add((module, name))
    return sorted(found)
