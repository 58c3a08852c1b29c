"""`python tools/bench_data.py [FOLDER]`: images/s of the input pipeline, compared with timm's.

Part one: from the bytes of a file in memory to `uint8[224,224,3]`, on one core, in turns with
torchvision's and timm's transforms to their float tensor on the same photographs, in CPU seconds.
light, 3-augment and heavy are the full result of timm's `create_transform` with the recipes' mean 0
and std 1, including Normalize. Only random erasing is left out, because ours runs on the device.
evaluation and basic are torchvision's, and end with ToTensor.
Part two: the extra cost of batches, and their rate with several worker processes.
FOLDER is an ImageFolder (train is read, else val) or a folder of class folders. Without it,
photographs are synthetic, which says less about decoding.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxrobust.data.sources import image_folder, registry
from jaxrobust.data.stream import pipeline
from jaxrobust.data.transforms import augmentations, decoding, preparing
from jaxrobust.runtime.commandline.arguments import Arguments
from tools import guarded

SIZE = 224
EVALUATION = "BicubicRes256Crop224"
PRESETS = ("basic", "light", "3-augment", "heavy")
Program = Callable[[bytes], Any]


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="ImageFolder of photographs; default: synthetic ones."
    )
    parser.flag("images", type=int, default=200, help="Maximum number of photographs.")
    parser.flag("rounds", type=int, default=7, help="Number of turns of each pipeline.")
    parser.flag("batch", type=int, default=32, help="Batch size; default: %(default)s.")
    parser.flag("batches", type=int, default=20, help="Batches in a turn of part two; 0: none.")
    parser.flag("workers", type=int, nargs="*", default=[1, 2], help="Numbers of worker processes.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args()


def make_up(root: Path, count: int) -> None:
    """Write JPEGs of the size and roughly the file size of ImageNet's."""
    y, x = np.mgrid[:375, :500]
    for number in range(count):
        rng = np.random.default_rng(number)
        waves = [
            rng.uniform(5, 40) * np.sin(x * across + y * down + rng.uniform(0, 6))
            for across, down in rng.normal(0, 0.15, (12, 2))
        ]
        image = 128 + np.stack([sum(waves[c : c + 8]) for c in range(3)], axis=2)
        image += rng.normal(0, 8, image.shape)
        path = root / f"class{number % 2}" / f"{number:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def ours() -> dict[str, Program]:
    def augmented(data: bytes, *, chain: augmentations.Chain, rng: np.random.Generator) -> Any:
        return chain.augment(decoding.decode(data, channels=3), rng)

    programs: dict[str, Program] = {
        "decode": functools.partial(decoding.decode, channels=3),
        "evaluation": preparing.evaluation_transform(EVALUATION),
    }
    for name in PRESETS:
        chain, rng = augmentations.chain(name, SIZE), np.random.default_rng(0)
        programs[name] = functools.partial(augmented, chain=chain, rng=rng)
    return programs


def theirs() -> dict[str, Program]:
    """Return the transforms of torchvision and timm, on one thread; empty without them."""
    try:
        import torch

        from jaxrobust.publish import torch_networks

        timm_data = torch_networks.import_timm().data
        from torchvision import transforms as vision
    except ImportError:
        return {}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    allow_no_bits()

    def opened(data: bytes) -> Image.Image:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")

    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic"}
    train = functools.partial(timm_data.create_transform, SIZE, is_training=True, **plain)
    bicubic = vision.InterpolationMode.BICUBIC
    steps = {
        "evaluation": [vision.Resize(256, bicubic), vision.CenterCrop(SIZE), vision.ToTensor()],
        "basic": [vision.RandomResizedCrop(SIZE, interpolation=bicubic), vision.ToTensor()],
        "light": [train(color_jitter=0.4)],
        "3-augment": [train(color_jitter=0.3, auto_augment="3a")],
        "heavy": [train(auto_augment="rand-m9-mstd0.5-inc1")],
    }

    def run(data: bytes, *, transform: Any) -> Any:
        return transform(opened(data))

    return {"decode": opened} | {
        name: functools.partial(run, transform=vision.Compose(parts))
        for name, parts in steps.items()
    }


def allow_no_bits() -> None:
    """Let timm's Posterize use 0 bits, which Pillow 13 refuses: black, as before."""
    posterize = ImageOps.posterize

    def lenient(image: Image.Image, bits: int) -> Image.Image:
        return posterize(image, bits) if bits else Image.new(image.mode, image.size)

    ImageOps.posterize = lenient


def measure(
    programs: Sequence[dict[str, Program]], files: list[bytes], rounds: int
) -> list[dict[str, list[float]]]:
    """Measure CPU seconds per image of each program and round; programs take turns in a round."""
    times: list[dict[str, list[float]]] = [{name: [] for name in side} for side in programs]
    for round_ in range(rounds + 1):
        for name in programs[0]:
            for side, column in zip(programs, times, strict=True):
                if name not in side:
                    continue
                start = time.process_time()
                for data in files:
                    side[name](data)
                if round_:  # the first one warms up
                    column[name].append((time.process_time() - start) / len(files))
    return times


