"""Builds the documentation, offline and without warnings: `python tools/docs/build.py`.

python tools/docs/build.py [--out build/docs/html] [--fresh] [--nocells]
                            [--keep]

Runs the cells of pages, and caches their output until the package changes; --fresh runs all of them
again, --nocells none. If CIFAR-10 is missing, cells that need it print stored output; --keep stores
it again. Then checks every internal link of the site. Needs the extras `docs` and `torch`. Exit
codes: 0 done, 1 Sphinx warns or a cell fails, 2 a mistake or a broken link.
"""

import argparse
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxrobust.runtime.files import provenance
from tools.docs import links, outputs

NEEDED = {
    "sphinx": "docs",
    "myst_nb": "docs",
    "furo": "docs",
    "ipykernel": "docs",
    "torch": "torch",
}


def main(arguments: list[str] | None = None) -> int:
    """Build the site and check its links."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs" / "html")
    parser.add_argument("--fresh", action="store_true", help="Run all cells, and write all pages.")
    parser.add_argument("--nocells", action="store_true", help="Run no cell.")
    parser.add_argument("--keep", action="store_true", help="Store output of cells on CIFAR-10.")
    given = parser.parse_args(arguments)
    if given.keep and not outputs.is_here():
        print("build: --keep needs CIFAR-10; `jaxrobust prepare cifar10`", file=sys.stderr)
        return 2
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        extras = ",".join(sorted({NEEDED[name] for name in missing}))
        print(f"build: {missing[0]} is missing; pip install -e '.[{extras}]'", file=sys.stderr)
        return 2
    out = given.out.resolve()
    if given.fresh:
        for name in ("cells", "run", "doctrees", out.name):
            shutil.rmtree(out.parent / name, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(out.parent / "doctrees"), str(ROOT / "docs"), str(out)]
    cells = {"JAXROBUST_DOCS_CELLS": "off"} if given.nocells else {}
    cells |= {"JAXROBUST_DOCS_KEEP": provenance.commit()} if given.keep else {}
    if subprocess.run(command, env=os.environ | cells).returncode:
        # The next build reads all pages again: Sphinx considers a page with a failed cell as built.
        shutil.rmtree(out.parent / "doctrees", ignore_errors=True)
        return 1
    if broken := links.broken(out):
        print("\n".join(f"build: {line}" for line in broken), file=sys.stderr)
        return 2
    print(f"{out / 'index.html'}: {len([*out.rglob('*.html')])} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
