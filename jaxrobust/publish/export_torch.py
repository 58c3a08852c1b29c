"""Weights as files for this package, for PyTorch, for the model hub and for RobustBench."""

import os
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.config import network_of
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.models.published import PUBLISHED, own_id
from jaxrobust.publish import (
    certificate,
    confirm,
    layouts,
    network_account,
    references,
    robustbench_entry,
)
from jaxrobust.publish.network_account import Account
from jaxrobust.publish.references import Network
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.files import folders, jsonl
from jaxrobust.runtime.text import patience
from jaxrobust.training.update import optim
from jaxrobust.training.update.memory import remembering
from jaxrobust.training.update.step import averaged, init_state
from jaxrobust.weights import imports, load, reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.store import certificates
from jaxrobust.weights.store.hashes import file_sha256
from jaxrobust.weights.trained import kept, runs


class ExportSettings(NamedTuple):
    """The weights to export, and the format."""

    layout: str  # one of `layouts.LAYOUTS`, or a RobustBench id
    out: Path
    workdir: Path | None = None
    phase: str | None = None
    weights: str | None = None  # instead of a run
    model: str | None = None  # for a weight file, as the next two
    image_size: int | None = None
    options: dict[str, Any] | None = None
    which: str | None = None  # ema or raw; None: what the run evaluates
    selected: bool = False  # the weights that a selection chose
    record: Path | None = None  # results.jsonl
    evaluation: str | None = None  # id of the record; None: the last record of these weights
    id: str | None = None  # of a new network's entry
    confirm: int | None = None  # the number of images that pyautoattack also attacks
    data_dir: str | None = None
    license: str | None = None
    nocertificate: bool = False


def _check(settings: ExportSettings) -> None:
    if (settings.workdir is None) == (settings.weights is None):
        raise ValueError("give either --workdir RUN or --weights PATH")
    if settings.workdir:
        weights_keys = ("model", "image_size", "options")
        if extra := [k for k in weights_keys if getattr(settings, k) is not None]:
            raise ValueError(f"--{extra[0]} is only for --weights; leave it out")
    elif settings.phase:
        raise ValueError("--phase needs a --workdir, because --weights has only one phase")
    flags = [key for key in ("weights", "phase", "which") if getattr(settings, key) is not None]
    if settings.selected and flags:
        raise ValueError(f"--selected chooses weights of the --workdir; leave --{flags[0]} out")
    layouts.known(settings.layout, settings.out)
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"--out {settings.out} is a file; name a folder")
    if settings.license and settings.layout != "hub":
        raise ValueError("--license is for the model card; leave it out, or use --layout hub")
    _check_entry(settings)
    if settings.record and not settings.record.is_file():
        raise ValueError(
            f"--record {settings.record}: no such file; evaluations write results.jsonl"
        )


def _check_entry(settings: ExportSettings) -> None:
    if not settings.record:
        if extra := [
            k for k in ("evaluation", "id", "confirm") if getattr(settings, k) is not None
        ]:
            raise ValueError(f"--{extra[0]} needs --record FILE")
        return
    if not _entry_id(settings):
        if (
            settings.layout not in ("jaxrobust", "hub", "module", "robustbench")
            or settings.confirm is not None
        ):
            raise ValueError(
                "--record needs --id, a RobustBench id such as Singh2023Revisiting_ViT-S-ConvStem"
            )
        return
    robustbench_entry.check_id(_entry_id(settings))
    if settings.layout == "jaxrobust":
        raise ValueError(
            "--id is for a RobustBench entry, which needs PyTorch files; choose --layout module"
        )
    if settings.confirm is None:
        return
    if settings.confirm < 1:
        raise ValueError(f"--confirm={settings.confirm} must be at least 1")
    if settings.layout not in ("module", "robustbench", *PUBLISHED):
        raise ValueError("--confirm attacks a network in PyTorch; choose --layout module")


def _entry_id(settings: ExportSettings) -> str:
    model_id = own_id(settings.layout) if settings.layout in PUBLISHED else ""
    return (settings.id or model_id) if settings.record else ""


class ExportedNetwork(NamedTuple):
    """What is exported."""

    network: Network
    which: str  # a name of the weights, for people
    file: Path | None  # the file of the weights, if they are one
    account: Account
    sha256: str  # of the weights, as in records


