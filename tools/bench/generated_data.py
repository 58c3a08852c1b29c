"""`python tools/bench/generated_data.py FOLDER`: shards of images compared with an array in memory.

Writes noise of --side pixels to FOLDER, which is emptied at the end: as .npz (--parts files of
--rows images) and, by `jaxrobust prepare generated`, as shards. Then makes the same batches from
both, in turns in one process and thread. Images/s are by CPU time and by the clock; by the clock,
shards that are larger than the memory wait for the disk. --names reads each file several times
under different names, if the disk is too small for all files and the shards. Memory is the growth
of a process with only the stream, from before it opens the source until after --batches batches,
and the peak of the writing process.
"""

import argparse
import functools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxrobust.data.sources import registry
from jaxrobust.data.stream import loading
from jaxrobust.data.stream.plan import plan
from jaxrobust.data.transforms import augmentations
from jaxrobust.runtime.commandline.arguments import Arguments
from tools import guarded

BATCH = 512


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument("folder", type=Path, help="Folder that is empty or does not exist yet.")
    parser.flag("rows", type=int, default=1_000_000, help="Images per file; default: 1,000,000.")
    parser.flag("parts", type=int, default=1, help="Number of files; default: 1.")
    parser.flag("names", type=int, default=1, help="Number of names for each file; default: 1.")
    parser.flag("side", type=int, default=32, help="Pixels; default: %(default)s.")
    parser.flag("array", type=int, default=200_000, help="Number of images in the array in memory.")
    parser.flag("rounds", type=int, default=7, help="Turns of each.")
    parser.flag("batches", type=int, default=16, help="Number of batches of 512 per turn.")
    parser.flag("memory", default=None, help="(Internal: a folder to read.)")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args()


def write_noise(path: Path, rows: int, side: int, seed: int) -> None:
    """Write a .npz of noise without holding all of it in memory."""
    import zipfile

    rng = np.random.default_rng(seed)
    described = {
        "image": ((rows, side, side, 3), "|u1", side * side * 3),
        "label": ((rows,), "<i8", 8),
    }
    with zipfile.ZipFile(path, "w", allowZip64=True) as file:
        for key, (shape, kind, width) in described.items():
            about = {"descr": kind, "fortran_order": False, "shape": shape}
            with file.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, about)
                for first in range(0, rows, 8192):
                    count = min(8192, rows - first)
                    if key == "image":
                        member.write(rng.bytes(count * width))
                    else:
                        member.write(rng.integers(0, 10, count).astype(kind).tobytes())


def resident() -> float:
    """Return the megabytes of this process' memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def stream(source: registry.Source, side: int) -> Any:
    """Return a function from a position to a batch from one source."""
    chain = augmentations.chain("crop|flip", side)
    return functools.partial(
        loading.load_train,
        images=(loading.DecodedImages(source, 0, True, soft=True),),
        augment=chain.augment,
        first_view=chain.augment,
        image_size=side,
        plan=plan(source, batch_size=BATCH, seed=0),
        rows=64,
    )


def memory_of(folder: str, side: int, batches: int) -> dict[str, Any]:
    """Measure the memory of a stream in this process, which has done nothing else."""
    before = resident()
    load = stream(registry.open_source(f"generated:{folder}", "all"), side)
    for position in range(0, batches * BATCH, 64):
        load(position)
    return {"before_mb": before, "more_mb": resident() - before, "images": batches * BATCH}


def compare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure images/s of shards and of an array in memory, in turns."""
    path = folder / "array.npz"
    write_noise(path, args.array, args.side, seed=99)
    named = {"shards": f"generated:{folder / 'shards'}", "array": f"npz:{path}"}
    loads = {key: stream(registry.open_source(n, "all"), args.side) for key, n in named.items()}
    times: dict[str, list[float]] = {key: [] for key in loads}
    waited: dict[str, list[float]] = {key: [] for key in loads}
    images = args.batches * BATCH
    for turn in range(args.rounds + 1):
        for key, load in loads.items():
            start, began = time.process_time(), time.perf_counter()
            for position in range(turn * images, (turn + 1) * images, 64):
                load(position)
            if turn:  # the first one warms up
                times[key].append(time.process_time() - start)
                waited[key].append(time.perf_counter() - began)
    pairs = zip(times["array"], times["shards"], strict=True)
    speeds, clock = (
        {key: images / statistics.median(column) for key, column in each.items()}
        for each in (times, waited)
    )
    return {
        "images_per_s": speeds,
        "by_the_clock": clock,
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def main() -> None:
    args = parse()
    if args.memory:
        print(json.dumps(memory_of(args.memory, args.side, args.batches)))
        return
    if args.folder.exists() and any(args.folder.iterdir()):
        raise ValueError(f"{args.folder} is not empty; give another folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        files = [args.folder / f"part{part}.npz" for part in range(args.parts)]
        for part, path in enumerate(files):
            write_noise(path, args.rows, args.side, part)
        links = [f.with_stem(f"{f.stem}-{i}") for i in range(1, args.names) for f in files]
        for number, link in enumerate(links):
            link.hardlink_to(files[number % args.parts])
        files += links
        words = [sys.executable, "-m", "jaxrobust", "prepare", "generated", *map(str, files)]
        shards = args.folder / "shards"
        start = time.perf_counter()
        subprocess.run([*words, "--out", str(shards)], check=True)
        seconds = time.perf_counter() - start
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
        for path in files:
            path.unlink()
        flags = ["--memory", str(shards), "--side", str(args.side), "--batches", "200"]
        own = [sys.executable, __file__, str(args.folder), *flags]
        told = subprocess.run(own, check=True, capture_output=True, text=True).stdout
        result = {"rows": args.rows * len(files), "write_s": seconds, "write_most_mb": most}
        result |= {"memory": json.loads(told.splitlines()[-1])} | compare(args.folder, args)
    finally:
        shutil.rmtree(args.folder)
    speeds, clock, memory = (result[k] for k in ("images_per_s", "by_the_clock", "memory"))
    print(
        f"{result['rows']:,} images of {args.side} px: written in {seconds:,.0f} s with at most "
        f"{most:,.0f} MB; the stream takes {memory['more_mb']:,.0f} MB more than the "
        f"{memory['before_mb']:,.0f} of the process\n  shards {speeds['shards']:,.0f}, array "
        f"{speeds['array']:,.0f} images/s of one core: {result['ratio']:.3f} of the array's\n"
        "  by the clock "
        f"{clock['shards']:,.0f} and {clock['array']:,.0f} images/s"
    )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    guarded("generated_data", main)
