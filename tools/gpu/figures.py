"""The file of figures of `bench_gpu.py`, one per line; these are not measured again.

The first line identifies the machine. Each further line has a figure, what it measures, its
seconds, and its kind: the next figure of a kind is expected to take as long.
"""

import hashlib
import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrobust.runtime.files import jsonl, provenance
from tools import timed

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("jaxrobust", "PyTorch")
# Sources that figures depend on. Code that only starts processes and prints may change.
SOURCES = (
    *("jaxrobust", "configs", "tools/bench_step.py", "tools/bench/torch_reference.py"),
    "tools/gpu/programs.py",
)
# Seconds that the first figure of a kind is expected to take, by the last word of the kind.
GUESSED_S = {
    "logits": 60.0,
    "memory": 120.0,
    "first": 150.0,  # of a batch; compiles
    "turn": 60.0,
    "variant": 150.0,
    "profile": 150.0,
    "short": 150.0,  # of AutoAttack
    "standard": 3000.0,
}
OVERTIME_S = 30.0  # a process is ended if it runs this long after the minutes

Row = dict[str, Any]


class NoTime(Exception):
    """A figure is not measured for lack of time."""


def machine() -> dict[str, str]:
    """Return everything that figures depend on: GPU, driver, JAX, PyTorch, and our sources."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        name, driver = answer.splitlines()[0].rsplit(", ", 1)
        gpu = f"{len(answer.splitlines())} x {name}"
    except (OSError, subprocess.SubprocessError, IndexError):
        gpu = driver = "none"
    digest = hashlib.sha256()
    for path in (ROOT / source for source in SOURCES):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    packages = {"JAX": "jax", "jaxlib": "jaxlib", "PyTorch": "torch"}
    versions = {key: importlib.metadata.version(package) for key, package in packages.items()}
    return {"GPU": gpu, "driver": driver, **versions, "sources": digest.hexdigest()[:12]}


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Return the machine of a file, and its figures; an incomplete last line is ignored."""
    rows = jsonl.read(path)
    if rows and not isinstance(rows[0].get("machine"), dict):
        raise ValueError(f"{path} has no figures from bench_gpu.py; pass a different file")
    return (rows[0]["machine"], rows[1:]) if rows else ({}, [])


class Figures:
    """The figures of this machine."""

    def __init__(self, path: Path, here: dict[str, str], minutes: float | None = None) -> None:
        self.path = path
        self.ends = None if minutes is None else time.monotonic() + 60 * minutes
        if path.is_dir():
            raise ValueError(f"--resume={path} is a folder; name a file, such as {path}/gpu.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        there, self.rows = read(path)
        differing = [key for key in here if there and there.get(key) != here[key]]
        if differing:
            both = ", ".join(f"{key} {there.get(key)} (here {here[key]})" for key in differing)
            raise ValueError(
                f"--resume={path} is from a different machine or different sources: {both}; "
                "continue there, or pass a new file"
            )
        if path.exists():
            self._cut()
        if not there:
            jsonl.append(path, {"machine": here, "commit": provenance.commit()})

    def _cut(self) -> None:
        before = self.path.stat().st_size
        with self.path.open("r+b") as lines:
            jsonl.mend(lines)
        if self.path.stat().st_size < before:
            print(f"{self.path}: removed its last line, which was torn", file=sys.stderr)

    def expected(self, kind: str, guess: float | None = None) -> float:
        """Return the seconds of the longest figure of a kind so far, else a guess."""
        took = [row["seconds"] for row in self.rows if row["kind"] == kind]
        return max(took) if took else guess or GUESSED_S[kind.split()[-1]]

    def limit(self) -> float | None:
        """Return the seconds after which a process is ended."""
        return None if self.ends is None else self.ends - time.monotonic() + OVERTIME_S

    def of(self, what: Row, kind: str, run: Callable[[], Any], guess: float | None = None) -> Any:
        """Return the figure of `what`; measure and store it if the file lacks it."""
        for row in self.rows:
            if row["of"] == what:
                return row["figure"]
        wanted = self.expected(kind, guess)
        if self.ends is not None and time.monotonic() + wanted > self.ends:
            raise NoTime(f"{named(what)} (about {wanted:.0f} s)")
        figure, seconds, _ = timed(run)
        row = {"of": what, "kind": kind, "seconds": round(seconds, 1), "figure": figure}
        jsonl.append(self.path, row)
        self.rows.append(row)
        return figure


def named(what: Row) -> str:
    """Name the subject of a figure."""
    words = [what[key] for key in ("what", "side", "variant") if what.get(key)]
    return ", ".join(words + [f"{key} {what[key]}" for key in ("batch", "turn") if key in what])


def chosen(rows: list[Row], network: str, options: tuple[str, ...], what: str) -> list[Row]:
    """Select the figures `what` of a network with these options."""
    wanted = {"network": network, "options": [*options], "what": what}
    return [row for row in rows if all(row["of"][key] == value for key, value in wanted.items())]
