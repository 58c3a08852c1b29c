"""Import weights: `python -m jaxrobust.convert.import_torch SOURCE [--model NAME] --out DIR`.

SOURCE is a file (.safetensors, .pth, .pt, ...), a URL, hf://ORG/REPO[@REVISION][/FILE], a
RobustBench id (Salman2020Do_R18), a timm id (convnext_tiny.fb_in1k), the workdir of a run, or a
folder as the hub has it. DIR gets `weights.safetensors` with our names and `config.json`;
training takes it as `--config.init.weights=DIR`, evaluation as `--weights DIR`. The certificate
beside them says how well they agree with the reference network (jaxrobust.convert.certificate).

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason that it names, such
as no network; nothing is left under DIR then.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxrobust.runtime.text import patience

if __name__ == "__main__":  # before the imports below, which take seconds
    patience.begin(patience.LOADING)

from jaxrobust.convert import certificate
from jaxrobust.runtime.commandline.arguments import Arguments, answer, mapping
from jaxrobust.weights import imports
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming import compose
from jaxrobust.weights.naming.networks import Request
from jaxrobust.weights.store import certificates, files
from jaxrobust.weights.store import folder as weights_folder
from jaxrobust.weights.store.artifact import Network


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = Arguments(__doc__)
    parser.add_argument("source", help=f"Source of the weights: {sources.KINDS}.")
    parser.flag(
        "model",
        help="Network: a name of models.available(), or a RobustBench id; default: what the source "
        "says.",
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
        choices=[*files.WHICH],
        help="Averaged or raw weights, of a file that says which its weights are; default: the "
        "averaged ones where it says so, else those that there are.",
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


def _check_numbers(args: argparse.Namespace) -> None:
    for flag in ("num_classes", "image_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag}={getattr(args, flag)} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed={args.seed} must be from 0 to 2^32 - 1")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Import, and return what was done."""
    weights_folder.check_free(args.out)
    _check_numbers(args)
    imports.check_model(args.model)
    request = Request(
        model=args.model,
        num_classes=args.num_classes,
        image_size=args.image_size,
        options=mapping("options", args.options),
        init_stem=args.init_stem,
        which=args.which,
        normalize=args.normalize,
        cast=args.cast,
        seed=args.seed,
    )
    with patience.of(f"reading {args.source}"):
        source = sources.fetch(sources.parse(args.source), sha256=args.sha256)
        network = imports.imported(source, request)
    config, facts, certified = imports.described(network), network.facts, None
    if facts.file:
        print(f"{facts.file}: sha256 {config['source_sha256']}")
    if facts.file and not args.nocertificate:
        layout = facts.published if facts.published and not network.options else "timm"
        with patience.of("comparing the weights with their reference, which compiles both"):
            certified = certificate.of_import(network, facts.file, layout, args.which)
    config = weights_folder.write(args.out, network.params, network.stats, config)
    if certified:
        certificate.write(args.out / weights_folder.WEIGHTS, certified)
    mean, std = (network.stats[f"normalize.{k}"].tolist() for k in ("mean", "std"))
    done = config | {
        "out": str(args.out),
        "matched": len(network.matched),
        "fresh": len(network.fresh),
        "left_out": network.dropped,
        "resized": network.resized,
        "normalize": {"mean": mean, "std": std, "origin": network.normalized_by},
        "certificate": certified and certificates.summary(certified),
    }
    _print(args, network, done)
    return done


def _print(args: argparse.Namespace, network: Network, done: dict[str, Any]) -> None:
    """Say what was done, for people."""
    what = f"{done['architecture']}, {done['num_classes']} classes, {done['image_size']} px"
    print(f"{args.out}: {what}, sha256 {done['sha256']}")
    for line in compose.summary(network):
        print(f"  {line}")
    if done["which"] and network.facts.place:
        print(
            f"  the {files.WHICH[done['which']]} weights, which are under {network.facts.place!r}"
        )
    moments = (done["normalize"][key] for key in ("mean", "std"))
    shown = (" ".join(f"{value:.4g}" for value in values) for values in moments)
    print("  normalisation: mean {}, std {} ({})".format(*shown, done["normalize"]["origin"]))
    if done["certificate"]:
        print(f"  certificate: {done['certificate']}")


def main(argv: list[str] | None = None) -> None:
    """Import as the command line says."""
    args = parse(argv)
    answer(run, args, "the same command continues an unfinished download")


if __name__ == "__main__":
    main(sys.argv[1:])
