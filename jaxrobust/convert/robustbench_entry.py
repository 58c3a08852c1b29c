"""RobustBench's JSON entry and the text of its "New Model" issue, from a result record.

Source: the keys and formats of RobustBench's model_info/imagenet/Linf/*.json.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from jaxrobust import models
from jaxrobust.data.subsets import ROBUSTBENCH_SHA256
from jaxrobust.runtime import jsonl

BY_HAND = "TO BE FILLED IN BY HAND"
IMAGES = 5000
_ID = re.compile(r"[A-Z][A-Za-z-]*\d{4}[A-Za-z0-9]+(_[\w-]+)?")
# That the entry or the issue reads of a record.
_KEYS: tuple[str, ...] = ("attacks", "clean", "commit", "dataset", "device", "dtype")
_KEYS += ("evaluation", "flags", "image_ids", "model", "preprocessing", "robust", "seed")
_KEYS += ("split", "time", "versions", "weights")


def check_id(robustbench_id: str) -> str:
    """Return the id itself; `ValueError` for one that RobustBench would not take."""
    if not _ID.fullmatch(robustbench_id):
        raise ValueError(
            f"--id {robustbench_id} is no id of RobustBench: the first author's name, the year and "
            "the title's first word, as Singh2023Revisiting, and perhaps _ARCHITECTURE"
        )
    return robustbench_id


def architecture(name: str, options: dict[str, Any]) -> str:
    """Return an architecture as leaderboards write it."""
    stem = name.removesuffix("_cvst")
    base, _, patch = stem.partition("_p")
    size = base.rpartition("_")[2].upper()
    plain = models.member(name).title or f"{models.family(name).title}-{size}"
    plain += f"/{patch}" if patch else ""
    with_options = "".join(f", {key}={value}" for key, value in options.items())
    return plain + " + ConvStem" * (stem != name) + with_options


def find(path: Path, weights_sha256: str, evaluation: str | None) -> dict[str, Any]:
    """Return the record of these weights in a file of records: the chosen one, or the last that
    counts.

    Raises:
      ValueError: there is none, or none is AutoAttack's accuracy by RobustBench's protocol.
    """
    if not path.is_file():
        raise ValueError(f"--record {path}: no such file; evaluations write results.jsonl")
    rows = [r for r in jsonl.read(path) if isinstance(r, dict) and "weights_sha256" in r]
    if evaluation is not None:
        rows = [r for r in rows if r.get("evaluation") == evaluation]
        if not rows:
            raise ValueError(f"{path} has no evaluation {evaluation}")
    own = [r for r in rows if r["weights_sha256"] == weights_sha256]
    if not own:
        others = sorted({str(r["weights_sha256"])[:12] for r in rows})
        raise ValueError(
            f"{path} has no record of these weights (sha256 {weights_sha256[:12]}), only of "
            f"{', '.join(others) or 'none'}; evaluate what you export, or choose it with --phase "
            "and --which"
        )
    if absent := [key for key in _KEYS if key not in own[-1]]:
        raise ValueError(f"{path}: its record of these weights has no {absent[0]}; evaluate again")
    counting = [r for r in own if not lacks(r)]
    if not counting:
        raise ValueError(
            f"{path}: this is no AutoAttack accuracy as RobustBench defines it, for "
            f"{'; '.join(lacks(own[-1]))}. To have one, run: python -m jaxrobust.evaluate "
            "(--workdir RUN | --weights FOLDER) --dataset (imagenet2012 | folder:PATH) --split "
            "validation@robustbench --norm linf --epsilon 4/255 --attack autoattack --version "
            "standard"
        )
    return counting[-1]


def lacks(record: dict[str, Any]) -> list[str]:
    """Return what separates a record from RobustBench's protocol for ImageNet; empty: nothing."""
    attacks, ids = record["attacks"], record["image_ids"]
    radii = [(a["norm"], a["epsilon"]) for a in attacks]
    data = f"{record['dataset']}, split {record['split']}"
    wanted = {
        f"its attack is {record.get('method') or 'not AutoAttack'}, not autoattack standard": (
            record.get("method") == "autoattack standard"
        ),
        f"its balls are {sorted(set(radii))}, not linf 4/255": bool(radii)
        and all(n == "linf" and math.isclose(e, 4 / 255, rel_tol=1e-6) for n, e in radii),
        f"its images are {ids}, not 0..{IMAGES - 1}": ids == f"0..{IMAGES - 1}",
        f"its data, {data}, are not the 5,000 of RobustBench's list": (
            record.get("ids_sha256") == ROBUSTBENCH_SHA256
        ),
        f"its network computes in {record['dtype']}, not float32": record["dtype"] == "float32",
    }
    return [text for text, holds in wanted.items() if not holds]


