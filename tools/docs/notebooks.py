"""Makes notebooks for Colab and Kaggle from pages of the documentation.

`python tools/docs/notebooks.py` writes `examples/notebooks/`, which a test compares with the pages.
Notebooks have no outputs: open one and run it on any runtime.
"""

import hashlib
import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "notebooks"
PAGES = {"tutorial.ipynb": "tutorial.md", "train_my_data.ipynb": "howto/train.md"}
_CELL = re.compile(
    r"^```\{code-cell\} ipython3\n((?::.*\n)*)\n?(.*?)^```$", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]])*)\]\(([^)\s]+\.md(?:#[^)\s]*)?)\)")
_BEGIN = """\
# For Colab and Kaggle: choose a GPU, or on Kaggle a TPU v5e-8, in the notebook's settings.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxrobust") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "jaxrobust[plot]"], check=True)

# The commands below use the accelerator; the notebook itself reads their results on the CPU.
import jax

jax.config.update("jax_platforms", "cpu")
"""


def main() -> None:
    """Write the notebooks again."""
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        (FOLDER / name).write_text(notebook(name))


def notebook(name: str) -> str:
    """Return a notebook as JSON: a page's texts and cells, after one that prepares the runtime."""
    page = PAGES[name]
    text = (ROOT / "docs" / page).read_text().partition("\n---\n")[2]
    cells, last = [], 0
    for match in _CELL.finditer(text):
        cells += [_cell("markdown", _prose(text[last : match.start()], page))]
        cells += [_cell("code", match[2])]
        last = match.end()
    cells += [_cell("markdown", _prose(text[last:], page))]
    title, _, rest = cells[0]["source"].partition("\n")
    begin = [_cell("markdown", title), _cell("code", _BEGIN), _cell("markdown", rest)]
    kept = [cell for cell in (*begin, *cells[1:]) if cell["source"]]
    for number, cell in enumerate(kept):
        known = hashlib.sha256(f"{number} {cell['source']}".encode())
        cell["id"] = known.hexdigest()[:8]
        cell["source"] = cell["source"].splitlines(keepends=True)
    about = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    made = {"cells": kept, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, source: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": source.strip()}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def _prose(text: str, page: str) -> str:
    """Replace links to other pages by their names, because notebooks are without these pages."""

    def name(match: re.Match[str]) -> str:
        where = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2]))
        return f"{match[1]} (`docs/{where}`)"

    return _LINK.sub(name, text)


if __name__ == "__main__":
    main()
