"""`jaxrobust prepare imagenet SOURCE --out OUT`: ImageNet as ArrayRecord.

SOURCE is a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or these files, or an
ImageFolder with train/ and val/ (or validation/), of ImageNet or, with --name, of other classes,
which may have a test/ too.

OUT/imagenet2012/5.1.0 is then what `tfds build` would write, except that images are copied byte
for byte (TFDS converts 22 CMYK images and a PNG); jaxrobust, TFDS and Grain read it. Records are
in the order of sha256(SALT + "CLASS/NAME"), so every shard mixes the classes, and tar files and
folders give the same shards. The same command continues what was interrupted and writes again what
is missing or cut off; --check reads everything. SHA256SUMS is for `sha256sum -c` after copying.

OUT is local; `gcloud storage cp -r OUT/imagenet2012 gs://BUCKET/` copies it to a bucket.

Exit codes: 0 done; 2 a mistake, or a source that is not whole, with one sentence on stderr; 3
stopped for another reason that it names (full disk, damaged shards); 130 interrupted, resumable.
"""

import argparse
import hashlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.data.prepare import command, directory, raw_source, shards
from jaxrobust.data.prepare.directory import About, DatasetPlan
from jaxrobust.data.prepare.known import IMAGENET, known, package_folder
from jaxrobust.data.prepare.raw_source import Content
from jaxrobust.data.prepare.shards import Shard
from jaxrobust.data.sources import headers

