"""Makes everything that a release uploads, step by step, and uploads nothing.

python tools/release/make.py [STEP ...] [--out dist] [--publish] [--tag v0.2.0]
python tools/release/make.py address https://HOST/OWNER/jaxrobust

Steps, in order (default: all): `check` compares versions, changelog and citation;
`packages` builds sdist and wheel of the tracked files, the wheel from the sdist; `attacks` builds
the wheel jaxrobust-attacks, which needs only JAX; `inspect` checks the files; `try` runs the
wheel in a new environment; `sbom` writes the bill of materials of an environment with everything
that the wheel needs; `conda` writes the recipe for the sdist; `docs` builds the pages. `address`
writes the repository's address into pyproject.toml, once. `--publish` refuses a release without an
address, with uncommitted changes, or with a wrong tag. Needs the extras `release` and `docs`.
Exit codes: 0 done, 1 a step failed, 2 a mistake.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.release import attacks_wheel

NOWHERE = "https://repository.invalid/jaxrobust"  # until the repository exists
LARGEST_WHEEL = 6_000_000  # bytes
_ADDRESS = re.compile(r"https://[\w.-]+(/[\w.-]+)+/?")


class Release(NamedTuple):
    """The options of a release, and the folder of its files."""

    out: Path
    publish: bool = False
    tag: str | None = None

    def only(self, pattern: str) -> Path:
        found = sorted(self.out.glob(pattern))
        if len(found) != 1:
            raise ValueError(
                f"{self.out} has {len(found)} files {pattern}; run packages with a new --out"
            )
        return found[0]


def version() -> str:
    """Read the version, without importing the package."""
    text = (ROOT / "jaxrobust" / "__init__.py").read_text()
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def changes(number: str) -> str:
    """Return a version's section of CHANGELOG.md, without its title; "" if it has none."""
    text = (ROOT / "CHANGELOG.md").read_text()
    _, _, section = text.partition(f"\n## {number}\n")
    return section.partition("\n## ")[0].strip() if section else ""


def check(release: Release) -> None:
    """Compare all mentions of the version, and with `publish` refuse unfinished releases."""
    number = version()
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", number):
        raise ValueError(f"version {number} is not a semantic version; write 0.2.0 or 0.2.0rc1")
    if not changes(number):
        raise ValueError(f"CHANGELOG.md has no section {number}; write '## {number}' and its lines")
    cited = (ROOT / "CITATION.cff").read_text()
    for name, text, wanted in (
        ("CITATION.cff", cited, f"\nversion: {number}\n"),
        ("README.md", (ROOT / "README.md").read_text(), f"version = {{{number}}}"),
    ):
        if wanted not in text:
            raise ValueError(f"{name} does not say {wanted.strip()!r}; write it there")
    if release.tag is not None and release.tag != f"v{number}":
        raise ValueError(f"the tag {release.tag} is not v{number}; tag the commit v{number}")
    if not release.publish:
        return
    if NOWHERE in (ROOT / "pyproject.toml").read_text():
        raise ValueError(
            "pyproject.toml names no repository yet; `python tools/release/make.py address "
            "https://HOST/OWNER/jaxrobust` writes its address"
        )
    if "Not uploaded yet" in changes(number):
        raise ValueError(f"CHANGELOG.md says that {number} is not uploaded; remove that line")
    if _git("status", "--porcelain", "--untracked-files=no"):
        raise ValueError(
            "some tracked files have changes; commit them, since a release is a commit"
        )


def address(written: str) -> None:
    """Write the repository's address into pyproject.toml, the one place that has it."""
    if not _ADDRESS.fullmatch(written):
        raise ValueError(f"{written} is not an address; write https://HOST/OWNER/jaxrobust")
    file = ROOT / "pyproject.toml"
    text = file.read_text()
    if NOWHERE not in text:
        there = project()["urls"]["Repository"]
        raise ValueError(f"pyproject.toml has the address {there} already; change it there")
    file.write_text(text.replace(NOWHERE, written.removesuffix("/")))


