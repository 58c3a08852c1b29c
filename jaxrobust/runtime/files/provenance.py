"""Which code computes: the commit of this package, and versions that results depend on."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import jaxrobust

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")
_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")
_PATIENCE_S = 30
_FILE = Path(__file__)
_PACKAGE = next(folder for folder in _FILE.parents if folder.name == jaxrobust.__name__)


def commit() -> str:
    """Describe this code as exactly as possible.

    Returns the commit of the checkout that tracks this very file, with `+changes` if files differ;
    a repository around an installation does not count. Otherwise returns the commit or archive hash
    that the installer recorded (PEP 610), else the version and a hash of the sources.
    """
    here = _FILE.parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here), *arguments]
        # A git hook's variables point to the repository that it runs in.
        environment = {k: v for k, v in os.environ.items() if k not in _OF_A_HOOK}
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=_PATIENCE_S,
            env=environment,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", _FILE.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no repository, another owner, a hang
        version = versions()["jaxrobust"]
        return _installed() or f"{jaxrobust.__name__} {version}, sources sha256 {_sources_sha256()}"


def _installed() -> str | None:
    """Read the installer's record of this very package's origin; None: it is not exact."""
    try:
        distribution = importlib.metadata.distribution(jaxrobust.__name__)
        noted = json.loads(distribution.read_text("direct_url.json") or "{}")
        installed = distribution.locate_file(_FILE.relative_to(_PACKAGE.parent))
        if not Path(str(installed)).samefile(_FILE):
            return None  # a checkout on PYTHONPATH, next to an installation
        if "vcs_info" in noted:
            return str(noted["vcs_info"]["commit_id"])
        return f"archive sha256 {noted['archive_info']['hashes']['sha256']}"
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return None


def _sources_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of packages that a result may depend on.

    This package reports its own version: the installer's record of a checkout may be outdated.
    """
    installed = {"jaxrobust": jaxrobust.__version__}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # only its folder is on PYTHONPATH
            installed[name] = "not installed"
    return installed | {"python": platform.python_version()}
