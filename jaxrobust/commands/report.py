"""`jaxrobust report PATH... [--out FILE]`: runs and evaluations as one HTML file.

A path is a run, a folder of records (RUN/evaluation), a file of records, or a folder of many of
them. quickstart, unless a path has that name, is the run shipped with the package. The file opens
from disk and loads nothing else. With --watch, the page is served instead, and updated while the
run continues.

Exit codes: 0 done; 2 a mistake in the command or the data, with one sentence on stderr; 3 a file
cannot be read or written, or the port is taken.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrobust.runtime.commandline import arguments, fields
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.files import whole
from jaxrobust.runtime.text import patience, terminal
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.weights.fetch import shipped


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """The content of the page, and its destination."""

    paths: tuple[Path, ...] = flag(
        "Run, records, or a folder that contains several.", word=True, required=True, metavar="PATH"
    )
    out: Path | None = flag("File to write; default: report.html in PATH, or here for quickstart.")
    watch: bool = flag("Serve the page and keep it up to date.", False)
    host: str = flag(
        "Address for --watch; default: 127.0.0.1, which only this machine can reach.", "127.0.0.1"
    )
    port: int = flag("Port for --watch; default: 8017.", 8017)
    every: float = flag("Seconds between updates with --watch; default: 10.", 10.0, least=1)
    json: bool = flag("Print the outcome as JSON on the last line.", False)


def main(argv: list[str] | None = None) -> None:
    """Read the flags and write or serve the page."""
    flags = fields.read(ReportFlags, __doc__, argv)
    patience.end()
    arguments.answer(run, flags, "run the same command to start again")


def _kept(path: Path) -> Path:
    """Find the packaged run named by a path, unless the path exists."""
    return path if path.exists() else shipped.kept(str(path)) or path


def run(flags: ReportFlags) -> dict[str, Any] | None:
    """Write the page and return its facts, or serve it until Ctrl-C."""
    if flags.watch and (flags.out or flags.json):
        raise ValueError("--watch serves the page and writes no file; leave out --out and --json")
    with patience.of("loading the package"):
        from jaxrobust.report import gathered, page, watching
        from jaxrobust.report.parts import examples  # --help needs no JAX

    if flags.watch:
        watching.serve(
            tuple(map(_kept, flags.paths)), host=flags.host, port=flags.port, every=flags.every
        )
        return None
    first, paths = flags.paths[0], tuple(map(_kept, flags.paths))
    place = first if first.is_dir() else first.parent  # for a packaged run, the current folder
    out = flags.out or place / "report.html"
    if out.is_dir():
        raise ValueError(f"--out={out} is a folder; name a file, such as {out / 'report.html'}")
    with patience.of(f"reading {', '.join(map(str, flags.paths))}"):
        records = gathered.gather(paths)
    if not out.parent.is_dir():
        raise ValueError(f"--out={out}: the folder {out.parent} does not exist; create it first")
    text = page.page(records, pictures=examples.Album().part)
    try:
        with whole.writing(out, len(text.encode())) as part:
            part.write_text(text, encoding="utf-8")
    except whole.DiskFull as error:
        raise OSError(f"{error}, with --out") from error
    except OSError as error:
        message = f"cannot write {out} ({error.strerror or error}); name another file with --out"
        raise OSError(message) from error
    runs, evaluations, size = len(records.runs), len(records.evaluations), len(text.encode())
    counts = f"{counted(runs, 'run')}, {counted(evaluations, 'evaluation')}"
    print(terminal.fitted(f"{out}: {counts}, {size / 1e6:.2f} MB", None))
    for note in records.notes:
        print(terminal.fitted(f"note: {note}", None))
    for run in records.runs:
        if run.goodput:
            print(terminal.fitted(f"{run.name}: {run.goodput.line()}", None))
    counts_of = {"runs": runs, "evaluations": evaluations, "notes": records.notes}
    counts_of["goodput"] = {run.name: run.goodput.plain() for run in records.runs if run.goodput}
    return {"file": str(out), "bytes": size} | counts_of
