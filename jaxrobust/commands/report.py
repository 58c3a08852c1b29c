"""`python -m jaxrobust.report PATH... [--out FILE]`: runs and evaluations as one HTML file.

A path is a run, a folder of records (RUN/evaluation), a file of records, or a folder of many of
them. The file opens from disk and loads nothing. With --watch a server shows the page instead, and
shows it anew while the run goes on.

Exit codes: 0 done; 2 a mistake in the command or the data, with one sentence on stderr; 3 a file
cannot be read or written, or the port is taken.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.files import whole
from jaxrobust.runtime.text import patience


def main(argv: list[str] | None = None) -> None:
    """Read the flags and write or serve the page."""
    parser = arguments.Arguments(
        __doc__ or "",
        prog=arguments.program or "python -m jaxrobust.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", type=Path, help="Run, records, folder.")
    parser.add_argument("--out", type=Path, help="File; default: report.html in the first PATH.")
    parser.add_argument("--watch", action="store_true", help="Serve the page and keep it fresh.")
    parser.add_argument("--host", default="127.0.0.1", help="Address of --watch; default: only "
                        "this machine reaches it.")  # fmt: skip
    parser.add_argument("--port", type=int, default=8017, help="Port of --watch; default: 8017.")
    parser.add_argument("--every", type=float, default=10, help="Seconds between two pages of "
                        "--watch; default: 10.")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print what was made as JSON, last.")
    args = parser.parse_args(argv)
    patience.end()
    arguments.answer(run, args, "the same command makes the page again")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Write the page, or serve it until Ctrl-C; return what was made."""
    with patience.of("loading the package"):
        from jaxrobust.report import gathered, page, watching
        from jaxrobust.report.parts import examples  # --help needs no JAX

    if args.watch:
        if args.out or args.json:
            raise ValueError("--watch serves the page and writes no file; leave --out, --json out")
        watching.serve(args.paths, host=args.host, port=args.port, every=args.every)
        return None
    out = args.out or _beside(args.paths[0])
    if out.is_dir():
        raise ValueError(f"--out={out} is a folder; name a file, such as {out / 'report.html'}")
    with patience.of(f"reading {', '.join(map(str, args.paths))}"):
        found = gathered.gather(args.paths)
    if not out.parent.is_dir():
        raise ValueError(f"--out={out}: the folder {out.parent} is not there; make it first")
    text = page.page(found, pictures=examples.Album().part)
    try:
        with whole.writing(out, len(text.encode())) as part:
            part.write_text(text, encoding="utf-8")
    except whole.DiskFull as error:
        raise OSError(f"{error}, with --out") from error
    except OSError as error:
        said = f"cannot write {out} ({error.strerror or error}); name another file with --out"
        raise OSError(said) from error
    runs, own = len(found.runs), len(found.evaluations)
    size = len(text.encode())
    print(f"{out}: {_count(runs, 'run')}, {_count(own, 'evaluation')}, {size / 1e6:.2f} MB")
    for note in found.notes:
        print(f"note: {note}")
    made = {"file": str(out), "bytes": size, "runs": runs, "evaluations": own}
    return made | {"notes": found.notes}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _beside(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "report.html"


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator is the training's
    main()