def read(settings: ExportSettings) -> ExportedNetwork:
    """Read the network and the facts about it; `ValueError`: there are no such weights."""
    workdir = settings.workdir or Path()
    if settings.weights:
        source = sources.parse(settings.weights)
        here = imports.local(source, model=settings.model, weights_kind=settings.which, tell=print)
        if here.kind != "run":
            name = None if settings.model in PUBLISHED else settings.model
            artifact = reading.artifact_of(here, weights_kind=settings.which)
            sizes: Any = {"image_size": settings.image_size, "options": settings.options}
            network = load.fitted(artifact, name, **sizes)
            kind = artifact.facts.which
            words = Path(settings.weights).name + (f", {kind}" if kind else "")
            sha256 = network.weights_sha256
            account = _known(settings, network_account.of_weights(network, words), sha256)
            return ExportedNetwork(network, words, here.file, account, sha256)
        workdir = here.path or workdir
    chosen = kept.selected(workdir) if settings.selected else None
    any_function = settings.layout == "module"
    network, weights_name = of_run(
        workdir, settings.phase, settings.which, chosen, any_function=any_function
    )
    sha256 = network.weights_sha256
    account = network_account.of_run(
        *(workdir, weights_name, sha256),
        image_size=network.image_size,
        chosen=kept.chosen_on(workdir) if chosen else None,
    )
    return ExportedNetwork(network, weights_name, None, _known(settings, account, sha256), sha256)


def _known(settings: ExportSettings, account: Account, sha256: str) -> Account:
    rows = jsonl.read(settings.record) if settings.record else []
    of_these = any(row.get("weights_sha256") == sha256 for row in rows)
    if settings.record and settings.layout == "jaxrobust" and not of_these:
        raise ValueError(
            f"--record {settings.record} has no record of these weights (weights_sha256 "
            f"{sha256[:12]}...); name the results.jsonl of an evaluation of exactly these weights"
        )
    return network_account.with_records(account, settings.record, sha256)._replace(
        license=settings.license or account.license
    )


def of_run(
    workdir: Path,
    phase: str | None,
    weights_kind: str | None,
    chosen: kept.ChosenWeights | None = None,
    *,
    any_function: bool = False,
) -> tuple[Network, str]:
    """Read the network of a run with its best weights, or those chosen, and their name."""
    config = runs.run_config(workdir, chosen.phase if chosen else phase)
    if not pytorch.is_name(config.model.name) and not any_function:
        models.known(config.model.name)  # of a user's function nobody knows the PyTorch side
    if chosen:
        name, (params, stats) = kept.selected_weights(workdir, chosen)
    elif weights_kind in (None, config.evaluation.weights):
        name, (params, stats) = runs.run_weights(workdir, phase)
    else:
        assert weights_kind is not None
        name, (params, stats) = _latest(config, workdir, phase, weights_kind)
    model, options = config.model, dict(config.model.options)
    if functions.is_name(model.name):
        options["in_channels"] = model.in_channels
    network = Network(
        model.name,
        {k: np.asarray(v) for k, v in params.items()},
        {k: np.asarray(v) for k, v in stats.items()},
        model.num_classes,
        chosen.image_size if chosen else model.image_size,
        options,
    )
    return network, name


def _latest(config, workdir: Path, phase: str | None, weights_kind: str):
    phases = [phase] if phase else list(reversed(config.phases))
    done = [p for p in phases if list((workdir / p / "latest").glob("[0-9]*"))]
    if not done:
        raise ValueError(f"{workdir} has no checkpoint for {' or '.join(phases)}; train first")
    # Of the optimizer, only the shapes of its state matter here.
    mask = models.decay_mask(config.model.name)
    tx = optim.adamw(lambda step: 0.0, weight_decay=0.0, decay_mask=mask)
    init = partial(init_state, network_of(config), remembering(tx))
    shapes = jax.eval_shape(init, jax.random.key(0))
    from jaxrobust.weights.store import checkpoint  # Orbax

    step, state, _ = checkpoint.read(workdir / done[0] / "latest", shapes)
    weights = averaged(state) if weights_kind == "ema" else (state.params, state.stats)
    return f"{done[0]}, step {step}, {weights_kind}, latest checkpoint", weights


def _measured(
    settings: ExportSettings, network: Network, origin: Path | None, file: Path
) -> dict[str, Any] | None:
    if settings.nocertificate or settings.layout == "jaxrobust":
        return None
    weights = layouts.weights_of(file)
    compared = {"theirs": weights} | ({"ours": origin} if origin else {})
    reference = references.reference(network, file, settings.layout)
    certified = certificate.certify(network, reference, compared=compared)
    certificate.checked(certified, weights.name)
    certificate.write(weights, certified)
    return certified


def publish(staged: Path, out: Path) -> None:
    """Move all staged files to their places, or none: another file at one raises `ValueError`."""
    files = [p.relative_to(staged) for p in sorted(staged.rglob("*")) if p.is_file()]
    for file in files:
        derived = file.name.endswith(".certificate.json")  # names its commit and versions
        at = out / file
        if at.exists() and not derived and file_sha256(at) != file_sha256(staged / file):
            raise ValueError(f"{at} exists with different content; name a new --out")
    new = [file for file in files if not (out / file).exists()]
    try:
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / file, out / file)
    except OSError:
        for file in new:
            (out / file).unlink(missing_ok=True)
        raise


