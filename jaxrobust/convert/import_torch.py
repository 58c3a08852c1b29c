"""Import PyTorch weights: `python -m jaxrobust.convert.import_torch SOURCE --model NAME --out DIR`.

SOURCE is a file (.safetensors, .pth, .pt, ...), a URL, or hf://ORG/REPO[@REVISION][/FILE], such as
hf://timm/convnext_tiny.fb_in1k. DIR gets `weights.safetensors` with our names and `config.json`;
training takes it as `--config.init.weights=DIR`, evaluation as `--weights DIR`. The certificate
beside them says how well they agree with the reference network (jaxrobust.convert.certificate).

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason that it names, such
as no network; nothing is left under DIR then.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrobust import models
from jaxrobust.convert import certificate
from jaxrobust.convert.references import Network
from jaxrobust.models.published import IMAGENET_MEAN, IMAGENET_STD, PUBLISHED
from jaxrobust.runtime.commandline import Arguments, answer, mapping
from jaxrobust.weights import certificates, convert, download, files
from jaxrobust.weights import folder as weights_folder
from jaxrobust.weights import start as start_weights

Arrays = dict[str, np.ndarray]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

_NONE: Normalisation = ((0.0,), (1.0,))
_IMAGENET: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = Arguments(__doc__)
    source = "Source of the weights: a file, https://..., or hf://ORG/REPO[@REVISION][/FILE]."
    parser.add_argument("source", help=source)
    parser.flag(
        "model", required=True, help="Network: a name of models.available(), or a RobustBench id."
    )
    parser.flag("out", required=True, type=Path, help="Folder that is written.")
    parser.flag(
        "image_size",
        type=int,
        help="Side of the images in pixels, to which positions are resized; default: what the hub "
        "says, or 224.",
    )
    parser.flag(
        "num_classes",
        type=int,
        help="Number of classes; the head is drawn anew where the file's has another one.",
    )
    parser.flag("options", help="Other fields of the network's row, as a dict.")
    parser.flag("init_stem", action="store_true", help="Keep the body and draw the stem anew.")
    parser.flag(
        "which",
        choices=["ema", "raw"],
        default="ema",
        help="Averaged or raw weights, where a file holds both; default: %(default)s.",
    )
    parser.flag(
        "normalize",
        choices=["auto", "none", "imagenet"],
        default="auto",
        help="Normalisation of weights that hold no mean and std; default: auto, which is what the "
        "hub or RobustBench says.",
    )
    parser.flag("sha256", help="Hash that SOURCE must have.")
    parser.flag("cast", action="store_true", help="Round what is stored in other types to float32.")
    parser.flag("seed", type=int, default=0, help="Seed of what is drawn; default: %(default)s.")
    parser.flag("nocertificate", action="store_true", help="Compare with no reference network.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args(argv)


def read(path: Path, which: str, cast: bool) -> Arrays:
    """Return the arrays of a file; with `cast`, all floats in float32."""
    try:
        arrays = files.read(path, which=which)
    except ValueError as error:
        if not (cast and "bfloat16" in str(error)):  # NumPy has no such type
            raise
        arrays = _read_bfloat16(path, which)
    if not cast:
        return arrays
    if strange := [k for k, a in arrays.items() if a.dtype.kind == "c"]:
        raise ValueError(
            f"{path}: {strange[0]} is {arrays[strange[0]].dtype}, which has no float32"
        )
    return {k: a if a.dtype.kind in "iub" else np.asarray(a, np.float32) for k, a in arrays.items()}


def _read_bfloat16(path: Path, which: str) -> Arrays:
    if path.suffix == ".safetensors":
        from safetensors.flax import load_file

        return {k: np.asarray(a.astype(jnp.float32)) for k, a in load_file(path).items()}
    import torch

    tree = torch.load(path, map_location="cpu", weights_only=True)
    tensors = files.state_dict(tree, which, torch.is_tensor) or {}
    return {k: (t.float() if t.is_floating_point() else t).numpy() for k, t in tensors.items()}


def taken(path: Path, arrays: Arrays, args: argparse.Namespace) -> str | None:
    """Return "ema" or "raw" where a file holds both; None where it holds one set of weights."""
    if path.suffix == ".safetensors":
        return None
    other = read(path, "raw" if args.which == "ema" else "ema", args.cast)
    same = arrays.keys() == other.keys() and all(
        np.array_equal(arrays[key], other[key]) for key in arrays
    )
    return None if same else args.which


def published(model: str, path: Path) -> str | None:
    """Return the RobustBench id of a file: given as the model, or by the name of the file."""
    if model in PUBLISHED:
        return model
    for key, net in PUBLISHED.items():
        if path.name in (f"{key}.pt", Path(net.file).name) and net.model == model:
            return key
    return None


def hub_settings(path: Path | None) -> dict[str, Any]:
    """Return what timm's config.json says of the weights: classes, size, crop, mean and std."""
    if path is None:
        return {}
    try:
        whole = json.loads(path.read_text())
        return whole | (whole.get("pretrained_cfg") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from error


def preprocessing(settings: dict[str, Any], size: int) -> str | None:
    """Return timm's preprocessing to `size` px as an id of `evaluation_transform`."""
    how, share = settings.get("interpolation"), settings.get("crop_pct")
    if how not in ("bicubic", "bilinear") or not share:
        return None
    return f"{how}-{math.floor(size / share)}-crop-{size}"


def normalisation(
    args: argparse.Namespace, key: str | None, settings: dict[str, Any], found: convert.Names
) -> tuple[Normalisation | None, str]:
    """Return (mean and std, who says so); None: the weights or their names say it themselves."""
    if {"normalize.mean", "normalize.std"} & found.arrays.keys():
        if args.normalize != "auto":
            raise ValueError("the file holds its own mean and std; leave --normalize out")
        return None, "stored with the weights"
    if args.normalize != "auto":
        return {"none": _NONE, "imagenet": _IMAGENET}[args.normalize], "--normalize"
    if key:
        return (_IMAGENET if PUBLISHED[key].normalised else _NONE), f"RobustBench's {key}"
    if settings.get("mean") and settings.get("std") and not args.init_stem:
        return (tuple(settings["mean"]), tuple(settings["std"])), "the hub's config.json"
    if found.normalize != (0.0, 1.0):
        return None, "what files with these names assume"
    return None, "none is stored: raw [0, 1] images; --normalize imagenet says otherwise"


def _fetched(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the file of weights and the hub's config.json, if there is one."""
    if download.is_remote(args.source):
        path, beside = download.fetch(args.source, sha256=args.sha256)
        return path, beside
    if not Path(args.source).is_file():
        known = ", ".join(files.SUFFIXES)
        raise ValueError(f"{args.source}: no such file; give one of {known}, or a URL")
    return Path(args.source), None


def _check_numbers(args: argparse.Namespace) -> None:
    for flag in ("num_classes", "image_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag}={getattr(args, flag)} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed={args.seed} must be from 0 to 2^32 - 1")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Import, and return what was done."""
    weights_folder.check_free(args.out)
    name = PUBLISHED[args.model].model if args.model in PUBLISHED else models.known(args.model)
    path, beside = _fetched(args)
    source_sha256 = download.check_sha256(path, args.sha256)
    print(f"{path}: sha256 {source_sha256}")
    arrays = read(path, args.which, args.cast)
    key, settings = published(args.model, path), hub_settings(beside)

    given = mapping("options", args.options)
    options = certificates.options(name, given, weights_folder.network(path), path)
    found = convert.names(name, arrays, **options)
    _check_numbers(args)
    classes = args.num_classes or settings.get("num_classes") or 1000
    width = start_weights.head_width(name, found)
    if width not in (None, classes) and args.num_classes is None:
        raise ValueError(
            f"{path}: its head has {width} classes, not {classes}; --num-classes {width} keeps it, "
            "another number draws a new one"
        )
    head = "keep" if width == classes or args.num_classes is None else "fresh"
    size = args.image_size or (settings.get("input_size") or [224])[-1]
    stem_channels = None if args.init_stem else convert.in_channels(name, found)
    mean = found.arrays.get("normalize.mean")
    channels = stem_channels or (3 if mean is None else mean.size)
    values, said = normalisation(args, key, settings, found)
    try:
        start = start_weights.compose(
            name,
            models.create(
                name, num_classes=classes, image_size=size, in_channels=channels, **options
            ),
            arrays,
            stem="fresh" if args.init_stem else "keep",
            head=head,
            normalize=values,
            seed=args.seed,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    which = taken(path, arrays, args)
    as_published = key if size == 224 and not start.fresh and not options else None
    config = {
        "architecture": name,
        "options": options,
        "num_classes": classes,
        "image_size": size,
        "in_channels": channels,
        "preprocessing": (
            PUBLISHED[as_published].preprocessing if as_published else preprocessing(settings, size)
        ),
        "norm": "linf" if as_published else None,
        "epsilon": 4 / 255 if as_published else None,
        "accuracies": None,
        "published_id": as_published,
        "source": args.source if download.is_remote(args.source) else path.name,
        "source_sha256": source_sha256,
        "which": which,
        "drawn": {"seed": args.seed, "names": start.fresh} if start.fresh else None,
    }
    certified = None
    if not args.nocertificate:
        network = Network(name, start.params, start.stats, classes, size, options)
        layout = key if key and not options else "timm"
        certified = certificate.of_import(network, path, layout, args.which)
    config = weights_folder.write(args.out, start.params, start.stats, config)
    if certified:
        certificate.write(args.out / weights_folder.WEIGHTS, certified)
    print(f"{args.out}: {name}, {classes} classes, {size} px, sha256 {config['sha256']}")
    for line in start_weights.summary(start):
        print(f"  {line}")
    if which:
        print(f"  of averaged and raw weights, the {'averaged' if which == 'ema' else 'raw'} ones")
    mean, std = (start.stats[f"normalize.{k}"].tolist() for k in ("mean", "std"))
    shown = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    print("  normalisation: mean {}, std {} ({})".format(*shown, said))
    if certified:
        print(f"  certificate: {certificates.summary(certified)}")
    return config | {
        "out": str(args.out),
        "matched": len(start.matched),
        "fresh": len(start.fresh),
        "left_out": start.dropped,
        "resized": start.resized,
        "normalize": {"mean": mean, "std": std, "origin": said},
        "certificate": certified and certificates.summary(certified),
    }


def main(argv: list[str] | None = None) -> None:
    """Import as the command line says."""
    args = parse(argv)
    answer(run, args, "the same command continues an unfinished download")


if __name__ == "__main__":
    main(sys.argv[1:])