def packages(release: Release) -> None:
    """Build the sdist from the tracked files, and the wheel from the sdist."""
    with tempfile.TemporaryDirectory() as folder:
        for name in _git("ls-files").splitlines():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        _run(sys.executable, "-m", "build", "--outdir", str(release.out), folder)


def attacks(release: Release) -> None:
    """Build the wheel of attacks, tasks and the evaluator, which needs only JAX."""
    with tempfile.TemporaryDirectory() as folder:
        lines = attacks_wheel.write(Path(folder), version())
        words = ("--quiet", "--no-deps", "--wheel-dir", str(release.out))
        _run(sys.executable, "-m", "pip", "wheel", *words, folder)
    print(f"{release.only('jaxrobust_attacks-*.whl').name}: {lines:,} lines of code")


def inspect(release: Release) -> None:
    """Check the files: metadata, size, and that nothing is missing or superfluous."""
    wheel, sdist = release.only("jaxrobust-*.whl"), release.only("*.tar.gz")
    files = [str(path) for path in (sdist, *release.out.glob("*.whl"))]
    _run(sys.executable, "-m", "twine", "check", "--strict", *files)
    if (size := wheel.stat().st_size) > LARGEST_WHEEL:
        raise ValueError(
            f"{wheel.name} has {size:,} bytes, more than {LARGEST_WHEEL:,}; leave data out"
        )
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    known = [name for name in _git("ls-files", "jaxrobust").splitlines() if _is_shipped(name)]
    for where, there in ((wheel.name, {*names}), (sdist.name, inside)):
        if missing := [name for name in known if name not in there]:
            raise ValueError(
                f"{where} lacks {missing[0]}; name it in [tool.setuptools.package-data]"
            )
    if foreign := [n for n in names if not n.startswith("jaxrobust") or "__pycache__" in n]:
        raise ValueError(f"{wheel.name} has {foreign[0]}, which is not the package's; leave it out")
    print(f"{wheel.name}: {size:,} bytes, {len(names)} files")


def _is_shipped(name: str) -> bool:
    return not name.endswith(".md") or "digits" in name


def try_out(release: Release) -> None:
    """Run the wheel in a new environment on top of the installed packages."""
    with tempfile.TemporaryDirectory() as folder:
        python = _environment(
            Path(folder), release.only("jaxrobust-*.whl"), "--no-deps", "--no-index"
        )
        (site,) = Path(folder).glob("lib/python*/site-packages")
        below = [path for path in sys.path if path.endswith("-packages")]
        (site / "below.pth").write_text("\n".join(below) + "\n")
        said = _said(python, "-m", "jaxrobust", "--version", cwd=folder)
        if said.strip() != f"jaxrobust {version()}":
            raise ValueError(f"the wheel says {said.strip()!r}; build it again")
        _run(python, "-m", "jaxrobust", "models", "convnext_n", cwd=folder)


def sbom(release: Release) -> None:
    """Write the bill of materials (CycloneDX JSON) of an environment with only the wheel."""
    out = release.out / f"jaxrobust-{version()}.cdx.json"
    with tempfile.TemporaryDirectory() as folder:
        python = _environment(Path(folder), release.only("jaxrobust-*.whl"))
        words = ("--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible")
        command = (sys.executable, "-m", "cyclonedx_py", "environment", *words)
        _run(*command, "--output-format", "JSON", "--output-file", str(out), python)
    bill = json.loads(out.read_text())
    bill["metadata"]["component"]["version"] = version()  # pyproject.toml does not have it
    out.write_text(json.dumps(bill, indent=1) + "\n")
    there = {_plain(one["name"]) for one in bill["components"]}
    needed = {_plain(re.split(r"[^\w.-]", line)[0]) for line in project()["dependencies"]}
    if missing := needed - there:
        raise ValueError(
            f"{out.name} lacks {sorted(missing)[0]}; install the wheel with all it needs"
        )
    print(f"{out.name}: {len(there)} components")


