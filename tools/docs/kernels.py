"""Kernels for the documentation's cells, in an empty folder with this checkout's package."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# IPython's own %%bash emits a command's output in pieces of 100 characters, and MyST-NB starts a
# new line after each.
_STARTUP = """\
import os

from tools.docs import outputs

os.chdir({folder!r})


def bash(line, cell):
    print(outputs.of_cell(cell), end="")


get_ipython().register_magic_function(bash, "cell")
"""
_COMMAND = """\
#!/bin/sh
exec {python} -m jaxrobust "$@"
"""


def digest(*more: str) -> str:
    """Hash the code that pages show and run, including more folders of the checkout."""
    places = [ROOT / name for name in ("jaxrobust", "configs", *more)]
    files = sorted(file for place in places for file in place.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def cache(work: Path) -> Path:
    """Name the folder that caches the output of cells for the current package."""
    return work / "cells" / digest()


def prepare(work: Path) -> None:
    """Make kernels start in `work/run`, with the command `jaxrobust` and a quiet terminal.

    Pages share their runs there: the same command resumes, or prints its result again. So each page
    also works alone, and all pages together train once.
    """
    run, bin_, profile = (
        work / "run",
        work / "bin",
        work / "ipython" / "profile_default" / "startup",
    )
    for folder in (bin_, profile):
        folder.mkdir(parents=True, exist_ok=True)
    if not cache(work).exists():
        shutil.rmtree(run, ignore_errors=True)  # from another state of the package
    run.mkdir(exist_ok=True)
    (profile / "00.py").write_text(_STARTUP.format(folder=str(run)))
    command = bin_ / "jaxrobust"
    command.write_text(_COMMAND.format(python=sys.executable))
    command.chmod(0o755)
    os.environ |= {
        "IPYTHONDIR": str(work / "ipython"),
        "PATH": f"{bin_}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "90",
    }
