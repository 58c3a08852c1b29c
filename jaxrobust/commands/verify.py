"""Check a bundle with our network: `jaxrobust verify BUNDLE --weights W`.

`python -m jaxrobust.evaluate --bundle BUNDLE` wrote it. W is what --weights of an evaluation takes:
a run, an imported folder, a file, an id. The images come from the data set of the record. One
forward pass for each image that is said to be misclassified confirms that the robust accuracy is at
most what the record says; what is not confirmed is said by name. Another network than the record's
is judged too: what comes out is said of it, and the claim is not confirmed. Where the record names
images or a list of them by a path, which may be of whoever made the bundle, --dataset or --split
has to name your own.

Exit codes: 0 everything is confirmed; 1 something is not; 2 a mistake, with one sentence on stderr;
3 another reason that it names, such as a full disk; 130 interrupted.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.runtime.commandline.arguments import Arguments, answer, quiet_libraries
from jaxrobust.runtime.processes.launch import keep_large_buffers, use_every_core


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = Arguments(__doc__ or "")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="Folder of the bundle.")
    parser.flag("weights", help="Weights: a run, an imported folder, a file, or an id.")
    parser.flag("function", help="Function of images to logits instead, as evaluate takes it.")
    parser.flag("dataset", help="Data set with these images; default: that of the record.")
    parser.flag("split", help="Split of it; default: that of the record.")
    parser.flag("classes", help="List of the classes that are kept, where one was given.")
    parser.flag("data_dir", help="Folder of data sets; default: $TFDS_DATA_DIR.")
    parser.flag("batch", type=int, help="Images at a time.")
    parser.flag(
        "write_images",
        type=Path,
        help="File .npy for the images as they are prepared, uint8[N,H,W,C], which verify.py of "
        "the bundle takes; a file .labels.npy beside it gets their labels. Needs no weights.",
    )
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Check a bundle and print what was found; return the exit code."""
    args = parse(argv)
    codes = {}

    def run(args: argparse.Namespace) -> dict[str, Any]:
        found = _write_images(args) if args.write_images else _verified(args)
        codes["code"] = 0 if found.get("whole", True) else 1
        return found

    answer(run, args, "the same command starts again")
    return codes["code"]


def _verified(args: argparse.Namespace) -> dict[str, Any]:
    """Print what the forward passes confirm, and return it for JSON."""
    if bool(args.weights) == bool(args.function):
        raise ValueError("give --weights W, or --function my_net.py:logits_fn, the network")
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch={args.batch} must be at least 1")
    from jaxrobust.evaluation.bundles import bundle as bundles
    from jaxrobust.evaluation.bundles import claims
    from jaxrobust.evaluation.questions import flags, measuring
    from jaxrobust.evaluation.questions import target as subjects
    from jaxrobust.runtime.text.progress import say
    from jaxrobust.weights.store import hashes

    bundle = claims.read(args.bundle)
    model = bundle.record["model"]
    given = _given(args, bundle.record)
    flags.check(given)
    subject, source = subjects.settled(
        flags.origin(given),
        network={"num_classes": model["num_classes"], "image_size": model["image_size"]},
        **_source_of(args, bundle.record),
        **bundle.threat,
    )
    which, subject, weights = flags.weights(given, subject, source)
    sha256 = subject.arrays_sha256 or hashes.weights_sha256(*weights)
    prepared = _prepared(source, bundle)
    words = [
        _other(bundle.record, subject, sha256),
        _other_split(bundle.about, source),
        _other_program(bundle.folder),
    ]
    say(f"{subject.network.name}{f' ({which})' if which else ''} on {source.where()}")
    batch = args.batch or 64
    logits = bundles.forward(
        measuring.networks_of(subject, weights)("float32"), prepared.shape[1:], batch
    )
    found = claims.judge(
        bundle,
        lambda ids: prepared[np.asarray(ids)],
        logits,
        count=len(prepared),
        split_images=len(source),
        labels=prepared.labels(),
        batch=batch,
        tell=say,
    )
    print("\n".join([*claims.lines(bundle, found), *filter(None, words)]))
    whole = found.whole and not any(words[:2])
    named = {"bundle": bundle.number, "other_network": bool(words[0])}
    return found.plain() | {"whole": whole} | named


def _given(args: argparse.Namespace, record: dict[str, Any]) -> Any:
    """Return the flags of an evaluation that name the network, as it is here.

    A run's phase is that of the record, if the run has it; a file is of the record's network.
    """
    from jaxrobust.evaluation.questions import flags
    from jaxrobust.evaluation.questions.flags import Given

    none: dict[str, Any] = dict.fromkeys(Given._fields) | Given._field_defaults
    none |= {"attack": "autoattack", "version": "standard", "search_dtype": "float32"}
    none |= {"n": 0, "seed": 0, "function": args.function, "weights": args.weights}
    given = flags.placed(Given(**none))
    if given.workdir:
        phase = str(record["weights"]).partition(",")[0]
        known = phase and (Path(given.workdir) / phase).is_dir()
        return given._replace(phase=phase if known else None)
    if given.weights and not Path(given.weights).is_dir():
        model = record["model"]
        return given._replace(model=model["name"], options=model["options"] or None)
    return given