def conda(release: Release) -> None:
    """Write the recipe, in the format that rattler-build and conda-forge read, next to the
    sdist.
    """
    out = release.out / "recipe" / "recipe.yaml"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(recipe(version(), release.only("*.tar.gz")))
    print(f"{out}: {len(project()['dependencies'])} requirements")


def recipe(number: str, sdist: Path) -> str:
    """Return the recipe of an sdist: the metadata of pyproject.toml in conda's format."""
    about = project()
    needed = [re.sub(r"\[.*?\]", "", line) for line in about["dependencies"]]
    needed = [re.sub(r"(?<![<>=!~])(?=[<>=!~])", " ", line, count=1) for line in needed]
    python = about["requires-python"]
    run = "\n".join(f"    - {line.replace('_', '-').lower()}" for line in needed)
    return f"""\
# Written by `python tools/release/make.py conda` from pyproject.toml. On conda-forge the path
# becomes the address of the sdist. Names of packages there were not looked up.
schema_version: 1
package:
  name: jaxrobust
  version: "{number}"
source:
  path: ../{sdist.name}
  sha256: {hashlib.sha256(sdist.read_bytes()).hexdigest()}
build:
  number: 0
  noarch: python
  script: python -m pip install . --no-deps --no-build-isolation -vv
  python:
    entry_points:
      - jaxrobust = {about["scripts"]["jaxrobust"]}
requirements:
  host:
    - python {python}
    - pip
    - setuptools >=77
  run:
    - python {python}
{run}
tests:
  - python:
      imports: [jaxrobust]
  - script:
      - jaxrobust --version
about:
  homepage: {about["urls"]["Repository"]}
  license: {about["license"]}
  license_file: LICENSE
  summary: "{about["description"].rstrip(".")}"
"""


def docs(release: Release) -> None:
    """Build the pages without warnings, executing every cell."""
    words = (str(ROOT / "tools" / "docs" / "build.py"), "--out", str(release.out / "html"))
    _run(sys.executable, *words)


STEPS: dict[str, Callable[[Release], None]] = {
    "check": check,
    "packages": packages,
    "attacks": attacks,
    "inspect": inspect,
    "try": try_out,
    "sbom": sbom,
    "conda": conda,
    "docs": docs,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; stop at the first that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "dist", help="A folder.")
    parser.add_argument("--publish", action="store_true", help="Refuse an unready release.")
    parser.add_argument("--tag", help="The tag of the commit.")
    given = parser.parse_args(arguments)
    try:
        if given.steps[:1] == ["address"]:
            if len(given.steps) != 2:
                raise ValueError("address takes one address, https://HOST/OWNER/jaxrobust")
            address(given.steps[1])
            return 0
        if unknown := [name for name in given.steps if name not in STEPS]:
            raise ValueError(f"{unknown[0]} is not a step; use {', '.join(STEPS)} or address")
        release = Release(given.out.resolve(), given.publish, given.tag)
        release.out.mkdir(parents=True, exist_ok=True)
        for name in given.steps or STEPS:
            STEPS[name](release)
            print(f"ok   {name}", flush=True)
    except ValueError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"release: {' '.join(map(str, error.cmd[:4]))} ... failed", file=sys.stderr)
        return 1
    return 0


def _environment(folder: Path, wheel: Path, *words: str) -> str:
    venv.create(folder, clear=True)  # without pip; the wheel does not need it
    python = str(folder / "bin" / "python")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    _run(*pip, *words, str(wheel))
    return python


def _run(*words: str, cwd: str | Path = ROOT) -> None:
    subprocess.run(words, cwd=cwd, check=True, env=_own())


def _said(*words: str, cwd: str | Path = ROOT) -> str:
    done = subprocess.run(words, cwd=cwd, check=True, env=_own(), capture_output=True, text=True)
    return done.stdout


def _own() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def _git(*words: str) -> str:
    return _said("git", *words)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
