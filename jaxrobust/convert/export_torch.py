"""Export of weights: `python -m jaxrobust.convert.export_torch --workdir RUN --layout L --out DIR`.

--weights PATH takes imported or other weights instead of a run's. L is one of
  jaxrobust  DIR/weights.safetensors and config.json, as an import writes them: for init.weights,
          --weights and jaxrobust.load;
  timm    DIR/<model>.safetensors with timm's names (of a ConvStem: those of the paper's files);
  hub     a repository of the model hub: model.safetensors, timm's config.json and README.md, the
          model card; of networks that timm does not have, the module beside them;
  module  DIR/<model>.py and .pt: the network for PyTorch alone, with any options, normalisation
          and number of classes; `from <model> import load`;
  an id of RobustBench: its file at the place where `load_model(id, model_dir=DIR)` looks; it
          normalises images or takes them raw (of Singh2023's, ViT-S alone normalises), and the
          weights have to do the same.
With --record FILE, also RobustBench's JSON entry and the text of its "New Model" issue.
A certificate beside the weights says how well the file agrees with the network; a file that
computes something else is not written.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason that it names, such
as a full disk. Then nothing is left under DIR.
"""

import argparse
import contextlib
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.runtime.text import patience

if __name__ == "__main__":  # before the imports below, which take seconds
    patience.begin(patience.LOADING)

import jax
import numpy as np
from absl import logging

