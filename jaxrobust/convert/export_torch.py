"""Export to PyTorch: `python -m jaxrobust.convert.export_torch --workdir RUN --layout L --out DIR`.

--weights PATH takes imported or other weights instead of a run's. L is one of
  timm    DIR/<model>.safetensors with timm's names (of a ConvStem: those of the paper's files);
  module  DIR/<model>.py and .pt: the network for PyTorch alone, with any options, normalisation
          and number of classes; `from <model> import load`;
  an id of RobustBench: its file at the place where `load_model(id, model_dir=DIR)` looks.
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
from typing import Any

import jax
import numpy as np
from absl import logging

from jaxrobust import models
from jaxrobust.config import PHASES, network_of
from jaxrobust.convert import certificate, layouts, references, robustbench_entry
from jaxrobust.convert.references import Network
from jaxrobust.models.published import PUBLISHED
from jaxrobust.runtime import compilation, sharding
from jaxrobust.runtime.commandline import Arguments, answer, mapping
from jaxrobust.training import optim
from jaxrobust.training.step import averaged, init_state
from jaxrobust.weights import certificates, hashes, loading, runs
from jaxrobust.weights import folder as weights_folder
from jaxrobust.weights.checkpoint import Checkpoints, abstract_state
from jaxrobust.weights.hashes import file_sha256


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = Arguments(__doc__)
    parser.flag("workdir", type=Path, help="Run whose best weights are exported.")
    parser.flag(
        "phase", choices=PHASES, help="Phase of the run; default: the last one that has weights."
    )
    parser.flag(
        "weights", type=Path, help="Weights instead of a run: a file or an imported folder."
    )
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
    parser.flag("layout", required=True, help="Layout: timm, module, or a RobustBench id.")
    parser.flag("out", required=True, type=Path, help="Folder that is written.")
    parser.flag(
        "record",
        type=Path,
        help="Records of evaluations, results.jsonl, of which RobustBench's entry is made.",
    )
    parser.flag("evaluation", help="Id of the record; default: the last one of these weights.")
    parser.flag("id", help="Id of the entry of a new network; default: that of the layout.")
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
    elif args.which and (args.weights.is_dir() or args.weights.suffix == ".safetensors"):
        raise ValueError(f"{args.weights} holds one set of weights; leave --which out")
    layouts.known(args.layout, args.out)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    if not args.record:
        if extra := [k for k in ("evaluation", "id") if getattr(args, k) is not None]:
            raise ValueError(f"--{extra[0]} belongs to --record FILE")
        return
    if args.id is None and args.layout not in PUBLISHED:
        raise ValueError(
            "--record needs --id, the new network's name, as Singh2023Revisiting_ViT-S-ConvStem"
        )
    robustbench_entry.check_id(args.id or args.layout)


def read(args: argparse.Namespace) -> tuple[Network, str, Path | None]:
    """Return the network, its weights in words, and the file that they are from if it is one."""
    if args.workdir:
        return *of_run(args.workdir, args.phase, args.which), None
    which, options = args.which or "ema", mapping("options", args.options)
    network = loading.read(
        args.weights, args.model, image_size=args.image_size, which=which, options=options
    )
    said = args.weights.name + (f", {args.which}" if args.which else "")
    file = args.weights / weights_folder.WEIGHTS if args.weights.is_dir() else args.weights
    return network, said, file


def of_run(workdir: Path, phase: str | None, which: str | None) -> tuple[Network, str]:
    """Return the network of a run, and its weights in words.

    The best checkpoint holds what the run evaluates; the other kind is in the latest one only.
    """
    config = runs.run_config(workdir)
    if which in (None, config.evaluation.weights):
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
        model.image_size,
        dict(model.options),
    )
    return network, said


def _latest(config, workdir: Path, phase: str | None, which: str):
    phases = [phase] if phase else list(reversed(PHASES))
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


def _measured(network: Network, given: Path | None, file: Path, layout: str) -> dict[str, Any]:
    """Return the certificate of a staged file, written beside its weights.

    Raises:
      certificate.Differs: the file computes something else.
    """
    weights = layouts.weights_of(file)
    compared = {"theirs": weights} | ({"ours": given} if given else {})
    reference = references.reference(network, file, layout)
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
    network, which, given = read(args)
    sha256 = hashes.weights_sha256(network.params, network.stats)
    record = robustbench_entry.find(args.record, sha256, args.evaluation) if args.record else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    staged = args.out.with_name(f"{args.out.name}.part-{os.getpid()}")
    staged.mkdir()
    try:
        file = layouts.stage(staged, network, which, args.layout)
        found = None if args.nocertificate else _measured(network, given, file, args.layout)
        if record:
            weights = layouts.weights_of(file)
            texts = robustbench_entry.files(
                args.id or args.layout, record, weights.name, file_sha256(weights)
            )
            for name, text in texts.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).write_text(text)
        written = [p for p in sorted(staged.rglob("*")) if p.is_file()]
        digests = {str(p.relative_to(staged)): file_sha256(p) for p in written}
        publish(staged, args.out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    done = {
        "model": network.name,
        "weights": which,
        "weights_sha256": sha256,
        "layout": args.layout,
        "out": str(args.out),
        "files": digests,
        "certificate": found and certificates.summary(found),
        "usage": layouts.usage(network, args.layout, args.out),
        "by_hand": robustbench_entry.unknown(record) if record else [],
    }
    print(f"{network.name} ({which}), {network.num_classes} classes, weights sha256 {sha256}")
    for name, value in digests.items():
        print(f"  {args.out / name}: sha256 {value}")
    for key, said in (("certificate", "certificate: "), ("usage", "")):
        if done[key]:
            print(f"  {said}{done[key]}")
    if done["by_hand"]:
        print(f"  to be filled in by hand: {', '.join(done['by_hand'])}, and the issue's marks")
    return done


def main(argv: list[str] | None = None) -> None:
    """Export as the command line says."""
    args = parse(argv)
    logging.set_verbosity(logging.FATAL)  # Orbax logs 30 lines a checkpoint
    compilation.use_persistent_cache()
    answer(run, args, "nothing is written")


if __name__ == "__main__":
    main(sys.argv[1:])
