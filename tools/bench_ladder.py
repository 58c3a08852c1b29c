"""The cost of a ladder of radii compared with separate radii, and whether results agree.

python tools/bench_ladder.py linf:0:0.16:9 --workdir runs/quickstart --n 128 [any flag of evaluate]

Runs `python -m jaxrobust.evaluate --ladder` once and each radius with `--noreplay`, starting from
empty folders. The last lines compare accuracies, image by image, and passes: a forward pass counts
1, a backward pass 2.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrobust.evaluation.records import records, verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.runtime.commandline.threats import ladder


def evaluated(out: Path, *flags: str) -> tuple[list[AccuracyRecord], float]:
    """Run the command in an empty folder; return its records and seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "jaxrobust.evaluate", *flags, f"--out={out}"]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit(code)
    return records.read(out), time.perf_counter() - start


def passes(record: AccuracyRecord) -> int:
    """Count the passes of a record's attacks; a backward pass counts 2."""
    return sum(cost["forward"] + 2 * cost["backward"] for cost in record.costs or ())


def compare(radii: str, flags: list[str], folder: Path) -> str:
    together, seconds = evaluated(folder / "ladder", f"--ladder={radii}", *flags)
    lines = ["| radius | ladder | alone | images robust in the ladder only | alone only | passes |"]
    lines += ["|---|---|---|---|---|---|"]
    alone, alone_seconds = 0, 0.0
    for ball, record in zip(ladder(radii), together, strict=True):
        if not ball.epsilon:
            continue
        out = folder / f"alone-{ball.epsilon:.8g}"
        ours = [f"--norm={ball.norm}", f"--epsilon={ball.epsilon!r}", "--noreplay"]
        (own,), took = evaluated(out, *ours, *flags)
        alone, alone_seconds = alone + passes(own), alone_seconds + took
        first = verdicts.read(folder / "ladder" / str(record.verdicts)).robust
        second = verdicts.read(out / str(own.verdicts)).robust
        share = f"{passes(record) / passes(own):.2f}" if passes(own) else "-"
        only = ((first & ~second).sum(), (second & ~first).sum())
        cells = (ball, f"{record.robust:.1%}", f"{own.robust:.1%}", *only, share)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    cost = sum(map(passes, together))
    lines += [
        f"\npasses: {cost:,} in the ladder, {alone:,} alone, {cost / alone:.2f} of them",
        f"time: {seconds:.0f} s and {alone_seconds:.0f} s, {seconds / alone_seconds:.2f} of it",
    ]
    return "\n".join(lines)


def main() -> None:
    words = sys.argv[1:]
    if words in ([], ["--help"]) or not re.fullmatch(r"[^-]\S*", words[0]):
        print(__doc__)
        sys.exit(0 if words == ["--help"] else 2)
    with tempfile.TemporaryDirectory() as folder:
        print(compare(words[0], words[1:], Path(folder)))


if __name__ == "__main__":
    main()
