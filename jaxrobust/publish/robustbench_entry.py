"""RobustBench's JSON entry and the texts of two of its issues, written from a result record.

Source: the keys and formats of RobustBench's model_info/{imagenet,cifar10,cifar100}/*/*.json, its
.github/ISSUE_TEMPLATE/new-model.md and new-external-evaluation-s-.md, and its threat models
(model_zoo/enums.py).
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust import models
from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.evaluation.records import checked
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.files import jsonl
from jaxrobust.types import Threat, fraction

BY_HAND = "TO BE FILLED IN BY HAND"
_ID = re.compile(r"[A-Z][A-Za-z-]*\d{4}[A-Za-z0-9]+(_[\w-]+)?")
# The keys of a record that the entry or the issue reads.
_KEYS: tuple[str, ...] = ("attacks", "clean", "commit", "dataset", "device", "dtype")
_KEYS += ("evaluation", "flags", "image_ids", "model", "preprocessing", "robust", "seed")
_KEYS += ("split", "time", "versions", "weights")


class Protocol(NamedTuple):
    """The data and threat model of a leaderboard."""

    dataset: str  # as RobustBench calls it
    threat: Threat
    images: int  # the number of images, from the first
    data_flags: str  # flags that select the data on our command line
    listed: bool = True  # whether RobustBench has this leaderboard

    @property
    def norm(self) -> str:
        """Return the threat model as RobustBench calls it."""
        return {"linf": "Linf", "l2": "L2"}[self.threat.norm]

    @property
    def eps(self) -> str:
        """Return the radius as RobustBench writes it."""
        return fraction(self.threat.epsilon)


_PHOTOGRAPHS = "--dataset (imagenet2012 | folder:PATH) --split validation@robustbench"
_CIFAR = (
    ("cifar10", Threat("linf", 8 / 255), True),
    ("cifar10", Threat("l2", 0.5), True),
    ("cifar100", Threat("linf", 8 / 255), True),
    ("cifar100", Threat("l2", 0.5), False),
)
PROTOCOLS = (
    Protocol("imagenet", Threat("linf", 4 / 255), 5_000, _PHOTOGRAPHS),
    *(
        Protocol(name, ball, 10_000, f"--dataset {name} --split test", on)
        for name, ball, on in _CIFAR
    ),
)
_PREPARED = re.compile(r"(?:tfds:)?(cifar100?)(?:[:/].*)?")


def protocol_of(record: AccuracyRecord) -> Protocol:
    """Return the leaderboard for a record: the one with its dataset and norm."""
    match = _PREPARED.fullmatch(str(record.dataset))
    dataset = match[1] if match else "imagenet"
    norms = {threat.norm for threat in record.threats}
    protocols = [p for p in PROTOCOLS if p.dataset == dataset]
    return next((p for p in protocols if {p.threat.norm} == norms), protocols[0])


def check_id(robustbench_id: str) -> str:
    """Return the id unchanged; `ValueError` if RobustBench would reject it."""
    if not _ID.fullmatch(robustbench_id):
        raise ValueError(
            f"--id {robustbench_id} is not a RobustBench id; write the first author's name, the "
            "year and the title's first word, such as Singh2023Revisiting, optionally with "
            "_ARCHITECTURE"
        )
    return robustbench_id


def architecture(name: str, options: dict[str, Any]) -> str:
    """Write an architecture as leaderboards do."""
    with_options = "".join(f", {key}={value}" for key, value in options.items())
    if pytorch.is_name(name):
        of_timm = pytorch.PREFIX + pytorch.TIMM
        return name.removeprefix(of_timm) + with_options if name.startswith(of_timm) else BY_HAND
    stem = name.removesuffix("_cvst")
    base, patch = re.fullmatch(r"(.+?)(?:_p(\d+))?", stem).groups()  # type: ignore[union-attr]
    size = base.rpartition("_")[2].upper()
    plain = models.member(name).title or f"{models.family(name).title}-{size}"
    plain += f"/{patch}" if patch else ""
    return plain + " + ConvStem" * (stem != name) + with_options


def find(path: Path, weights_sha256: str, evaluation: str | None) -> AccuracyRecord:
    """Choose the record of these weights: the named evaluation, or the last valid one."""
    rows = [AccuracyRecord.from_json(row) for row in jsonl.read(path) if "weights_sha256" in row]
    if evaluation is not None:
        rows = [r for r in rows if r.evaluation == evaluation]
        if not rows:
            raise ValueError(f"{path} has no evaluation {evaluation}")
    candidates = [r for r in rows if r.weights_sha256 == weights_sha256]
    if not candidates:
        others = sorted({str(r.weights_sha256)[:12] for r in rows})
        raise ValueError(
            f"{path} has no record of these weights (sha256 {weights_sha256[:12]}), only of "
            f"{', '.join(others) or 'none'}; evaluate the weights that you export, or choose them "
            "with --phase and --which"
        )
    if absent := [key for key in _KEYS if key not in candidates[-1].to_json()]:
        raise ValueError(f"{path}: its record of these weights has no {absent[0]}; evaluate again")
    counting = [r for r in candidates if not lacks(r)]
    if not counting:
        p = protocol_of(candidates[-1])
        raise ValueError(
            f"{path}: this is not an AutoAttack accuracy as RobustBench defines it, because "
            f"{'; '.join(lacks(candidates[-1]))}. To get one, run: jaxrobust evaluate (--workdir "
            f"RUN | --weights FOLDER) {p.data_flags} --norm {p.threat.norm} --epsilon {p.eps} "
            "--attack autoattack --version standard"
        )
    checked.confirmed(counting[-1], path)
    return counting[-1]


def ledger_of(records: Path, record: AccuracyRecord) -> Path:
    """Return the ledger that an evaluation wrote next to its records."""
    return records.parent / f"ledger-{record.evaluation}.jsonl"


def lacks(record: AccuracyRecord) -> list[str]:
    """List the differences between a record and the protocol of its leaderboard."""
    method = record.method
    wanted = {
        f"its attack is {method or 'not AutoAttack'}, not autoattack standard": (
            method == "autoattack standard"
        ),
        "adversarial images of other evaluations were replayed; evaluate with --noreplay": (
            not record.replayed
        ),
        f"its network computes in {record.dtype}, not float32": record.dtype == "float32",
    }
    return [*other_question(record), *(text for text, holds in wanted.items() if not holds)]


def other_question(record: AccuracyRecord) -> list[str]:
    """List the differences in images and threat between a record and its leaderboard."""
    p, ids, radii = protocol_of(record), record.image_ids, record.threats
    same = [
        ball.norm == p.threat.norm and math.isclose(ball.epsilon, p.threat.epsilon, rel_tol=1e-6)
        for ball in radii
    ]
    wanted = {
        f"its threats are {', '.join(dict.fromkeys(map(str, radii)))}, not {p.threat.written()}": (
            bool(radii) and all(same)
        ),
        f"its images are {ids}, not 0..{p.images - 1}": ids == f"0..{p.images - 1}",
    }
    return [*_other_data(record, p), *(text for text, holds in wanted.items() if not holds)]


def _other_data(record: AccuracyRecord, p: Protocol) -> list[str]:
    data = f"its data, {record.dataset}, split {record.split}, are not "
    if p.dataset == "imagenet":
        same = record.ids_sha256 == ROBUSTBENCH_SHA256
        return [] if same else [f"{data}the 5,000 images of RobustBench's list"]
    if record.split != "test":
        return [f"{data}the test split"]
    as_they_are = record.preprocessing in (None, "none")
    return [] if as_they_are else [f"its preprocessing is {record.preprocessing}, not none"]


def percent(fraction: float | None) -> str:
    """Write a fraction as a percentage with two decimals, as RobustBench does."""
    if fraction is None:
        raise TypeError("an accuracy is unknown")
    return f"{100 * fraction:.2f}"


def entry(record: AccuracyRecord) -> dict[str, Any]:
    """Make the JSON for model_info/DATASET/THREAT, with the keys in RobustBench's order."""
    model, p = record.model or {}, protocol_of(record)
    return {
        "link": BY_HAND,
        "name": BY_HAND,
        "authors": BY_HAND,
        "additional_data": BY_HAND,
        "number_forward_passes": 1,
        "dataset": p.dataset,
        "venue": BY_HAND,
        "architecture": architecture(str(model["name"]), model["options"] or {}),
        "eps": p.eps,
        "clean_acc": percent(record.clean),
        "reported": percent(record.robust),
        "autoattack_acc": percent(record.robust),
        "unreliable": f"{BY_HAND}: see the flags of the record" if record.flags else False,
    }


