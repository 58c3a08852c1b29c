"""Where files are cached from one run to the next."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """Return the folder `jaxrobust/NAME` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrobust" / name