from jaxrobust import models
from jaxrobust.config import network_of
from jaxrobust.convert import (
    account,
    certificate,
    confirm,
    layouts,
    references,
    robustbench_entry,
)
from jaxrobust.convert.account import Account
from jaxrobust.convert.references import Network
from jaxrobust.models.published import PUBLISHED
from jaxrobust.runtime.commandline.arguments import Arguments, answer, mapping
from jaxrobust.runtime.devices import compilation, sharding
from jaxrobust.runtime.files import jsonl
from jaxrobust.training.update import optim
from jaxrobust.training.update.step import averaged, init_state
from jaxrobust.weights import imports, load, reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.fetch.sources import WeightSource
from jaxrobust.weights.store import certificates
from jaxrobust.weights.store.checkpoint import Checkpoints, abstract_state
from jaxrobust.weights.store.hashes import file_sha256
from jaxrobust.weights.trained import kept, runs


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = Arguments(__doc__)
    parser.flag("workdir", type=Path, help="Run whose best weights are exported.")
    parser.flag("phase", help="Phase of the run; default: the last one that has weights.")
    parser.flag("weights", help=f"Weights instead of a run's best: {sources.KINDS}.")
    parser.flag("model", help="Network of a file of weights: a name of models.available().")
    parser.flag(
        "image_size", type=int, help="Side of the images in pixels, of a file; default: 224."
    )
    parser.flag("options", help="Other fields of the row of --model, where the file says none.")
    parser.flag(
        "which",
        choices=["ema", "raw"],
        help="Averaged or raw weights; default: those that the run evaluates.",
    )
    parser.flag(
        "selected",
        action="store_true",
        help="The weights that jaxrobust select chose, instead of the run's best.",
    )
    parser.flag(
        "layout", required=True, help="Layout: jaxrobust, timm, hub, module, or a RobustBench id."
    )
    parser.flag("out", required=True, type=Path, help="Folder that is written.")
    parser.flag(
        "record",
        type=Path,
        help="Records of evaluations, results.jsonl, for the model card, the docstring or "
        "config.json, and with --id for RobustBench's entry.",
    )
    parser.flag("evaluation", help="Id of the record; default: the last one of these weights.")
    parser.flag("id", help="Id of the entry of a new network; default: that of the layout.")
    parser.flag(
        "confirm",
        type=int,
        metavar="N",
        help="Number of images, the first ones, that pyautoattack attacks in PyTorch too; the "
        "issue says whether its verdicts are the record's.",
    )
    parser.flag("data_dir", help="Folder of data sets, for --confirm; default: $TFDS_DATA_DIR.")
    parser.flag("license", help="Licence of the weights for the model card, such as mit.")
    parser.flag("nocertificate", action="store_true", help="Compare with no reference network.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """Refuse what says nothing, before anything is read."""
    if (args.workdir is None) == (args.weights is None):
        raise ValueError("give --workdir RUN or --weights PATH, one of them")
    if args.workdir:
        known = ("model", "image_size", "options")
        if extra := [k for k in known if getattr(args, k) is not None]:
            raise ValueError(f"--{extra[0]} belongs to --weights; a run knows its own")
    elif args.phase:
        raise ValueError("--phase is one of a --workdir; --weights has but one")
    _check_selected(args)
    layouts.known(args.layout, args.out)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    if args.license and args.layout != "hub":
        raise ValueError("--license stands in the model card; it belongs to --layout hub")
    _check_entry(args)
    if args.record and not args.record.is_file():
        raise ValueError(f"--record {args.record}: no such file; evaluations write results.jsonl")


def _check_selected(args: argparse.Namespace) -> None:
    """Refuse what names other weights than the chosen ones."""
    named = [key for key in ("weights", "phase", "which") if getattr(args, key) is not None]
    if args.selected and named:
        raise ValueError(f"--selected names the weights of a --workdir; leave --{named[0]} out")


def _check_entry(args: argparse.Namespace) -> None:
    """Refuse flags of RobustBench's entry that belong to another one."""
    if not args.record:
        if extra := [k for k in ("evaluation", "id", "confirm") if getattr(args, k) is not None]:
            raise ValueError(f"--{extra[0]} belongs to --record FILE")
        return
    if not _entry_id(args):
        if args.layout not in ("jaxrobust", "hub", "module") or args.confirm is not None:
            raise ValueError(
                "--record needs --id, the new network's name, as Singh2023Revisiting_ViT-S-ConvStem"
            )
        return
    robustbench_entry.check_id(_entry_id(args))
    if args.layout == "jaxrobust":
        raise ValueError(
            "--id is of an entry of RobustBench, which reads PyTorch's files; choose "
            "--layout module"
        )
    if args.confirm is None:
        return
    if args.confirm < 1:
        raise ValueError(f"--confirm={args.confirm} must be at least 1")
    if args.layout != "module" and args.layout not in PUBLISHED:
        raise ValueError("--confirm attacks a network in PyTorch; choose --layout module")


def _entry_id(args: argparse.Namespace) -> str:
    """Return the RobustBench id of the entry that is asked for; empty: none is."""
    own = args.layout if args.layout in PUBLISHED else ""
    return (args.id or own) if args.record else ""


class Subject(NamedTuple):
    """What is exported."""

    network: Network
    which: str  # the weights, in words
    file: Path | None  # that they are from, if it is one
    account: Account
    sha256: str  # of the weights, as records have it


def read(args: argparse.Namespace) -> Subject:
    """Return the network and what is known of it.

    Raises:
      ValueError: there are no such weights.
    """
    workdir = args.workdir
    if args.weights:
        named = sources.parse(args.weights)
        here = imports.local(named, model=args.model, which=args.which, tell=print)
        if here.kind != "run":
            return _of_weights(args, here)
        workdir = here.path
    chosen = kept.selected(workdir) if args.selected else None
    network, which = of_run(workdir, args.phase, args.which, chosen)
    sha256 = network.weights_sha256
    known = account.of_run(workdir, which, sha256, image_size=network.image_size)
    return Subject(network, which, None, _known(args, known, sha256), sha256)


def _of_weights(args: argparse.Namespace, here: WeightSource) -> Subject:
    name = None if args.model in PUBLISHED else args.model
    artifact = reading.artifact_of(here, which=args.which)
    options = mapping("options", args.options)
    network = load.fitted(artifact, name, image_size=args.image_size, options=options)
    which = artifact.facts.which
    words = Path(args.weights).name + (f", {which}" if which else "")
    sha256 = network.weights_sha256
    known = account.of_weights(network, words)
    return Subject(network, words, here.file, _known(args, known, sha256), sha256)


def _known(args: argparse.Namespace, known: Account, sha256: str) -> Account:
    rows = jsonl.read(args.record) if args.record else []
    of_these = any(row.get("weights_sha256") == sha256 for row in rows)
    if args.record and args.layout == "jaxrobust" and not of_these:
        raise ValueError(
            f"--record {args.record} has no record of these weights (weights_sha256 "
            f"{sha256[:12]}...); name the results.jsonl of an evaluation of exactly them"
        )
    return account.with_records(known, args.record, sha256)._replace(license=args.license)


def of_run(
    workdir: Path, phase: str | None, which: str | None, chosen: kept.Choice | None = None
) -> tuple[Network, str]:
    """Return the network of a run, and its weights in words: the best ones, or those chosen.

    The best checkpoint holds what the run evaluates; the other kind is in the latest one only.
    """
    config = runs.run_config(workdir, chosen.phase if chosen else phase)
    models.known(config.model.name)  # of a user's function nobody knows the PyTorch side
    if chosen:
        said, (params, stats) = kept.selected_weights(workdir, chosen)
    elif which in (None, config.evaluation.weights):
        said, (params, stats) = runs.run_weights(workdir, phase)
    else:
        assert which is not None
        said, (params, stats) = _latest(config, workdir, phase, which)
    model = config.model
    network = Network(
        model.name,
        {k: np.asarray(v) for k, v in params.items()},
        {k: np.asarray(v) for k, v in stats.items()},
        model.num_classes,
        chosen.image_size if chosen else model.image_size,
        dict(model.options),
    )
    return network, said


def _latest(config, workdir: Path, phase: str | None, which: str):
    phases = [phase] if phase else list(reversed(config.phases))
    done = [p for p in phases if list((workdir / p / "latest").glob("[0-9]*"))]
    if not done:
        raise ValueError(f"{workdir} has no checkpoint of {' or '.join(phases)}; train first")
    # Of the optimiser, only the shapes of its state matter here.
    mask = models.decay_mask(config.model.name)
    tx = optim.adamw(lambda step: 0.0, weight_decay=0.0, decay_mask=mask)
    init = partial(init_state, network_of(config), tx)
    shapes = jax.eval_shape(init, jax.random.key(0))
    abstract = abstract_state(shapes, sharding.replicated(sharding.make_mesh()))
    with contextlib.closing(Checkpoints(workdir / done[0] / "latest", read_only=True)) as latest:
        step = latest.latest_step()
        assert step is not None
        state = latest.restore(step, abstract)
    weights = averaged(state) if which == "ema" else (state.params, state.stats)
    return f"{done[0]}, step {step}, {which}, latest checkpoint", weights


def _measured(
    args: argparse.Namespace, network: Network, given: Path | None, file: Path
) -> dict[str, Any] | None:
    """Return the certificate of a staged file, written beside its weights; None: no comparison is
    asked for, or there is nothing to compare, as our own folder has the very arrays.

    Raises:
      certificate.Differs: the file computes something else.
    """
    if args.nocertificate or args.layout == "jaxrobust":
        return None
    weights = layouts.weights_of(file)
    compared = {"theirs": weights} | ({"ours": given} if given else {})
    reference = references.reference(network, file, args.layout)
    found = certificate.certify(network, reference, compared=compared)
    certificate.checked(found, weights.name)
    certificate.write(weights, found)
    return found


def publish(staged: Path, out: Path) -> None:
    """Move all staged files to their places, or none of them.

    Raises:
      ValueError: another file is at the place of one; the same content may be there.
    """
    files = [p.relative_to(staged) for p in sorted(staged.rglob("*")) if p.is_file()]
    for file in files:
        derived = file.name.endswith(".certificate.json")  # names its commit and versions
        at = out / file
        if at.exists() and not derived and file_sha256(at) != file_sha256(staged / file):
            raise ValueError(f"{at} exists and is another file; name a new --out")
    new = [file for file in files if not (out / file).exists()]
    try:
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / file, out / file)
    except OSError:
        for file in new:
            (out / file).unlink(missing_ok=True)
        raise


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export, and return what was written."""
    _check(args)
    with patience.of("reading the weights"):
        subject, name = read(args), _entry_id(args)
    network = subject.network
    record = robustbench_entry.find(args.record, subject.sha256, args.evaluation) if name else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    staged = args.out.with_name(f"{args.out.name}.part-{os.getpid()}")
    staged.mkdir()
    confirmed = None
    try:
        file = layouts.stage(staged, network, subject.account, args.layout)
        with patience.of(f"comparing {file.name} with the network, which compiles both"):
            found = _measured(args, network, subject.file, file)
        if record:
            if args.confirm:
                confirmed = _confirmed(args, subject, record, file)
            weights = layouts.weights_of(file)
            entry = robustbench_entry.files(
                name, record, weights.name, file_sha256(weights), confirmed
            )
            for path, text in entry.items():
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                (staged / path).write_text(text)
        written = [p for p in sorted(staged.rglob("*")) if p.is_file()]
        digests = {str(p.relative_to(staged)): file_sha256(p) for p in written}
        publish(staged, args.out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    done = {
        "model": network.name,
        "weights": subject.which,
        "weights_sha256": subject.sha256,
        "layout": args.layout,
        "out": str(args.out),
        "files": digests,
        "certificate": found and certificates.summary(found),
        "confirmed": confirmed,
        "usage": layouts.usage(network, args.layout, args.out),
        "by_hand": robustbench_entry.unknown(record) if record else [],
    }
    _print(args, done, network.num_classes)
    return done


def _confirmed(args: argparse.Namespace, subject: Subject, record: dict[str, Any], file: Path):
    """Return what pyautoattack says of the file's network."""
    reference = references.reference(subject.network, file, args.layout)
    if reference is None:
        raise ValueError(f"--confirm needs PyTorch: {references.INSTALL}")
    ledger = robustbench_entry.ledger_of(args.record, record)
    return confirm.verdicts(reference.net, record, ledger, args.confirm, data_dir=args.data_dir)


def _print(args: argparse.Namespace, done: dict[str, Any], classes: int) -> None:
    """Say what was written, for people."""
    sha256 = done["weights_sha256"]
    print(f"{done['model']} ({done['weights']}), {classes} classes, weights sha256 {sha256}")
    for name, value in done["files"].items():
        print(f"  {args.out / name}: sha256 {value}")
    for key, said in (("certificate", "certificate: "), ("confirmed", ""), ("usage", "")):
        if done[key]:
            print(f"  {said}{done[key]}")
    if done["by_hand"]:
        print(f"  to be filled in by hand: {', '.join(done['by_hand'])}, and the issue's marks")


def main(argv: list[str] | None = None) -> None:
    """Export as the command line says."""
    args = parse(argv)
    logging.set_verbosity(logging.FATAL)  # Orbax logs 30 lines a checkpoint
    compilation.use_persistent_cache()
    answer(run, args, "nothing is written")


if __name__ == "__main__":
    main(sys.argv[1:])