def unknown(record: AccuracyRecord) -> list[str]:
    """Return the keys of the entry that the record cannot fill."""
    return [key for key, value in entry(record).items() if str(value).startswith(BY_HAND)]


def issue(
    robustbench_id: str,
    record: AccuracyRecord,
    file: str,
    sha256: str,
    confirmed: str | None = None,
) -> str:
    """Write the issue from RobustBench's template; `confirmed`: the result of pyautoattack."""
    fields, p = entry(record), protocol_of(record)
    image_set = "5,000 images of RobustBench" if p.dataset == "imagenet" else "10,000 test images"
    versions = ", ".join(f"{name} {version}" for name, version in (record.versions or {}).items())
    rows = {
        "Architecture": fields["architecture"],
        "Threat Model": p.norm,
        "eps": fields["eps"],
        "Clean accuracy": f"{fields['clean_acc']}%",
        "Robust accuracy": f"{fields['autoattack_acc']}%",
        "Additional data": f"({BY_HAND}: true or false)",
        "Evaluation method": f"AutoAttack, version standard, on the {image_set} "
        f"({record.dataset}, {record.split}), preprocessing {record.preprocessing}, "
        f"{record.dtype}, seed {record.seed}, with jaxrobust's implementation"
        + (f"; {confirmed}" if confirmed else ""),
        "Checkpoint and code": f"({BY_HAND}: URL of {file} and of the code); sha256 {sha256}",
    }
    unlisted = f"RobustBench has no leaderboard for {p.dataset}, {p.norm} yet."
    flags = [f"- flag {name}: {text}" for name, text in record.flags.items()]
    lines = [
        f"Title: [New Model] {robustbench_id}",
        "Label: new-model",
        "",
        "# Paper Information",
        "",
        f"- **Paper Title**: ({BY_HAND})",
        f"- **Paper URL**: ({BY_HAND})",
        f"- **Paper authors**: ({BY_HAND})",
        "",
        "# Leaderboard Claim(s)",
        "",
        "## Model 1",
        "",
        *(f"- **{field}**: {value}" for field, value in rows.items()),
        "",
        f"Record {record.evaluation} of {record.time}: commit {record.commit}, weights "
        f"{record.weights} (sha256 {record.weights_sha256}), {record.device}, {versions}.",
        *(["", *flags] if flags else []),
        *([] if p.listed else ["", unlisted]),
        "",
        "# Model Zoo",
        "",
        f"({BY_HAND}: check what applies)",
        "",
        "- [ ] I want to add my models to the Model Zoo",
        "- [ ] The architecture is not among those of robustbench/model_zoo/architectures",
        "- [ ] I release the models under the MIT license, or",
        "- [ ] under a custom license: (URL)",
    ]
    return "\n".join(lines) + "\n"