def _source_of(args: argparse.Namespace, record: dict[str, Any]) -> dict[str, Any]:
    """Return where the images of a record are.

    Raises:
      ValueError: the record alone names files, which whoever made it may have made too.
    """
    from jaxrobust.data.source import KINDS

    paths = "|".join(re.escape(name) for name, kind in KINDS.items() if kind.is_path)
    for flag, own in (("dataset", rf"({paths}):.*|hf:[./~].*"), ("split", ".*@.*")):
        said = str(record[flag])
        lists = flag == "split" and re.fullmatch(r"[^@]*@(robustbench|selection)(\[.*\])?", said)
        if not getattr(args, flag) and re.fullmatch(own, said) and not lists:
            raise ValueError(
                f"the record names its images by a path, {said}, which may be of whoever made the "
                f"bundle; name your own: --{flag} {said}"
            )
    named = {key: getattr(args, key) for key in ("dataset", "split", "classes", "data_dir")}
    return named | {key: named[key] or record[key] for key in ("dataset", "split")}


def _prepared(source: Any, bundle: Any) -> Any:
    """Return the images of a source as the record's were prepared.

    Raises:
      ValueError: they have other channels.
    """
    from jaxrobust.data import Prepared

    size, _, channels = bundle.about["image"]
    if source.channels != channels:
        raise ValueError(
            f"the bundle is of images with {channels} channels, and {source.where()} has "
            f"{source.channels}; give the --dataset and --split of its record"
        )
    last = max(row["image"] for row in bundle.rows) + 1
    return Prepared(
        source,
        image_size=size,
        preprocessing=bundle.record["preprocessing"],
        images=min(len(source), last),
    )


def _other(record: dict[str, Any], subject: Any, sha256: str) -> str | None:
    """Return a sentence if this is another network than that of the record, or has other weights.

    Of a user's function its name, its file's hash and its arrays count, whatever the folder.
    """
    from jaxrobust import models

    model, function = record["model"], record.get("function") or {}
    said = function.get("arrays_sha256") or record["weights_sha256"]
    network = subject.network
    here = (network.name, network.options, subject.origin() or {}, sha256)
    there = (model["name"], model["options"], function, said)
    plain = [
        (
            name.rpartition(":")[2],
            json.dumps(models.essential(name, options or {})),
            own.get("sha256"),
            arrays,
        )
        for name, options, own, arrays in (here, there)
    ]
    if plain[0] == plain[1]:
        return None
    return (
        f"This is another network than the record's, or has other weights ({network.name}, sha256 "
        f"{sha256[:12]}...; there {model['name']}, {str(said)[:12]}...): what is confirmed holds "
        "for it, and the claim itself is not confirmed"
    )


def _other_split(about: dict[str, Any], source: Any) -> str | None:
    """Return a sentence if the split has another number of images than the bundle says."""
    if about.get("split_images") in (None, len(source)):
        return None
    return (
        f"{source.where()} has {len(source):,} images, and the bundle says "
        f"{about['split_images']:,}: this is another split, or version of the data set, and the "
        "claim itself is not confirmed"
    )


def _other_program(folder: Path) -> str | None:
    """Return a sentence if the program in a bundle is another than this version writes."""
    from jaxrobust.evaluation.bundles import bundle as bundles

    path = folder / bundles.PROGRAM
    if path.is_file() and path.read_text(errors="replace") == bundles.program():
        return None
    return (
        f"{path} is not the program that this version writes: another version wrote it, or "
        "somebody changed it; before you run it, compare it with that of its version"
    )


def _write_images(args: argparse.Namespace) -> dict[str, Any]:
    """Write images and labels as the bundle's verify.py takes them."""
    from jaxrobust.data.sources import registry
    from jaxrobust.evaluation.bundles import claims
    from jaxrobust.runtime.files import whole

    if args.write_images.suffix != ".npy":
        raise ValueError(f"--write_images {args.write_images}: name a file that ends in .npy")
    bundle = claims.read(args.bundle)
    named = _source_of(args, bundle.record)
    source = registry.open_source(
        named.pop("dataset"),
        named.pop("split"),
        num_classes=bundle.record["model"]["num_classes"],
        **named,
    )
    prepared = _prepared(source, bundle)
    with whole.writing(args.write_images) as part, part.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": prepared.shape}
        )
        for start in range(0, len(prepared), 64):
            images = prepared[np.arange(start, min(start + 64, len(prepared)))]
            file.write(np.rint(images * np.float32(255)).astype(np.uint8).tobytes())
    labels = args.write_images.with_suffix(".labels.npy")
    np.save(labels, prepared.labels())
    print(f"{len(prepared)} images in {args.write_images}, their labels in {labels}")
    return {"images": len(prepared)}


if __name__ == "__main__":
    keep_large_buffers()
    use_every_core()
    quiet_libraries()
    sys.exit(main())
