"""The fast tests on the oldest and the newest versions of Python, JAX and everything else.

python tools/check_versions.py [oldest|newest] [arguments of pytest]
python tools/check_versions.py interpreters

Each gets a fresh environment, .venv-oldest and .venv-newest. The oldest has the lowest versions in
pyproject.toml, the newest the highest Python on this machine for which everything installs. Without
another Python than the oldest, or without newer packages, the newest environment is the one that
`.ci/run` tests anyway; the command says so and runs no test. Exits with 1 if a test failed, with 3
if an environment cannot be built. `interpreters` lists the Pythons that could be tested, the
highest first, one path per line.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = (3, 11), (3, 20)  # minor versions to look for
_SAID = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_VERSIONS = f"""
import importlib.metadata, platform
said = (f"{{name}} {{importlib.metadata.version(name)}}" for name in {_SAID})
print("Python", platform.python_version() + ",", ", ".join(said))
"""


def interpreters() -> list[tuple[tuple[int, int], str]]:
    """Return (version, path) of the Pythons of PATH and of pyenv, the highest first."""
    paths: dict[tuple[int, int], str] = {}
    for path in (sys.executable, *_candidates()):
        command = [path, "-c", "import sys, ensurepip, venv; print(*sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and re.fullmatch(r"\d+ \d+\n", done.stdout):
            major, minor = map(int, done.stdout.split())
            paths.setdefault((major, minor), path)
    return sorted(((v, p) for v, p in paths.items() if v >= OLDEST), reverse=True)


def _candidates() -> Iterator[str]:
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        if path := shutil.which(f"python3.{minor}"):
            yield path
    root = os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv"
    yield from sorted(glob.glob(f"{root}/versions/3.*/bin/python3"), reverse=True)


def environment(python: str, folder: Path, *commands: tuple[str, ...]) -> str | None:
    """Return the Python of a fresh environment in which these modules ran; None: impossible."""
    shutil.rmtree(folder, ignore_errors=True)
    inside = str(folder / "bin" / "python")
    venv = [python, "-m", "venv", str(folder)]
    for command in (venv, *([inside, "-m", *words] for words in commands)):
        if subprocess.run(command, cwd=ROOT).returncode:
            return None
    return inside


def oldest() -> str | None:
    """Build the environment with the lowest versions, which uv can resolve but pip cannot."""
    folder = ROOT / ".venv-oldest"
    install = ("uv", "pip", "install", "-q", "--python", str(folder))
    floors = (*install, "--resolution", "lowest-direct", "-e", ".[test]")
    return environment(interpreters()[-1][1], folder, ("pip", "install", "-q", "uv"), floors)


def newest() -> str | None:
    """Build the environment with the highest Python for which everything installs."""
    latest = ("pip", "install", "-q", "--upgrade", "-e", ".[test]")
    for version, python in interpreters():
        inside = environment(python, ROOT / ".venv-newest", latest)
        if inside:
            return inside
        print(f"newest: no environment for Python {'.'.join(map(str, version))}", flush=True)
    return None


def versions(python: str) -> str:
    return subprocess.check_output([python, "-c", _VERSIONS], text=True).strip()


def main(arguments: list[str]) -> int:
    if arguments == ["interpreters"]:
        print(*(path for _, path in interpreters()), sep="\n")
        return 0
    builders = {"oldest": oldest, "newest": newest}
    chosen = [name for name in builders if name in arguments] or list(builders)
    rest = [word for word in arguments if word not in builders]
    worst = 0
    for name in chosen:
        python = builders[name]()
        if python is None:
            print(f"{name}: the lines above say why there is no environment", file=sys.stderr)
            return 3
        own = versions(python)
        print(f"{name}: {own}", flush=True)
        if name == "newest" and own == versions(sys.executable):
            print("newest: this machine has nothing newer than what runs here", flush=True)
            continue
        path = os.pathsep.join((str(Path(python).parent), os.environ.get("PATH", "")))
        done = subprocess.run(
            [python, "-m", "pytest", *rest], cwd=ROOT, env=os.environ | {"PATH": path}
        )
        worst = max(worst, int(done.returncode != 0))
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