def external_evaluation(record: AccuracyRecord, file: str, sha256: str) -> str:
    """Write the issue for an evaluation of a zoo network; `file` has its adversarial images.

    `ValueError` if the images or the threat differ from those of every leaderboard.
    """
    p = protocol_of(record)
    unlisted = [] if p.listed else [f"it has none for {p.dataset}, {p.norm}"]
    if differs := [*other_question(record), *unlisted]:
        raise ValueError(f"RobustBench has no leaderboard for this record: {'; '.join(differs)}")
    fields = entry(record)
    lines = [
        "Title: [New evaluation] <identifier>",
        "",
        "## Target model",
        f"+ **Model identifier(s):** ({BY_HAND}; the record's is {fields['architecture']}, weights "
        f"{record.weights}, sha256 {record.weights_sha256})",
        f"+ **Leaderboard(s):** {p.dataset}, {p.norm}, eps {fields['eps']}",
        "",
        "## New evaluation",
        f"+ **Link to adversarial images:** ({BY_HAND}: URL of {file}; sha256 {sha256})",
        f"+ **Robust accuracy:** {fields['autoattack_acc']}%",
        f"+ **Author(s):** ({BY_HAND})",
        f"+ **Description of the method used:** {record.method}, {record.dtype}, seed "
        f"{record.seed}, with jaxrobust's implementation (commit {record.commit})",
    ]
    return "\n".join(lines) + "\n"


def files(
    robustbench_id: str,
    record: AccuracyRecord,
    file: str,
    sha256: str,
    confirmed: str | None = None,
) -> dict[str, str]:
    """Return path -> text of the two files, the entry and the issue."""
    p, entry_text = protocol_of(record), json.dumps(entry(record), indent=2)
    return {
        f"model_info/{p.dataset}/{p.norm}/{robustbench_id}.json": entry_text + "\n",
        "new_model_issue.md": issue(robustbench_id, record, file, sha256, confirmed),
    }