def export(settings: ExportSettings) -> dict[str, Any]:
    """Export, and tell what was written; after an error no files remain.

    On several hosts all read the weights, and the first writes; the others return nothing.
    """
    _check(settings)
    with patience.of("reading the weights", here=jax.process_index() == 0):
        subject, name = read(settings), _entry_id(settings)
    if jax.process_index():
        return {}
    network = subject.network
    record = None
    if settings.record and name:
        record = robustbench_entry.find(settings.record, subject.sha256, settings.evaluation)
    staged = settings.out.with_name(f"{settings.out.name}.part-{os.getpid()}")
    with folders.writing("out", settings.out):
        staged.mkdir(parents=True)
    confirmed = None
    try:
        file = layouts.stage(staged, network, subject.account, settings.layout)
        with patience.of(f"compiling {file.name} and the network to compare them"):
            certified = _measured(settings, network, subject.file, file)
        if record:
            if settings.confirm:
                confirmed = _confirmed(settings, subject, record, file)
            weights = layouts.weights_of(file)
            entry = robustbench_entry.files(
                name, record, weights.name, file_sha256(weights), confirmed
            )
            for path, text in entry.items():
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                (staged / path).write_text(text)
        written = [p for p in sorted(staged.rglob("*")) if p.is_file()]
        digests = {str(p.relative_to(staged)): file_sha256(p) for p in written}
        with folders.writing("out", settings.out):
            publish(staged, settings.out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    done = {
        "model": network.name,
        "weights": subject.which,
        "weights_sha256": subject.sha256,
        "layout": settings.layout,
        "out": str(settings.out),
        "files": digests,
        "certificate": certified and certificates.summary(certified),
        "confirmed": confirmed,
        "usage": layouts.usage(network, settings.layout, settings.out),
        "by_hand": robustbench_entry.unknown(record) if record else [],
    }
    _print(settings, done, network.num_classes)
    return done


def _confirmed(
    settings: ExportSettings, subject: ExportedNetwork, record: AccuracyRecord, file: Path
):
    reference = references.reference(subject.network, file, settings.layout)
    if reference is None:
        raise ValueError(f"--confirm needs PyTorch: {references.INSTALL}")
    ledger = robustbench_entry.ledger_of(Path(str(settings.record)), record)
    return confirm.verdicts(
        reference.net, record, ledger, settings.confirm or 0, data_dir=settings.data_dir
    )


def _print(settings: ExportSettings, done: dict[str, Any], classes: int) -> None:
    sha256 = done["weights_sha256"]
    print(f"{done['model']} ({done['weights']}), {classes} classes, weights sha256 {sha256}")
    for name, value in done["files"].items():
        print(f"  {settings.out / name}: sha256 {value}")
    for key, label in (("certificate", "certificate: "), ("confirmed", ""), ("usage", "")):
        if done[key]:
            print(f"  {label}{done[key]}")
    if done["by_hand"]:
        print(f"  fill in by hand: {', '.join(done['by_hand'])}, and the checkboxes in the issue")


def push_to_hub(
    source: str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload of a robust network by jaxrobust",
    license: str | None = None,
    certificate: bool = True,
) -> str:
    """Write a network as a repository of the model hub, upload it, and return its address.

    It is what `jaxrobust export --layout hub` writes: weights, timm's config, the card with the
    accuracies of their records, or the module next to it where timm has no such network.

    Args:
      source: the workdir of a run, or any other source that `jaxrobust.load` takes.
      repository: `ORG/REPO`, created if it does not exist.
      private: whether a new repository is private.
      token: for the hub; default: the token of `hf auth login`, or $HF_TOKEN.
      revision: branch; default: the main one.
      message: of the commit.
      license: of the weights, for the card; default: the known license.
      certificate: first compare the file with its reference network, which needs PyTorch.
    Raises:
      ValueError: no such weights, not a repository name, or weights that do not agree.
      ImportError: Hugging Face's client is missing.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository, re.ASCII):
        raise ValueError(f"{repository!r} is not a repository of the hub; write ORG/REPO")
    try:
        import huggingface_hub
    except ImportError as error:
        message = "push_to_hub needs Hugging Face's client: pip install 'jaxrobust[hub]'"
        raise ImportError(message, name="huggingface_hub") from error
    parsed_source = sources.parse(str(source))
    of: dict[str, Any] = {"weights": str(source)}
    if parsed_source.kind == "run":
        of = {"workdir": parsed_source.path}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / repository.partition("/")[2]
        options: dict[str, Any] = {"license": license, "nocertificate": not certificate}
        export(ExportSettings(layout="hub", out=out, **of, **options))
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        about: dict[str, Any] = {
            "repo_id": repository,
            "revision": revision,
            "commit_message": message,
        }
        commit = api.upload_folder(folder_path=str(out), **about)
    return str(getattr(commit, "repo_url", None) or f"hf://{repository}")