def percent(fraction: float) -> str:
    """Write a fraction as a percentage with two decimals, as RobustBench does."""
    return f"{100 * fraction:.2f}"


def entry(record: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of model_info/imagenet/Linf, in RobustBench's order of keys."""
    model = record["model"]
    return {
        "link": BY_HAND,
        "name": BY_HAND,
        "authors": BY_HAND,
        "additional_data": BY_HAND,
        "number_forward_passes": 1,
        "dataset": "imagenet",
        "venue": BY_HAND,
        "architecture": architecture(model["name"], model["options"]),
        "eps": "4/255",
        "clean_acc": percent(record["clean"]),
        "reported": percent(record["robust"]),
        "autoattack_acc": percent(record["robust"]),
        "unreliable": f"{BY_HAND}: see the flags of the record" if record["flags"] else False,
    }


def unknown(record: dict[str, Any]) -> list[str]:
    """Return the keys of the entry that no record knows."""
    return [key for key, value in entry(record).items() if str(value).startswith(BY_HAND)]


def issue(robustbench_id: str, record: dict[str, Any], file: str, sha256: str) -> str:
    """Return the text of the issue, in the fields of RobustBench's template."""
    made = entry(record)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows = {
        "Architecture": made["architecture"],
        "Threat Model": "Linf",
        "eps": made["eps"],
        "Clean accuracy": f"{made['clean_acc']} %",
        "Robust accuracy": f"{made['autoattack_acc']} %",
        "Additional data": f"({BY_HAND}: true or false)",
        "Evaluation method": f"AutoAttack, version standard, on the {IMAGES:,} images of "
        f"RobustBench ({record['dataset']}, {record['split']}), preprocessing "
        f"{record['preprocessing']}, {record['dtype']}, seed {record['seed']}, with jaxrobust's "
        "implementation",
        "Checkpoint and code": f"({BY_HAND}: URL of {file} and of the code); sha256 {sha256}",
    }
    flags = [f"- flag {name}: {text}" for name, text in record["flags"].items()]
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
        f"Record {record['evaluation']} of {record['time']}: commit {record['commit']}, weights "
        f"{record['weights']} (sha256 {record['weights_sha256']}), {record['device']}, {versions}.",
        *(["", *flags] if flags else []),
        "",
        "# Model Zoo",
        "",
        f"({BY_HAND}: check what is true)",
        "",
        "- [ ] I want to add my models to the Model Zoo",
        "- [ ] The architecture is not among those of robustbench/model_zoo/architectures",
        "- [ ] I release the models under the MIT license, or",
        "- [ ] under a custom license: (URL)",
    ]
    return "\n".join(lines) + "\n"


def files(robustbench_id: str, record: dict[str, Any], file: str, sha256: str) -> dict[str, str]:
    """Return path -> text of the two files, the entry and the issue."""
    return {
        f"model_info/imagenet/Linf/{robustbench_id}.json": json.dumps(entry(record), indent=2)
        + "\n",
        "new_model_issue.md": issue(robustbench_id, record, file, sha256),
    }
