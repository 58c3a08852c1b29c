"""Updates the files that are generated from configs; review the difference.

`tests/golden_configs/` has the keys in which each config differs from `base()`, which is
`base.json`; docstrings have the keys that `jaxrobust why` prints.
"""

import importlib
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxrobust.config import base
from jaxrobust.results import key_sources
from jaxrobust.runtime.commandline.arguments import config_name, load_config

COLUMNS = 100
# Line in a docstring that requests a config's keys; the indented lines below it are rewritten.
ASKED = re.compile(r"^Keys that are not defaults, by `jaxrobust why (\S+)`:\n", re.MULTILINE)
_BLOCK = re.compile(rf"({ASKED.pattern})(?:\n(?: {{4}}.*\n)+)?", re.MULTILINE)


def paths() -> list[Path]:
    return sorted((ROOT / "configs").glob("[a-z]*.py"))


def names() -> list[str]:
    """Return the configs; for a family, `NAME:ARGUMENTS` for each of its `ROWS`."""
    configs = []
    for path in paths():
        rows = getattr(importlib.import_module(f"configs.{path.stem}"), "ROWS", None)
        configs += [path.stem] if rows is None else [f"{path.stem}:{row}" for row in rows]
    return configs


def load(name: str) -> Any:
    file, _, arguments = name.partition(":")
    return importlib.import_module(f"configs.{file}").get_config(*[arguments] * bool(arguments))


def resolved(name: str) -> str:
    """Write the keys of a config that differ from `base()`, or all keys of `base`."""
    default = {} if name == "base" else _flat(base())
    keys = _flat(base() if name == "base" else load(name))
    changed = {k: v for k, v in keys.items() if k not in default or v != default[k]}
    if gone := default.keys() - keys.keys():
        changed["without"] = sorted(gone)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in changed.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _flat(config: Any) -> dict[str, Any]:
    """Map "section.key" to its value; options of a network are one value."""
    sections = json.loads(config.to_json())
    flat = {
        f"{s}.{k}": v for s, keys in sections.items() if type(keys) is dict for k, v in keys.items()
    }
    return flat | {s: value for s, value in sections.items() if type(value) is not dict}


def golden(name: str) -> Path:
    return (
        ROOT / "tests" / "golden_configs" / f"{name if name == 'base' else config_name(name)}.json"
    )


def explained(source: str) -> str:
    """Return the source of a config with the requested keys in its docstring."""

    def block(asked: re.Match[str]) -> str:
        keys = key_sources.of_config(load_config(asked[2]), key_sources.of_recipe(asked[2]))
        indent = " " * 4
        lines = key_sources.text(key_sources.chosen(keys, None, False), COLUMNS - len(indent))
        return f"{asked[1]}\n{textwrap.indent(lines, indent)}\n"

    return _BLOCK.sub(block, source)


if __name__ == "__main__":
    for name in ("base", *names()):
        golden(name).parent.mkdir(exist_ok=True)
        golden(name).write_text(resolved(name))
    for path in paths():
        path.write_text(explained(path.read_text()))
