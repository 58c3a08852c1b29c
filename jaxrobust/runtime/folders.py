"""Where things are kept from one run to the next."""

import os
from pathlib import Path


def cache(name: str) -> Path:
    """Return `jaxrobust/NAME` in $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(root or Path.home() / ".cache") / "jaxrobust" / name