_SHARD_BYTES = 128 * 10**6
_SHARDS = {"train": 1024, "validation": 64}  # of the whole ImageNet, as TFDS writes it
_TAKEN = ("digits", "fake")  # names that `open_source` keeps for its own


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = command.parser(__doc__, "imagenet")
    parser.add_argument("source", nargs="*", type=Path, help="Folder, or the tar files.")
    parser.flag(
        "out", required=True, help="Folder of NAME/VERSION: a data_dir for jaxrobust and TFDS."
    )
    parser.flag("name", help="Name of a data set with other classes; default: imagenet2012.")
    parser.flag(
        "allow_partial", action="store_true", help="Take a part of ImageNet, with its 1,000 labels."
    )
    parser.flag(
        "shards",
        nargs=2,
        type=int,
        metavar=("TRAIN", "VALIDATION"),
        help="Numbers of shards; default: 1024 64 for the whole ImageNet, else so many that each "
        "has 128 MB.",
    )
    command.common_flags(parser)
    args = parser.parse_args(argv)
    if args.check == bool(args.source):
        parser.error("give a SOURCE to write from, or --check")
    return args


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write the data set; return what was done."""
    if args.name in _TAKEN or not re.fullmatch(r"[a-z][a-z0-9_]*", args.name or "x"):
        wanted = f"a name of small letters, digits and _, not {' or '.join(_TAKEN)}"
        raise ValueError(f"--name {args.name}: write {wanted}")
    raw_source.check(args.source)
    command.say(f"listing {', '.join(map(str, args.source))}")
    start = time.perf_counter()
    content = raw_source.scan(args.source, name=args.name, allow_partial=args.allow_partial)
    for split, part in content.splits.items():
        rows = part.rows[shards.order(part.rows, content.classes)]
        content.splits[split] = part._replace(rows=rows)
    about = _about(content)
    folder = Path(args.out) / content.name / about.version
    plan = DatasetPlan(folder, content, _shards(folder, content, args.shards), about)
    listed = time.perf_counter()
    with directory.claimed_for(plan):
        images, size = _write(plan, args.workers)
        directory.finish(plan)
    done = command.done(folder) | {"notes": content.notes}
    for split, (_, rows) in content.splits.items():
        of = known().sizes[split] if content.name == IMAGENET else None
        done["splits"][split] |= {"of": of, "bytes": int(rows["size"].sum())}
    return done | command.effort(images, size, start=start, listed=listed)


def _about(content: Content) -> About:
    whole = content.name == IMAGENET
    what = "ImageNet (ILSVRC 2012), 1,000 classes" if whole else f"{len(content.classes)} classes"
    module = f"tensorflow_datasets.datasets.{IMAGENET}.{IMAGENET}_dataset_builder"
    return About(
        version="5.1.0" if whole else "1.0.0",  # TFDS' of ImageNet
        description=f"{what}, images byte for byte as in the source, written by jaxrobust's "
        "data.prepare.",
        module=module if whole else "jaxrobust.data.prepare.imagenet",
        order=shards.SALT.decode(),
        labels={"label": content.classes},
        image=directory.image((None, None, 3) if whole else _shape(content), _encoding(content)),
        name_key="file_name",
        citation=(package_folder() / "CITATIONS.bib").read_text() if whole else "",
    )


def _shape(content: Content) -> tuple[int | None, int | None, int]:
    """Return the shape that all images have, (None, None, 3) for several; note what is unusual."""
    shapes = set()
    for origin, rows in content.splits.values():
        paths = [f"{origin}/{os.fsdecode(place)}" for place in rows["place"].tolist()]
        sha256 = hashlib.sha256(rows.tobytes()).hexdigest()
        facts = headers.look(
            partial(_chosen, paths),
            len(paths),
            f"{origin}",
            paths.__getitem__,
            partial("{} {}".format, origin, sha256),
        )
        shapes.add(facts and facts.image_shape)
        content.notes.extend(facts.notes if facts else ())
    (shape, *others) = shapes
    return shape if shape and not others else (None, None, 3)


def _chosen(paths: Sequence[str], places: Sequence[int]) -> list[str]:
    return [paths[place] for place in places]


def _encoding(content: Content) -> str | None:
    """Return the format of all images by their names; None where they differ or TFDS has none."""
    for form, endings in {"jpeg": (b".jpeg", b".jpg"), "png": (b".png",)}.items():
        if all(
            name.lower().endswith(endings)
            for part in content.splits.values()
            for name in part.rows["name"].tolist()
        ):
            return form
    return None


def _shards(folder: Path, content: Content, wanted: list[int] | None) -> dict[str, list[Shard]]:
    lengths = {split: len(rows) for split, (_, rows) in content.splits.items()}
    whole = content.name == IMAGENET and lengths.items() <= known().sizes.items()
    parts = {}
    for split, (origin, rows) in content.splits.items():
        count = _SHARDS[split] if whole else round(int(rows["size"].sum()) / _SHARD_BYTES)
        count = min(max(count, 1), len(rows))
        if wanted:
            count = wanted[split != "train"]
        if not 1 <= count <= len(rows):
            raise ValueError(f"--shards: {split} with {len(rows):,} images can't be {count} shards")
        table = folder / f"{split}.npy{shards.PARTIAL}"
        paths = [folder / shards.file_name(content.name, split, i, count) for i in range(count)]
        bounds = itertools.pairwise(i * len(rows) // count for i in range(count + 1))
        pairs = zip(paths, bounds, strict=True)
        parts[split] = [Shard(path, table, origin, *ends) for path, ends in pairs]
    return parts


def _write(plan: DatasetPlan, workers: int) -> tuple[int, int]:
    """Write the shards that are not there yet; return (images, bytes) of them."""
    sums = directory.read_sums(plan.directory)
    todo = []
    need = 0
    for split, part in plan.shards.items():
        sizes = plan.content.splits[split].rows["size"]
        for shard in part:
            if shards.length(shard.path) != shard.last - shard.first:
                todo.append(shard)
                need += int(sizes[shard.first : shard.last].sum())
            elif shard.path.name not in sums:  # killed between the shard and its line
                directory.add_sum(plan.directory, shard.path.name, shards.sha256(shard.path))
    if not todo:
        return 0, 0
    (plan.directory / directory.INFO).unlink(missing_ok=True)  # it promises all shards
    if (free := shutil.disk_usage(plan.directory).free) < need:
        raise OSError(
            f"{need / 1e9:,.1f} GB are to be written and {free / 1e9:,.1f} GB are free in "
            f"{plan.directory}; free some space, or give another --out"
        )
    for split, part in plan.shards.items():
        with part[0].plan.open("wb") as file:
            np.save(file, plan.content.splits[split].rows)
    every = sum(map(len, plan.shards.values()))
    command.say(f"writing {len(todo):,} of {every:,} shards, {need / 1e9:,.3f} GB")
    return command.write(plan, shards.write, todo, workers), need


def main(argv: list[str] | None = None) -> None:
    """Write or check, as the command line says."""
    command.run(parse(argv), prepare)