@contextlib.contextmanager
def naming(source: registry.Source, index: int) -> Iterator[None]:
    """Name the file that does not decode."""
    try:
        yield
    except registry.DataError:
        raise
    except ValueError as error:
        raise ValueError(f"{source.describe(index)}: {error}") from error


def settled() -> float:
    """Return this process' CPU seconds, once its threads have finished reading ahead."""
    while True:
        before = time.process_time()
        time.sleep(0.2)
        if (now := time.process_time()) - before < 0.005:
            return now


def batches(source: registry.Source, args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """Return extra milliseconds per image beyond the bare functions, and images/s with workers."""
    batch_size = min(args.batch, len(source))
    count = args.batches * batch_size
    stream = functools.partial(
        pipeline.train_batches,
        source,
        batch_size=batch_size,
        seed=0,
        augmentation=preset,
        image_size=SIZE,
    )
    bare = ours()[preset]
    order = np.random.default_rng(0).integers(0, len(source), count).tolist()
    on_top = []
    threads = stream(workers=0)
    for _ in range(args.rounds):
        start = settled()
        for index in order:
            with naming(source, index):
                bare(source.read([index])[0].image)
        middle = time.process_time()
        for _ in range(args.batches):
            next(threads)
        on_top.append((settled() - middle) - (middle - start))
    threads.close()
    speeds = {}
    for workers in args.workers:
        processes = stream(workers=workers)
        for _ in range(4 + 4 * workers):  # read ahead while the workers started
            next(processes)
        start = time.perf_counter()
        for _ in range(args.batches):
            next(processes)
        speeds[workers] = count / (time.perf_counter() - start)
        processes.close()
    return {
        "preset": preset,
        "batch": batch_size,
        "overhead_ms": 1e3 * statistics.median(on_top) / count,
        "images_per_s_with_workers": speeds,
    }


def main() -> None:
    args = parse()
    if min(args.images, args.rounds, args.batch) < 1 or min(args.batches, *args.workers, 0) < 0:
        raise ValueError("--images, --rounds and --batch must be positive, the others not negative")
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        if args.folder is None:
            make_up(root, min(args.images, 64))
        split = next(iter(image_folder.splits_there(root)), "all")
        source = registry.open_source(f"folder:{root}", split)
        chosen = np.linspace(0, len(source) - 1, min(args.images, len(source))).astype(int).tolist()
        files = [record.image for record in source.read(chosen)]
        for index, data in zip(chosen, files, strict=True):
            with naming(source, index):
                decoding.decode(data)
        result = compare(files, args.rounds)
        result["photographs"] = f"{root}, split {split}" if args.folder else "made up"
        describe(result)
        if args.batches:
            result["batches"] = batches(source, args, "basic")
            describe_batches(result["batches"])
    if args.json:
        print(json.dumps(result))


def compare(files: list[bytes], rounds: int) -> dict[str, Any]:
    """{pipeline: images/s of ours and theirs, their ratio, milliseconds of each part of ours}."""
    our_times, their_times = measure([ours(), theirs()], files, rounds)
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in our_times.items()}
    rows = {}
    for name, times in our_times.items():
        parts = {"decode": milliseconds["decode"]}
        if name != "decode":
            resized = "evaluation" if name == "evaluation" else "basic"
            parts["resize"] = milliseconds[resized] - milliseconds["decode"]
            parts["ops"] = milliseconds[name] - milliseconds[resized]
        row: dict[str, Any] = {"images_per_s": 1e3 / milliseconds[name], "milliseconds": parts}
        if name in their_times:
            row["theirs_images_per_s"] = 1 / statistics.median(their_times[name])
            pairs = zip(their_times[name], times, strict=True)
            row["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
        rows[name] = row
    return {"images": len(files), "rounds": rounds, "pipelines": rows}


def describe(result: dict[str, Any]) -> None:
    print(
        f"{result['images']} photographs ({result['photographs']}), {result['rounds']} rounds, one "
        "core; images/s and where our milliseconds go"
    )
    print(f"  {'':12}{'ours':>8}{'theirs':>8}{'ratio':>7}{'decode':>9}{'resize':>8}{'ops':>7}")
    for name, row in result["pipelines"].items():
        parts = row["milliseconds"]
        print(
            f"  {name:12}{row['images_per_s']:8.0f}{row.get('theirs_images_per_s', math.nan):8.0f}"
            f"{row.get('ratio', math.nan):7.2f}{parts['decode']:9.2f}"
            f"{parts.get('resize', 0):8.2f}{parts.get('ops', 0):7.2f}"
        )


def describe_batches(made: dict[str, Any]) -> None:
    print(
        f"  batches of {made['batch']}, {made['preset']}: {made['overhead_ms']:+.2f} ms for an "
        f"image on top of the functions; {os.cpu_count()} cores"
    )
    for workers, speed in made["images_per_s_with_workers"].items():
        print(f"  {workers} worker processes: {speed:.0f} images/s")


if __name__ == "__main__":
    guarded("bench_data", main)
