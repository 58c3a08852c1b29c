"""What to copy: the command that gives a number again, its record, and RobustBench's texts."""

import json
import re
import shlex
from collections.abc import Sequence

from jaxrobust.data.splits.spread import ALL
from jaxrobust.data.transforms.corruptions import KINDS, SEVERITIES
from jaxrobust.evaluation.network import randomised
from jaxrobust.evaluation.records import parts, records
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.publish import robustbench_entry
from jaxrobust.report.drawing.markup import Html, copied, remark, tag
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.report.parts import sentences
from jaxrobust.types import fraction

_SETTINGS = re.compile(r"(steps|targets|restarts|relative_step|step|start|l1_rule) ([\w.+-]+)")
_VERSIONS = ("plus", "rand", "custom")


def evaluate(one: ReportedEvaluation, workdir: str | None) -> str:
    """Return the command of an evaluation; `workdir` is the run, None: it is not known."""
    record = one.record
    function = (record.function or {}).get("name")
    words = ["jaxrobust", "evaluate"]
    if workdir:
        words += ["--workdir", workdir]
        phase = re.match(r"(\w+), step", str(record.weights))
        words += ["--phase", phase[1]] if phase else []
    elif record.function and function:
        words += _function(record.function)
    else:
        words += ["--model", str((record.model or {}).get("name")), "--weights", "WEIGHTS"]
    of_files = (record.corruptions or {}).get("images") == "files"  # each of which is a split
    split, n = (None if of_files else record.split), _number(record, one.images)
    if n and not record.image_choice and split and "[" not in split:
        split, n = f"{split}[:{n}]", 0  # of an older version, whose --n took the first ones
    images = {"dataset": record.dataset, "split": split, "preprocessing": record.preprocessing}
    words += [word for flag, value in images.items() if value for word in (f"--{flag}", value)]
    words += ["--n", str(n)] if n else []
    words += [*_attack(record), *_judged(record), *_stop(record), "--seed", str(record.seed or 0)]
    if record.search_dtype == "bfloat16":
        words += ["--search_dtype", "bfloat16"]
    return shlex.join(words)


def _number(record: AccuracyRecord, evaluated: int) -> int:
    """Count the images that the evaluation was asked for; 0: it does not say, or all of them."""
    ids = str((record.stopped or {}).get("images") or record.image_ids)
    if record.image_choice == ALL or not (record.image_choice or ids.startswith("0..")):
        return 0
    whole = records.images_of(AccuracyRecord(image_ids=ids)) or 0
    return whole if record.stopped else evaluated


def _stop(record: AccuracyRecord) -> list[str]:
    stopped = record.stopped
    if not stopped:
        return []
    points = {"tie": stopped.get("tie"), "until_width": stopped.get("until_width")}
    words = [
        w for name, share in points.items() if share for w in (f"--{name}", f"{100 * share:g}")
    ]
    if against := stopped.get("against"):
        words = ["--against", f"FOLDER#{against.get('evaluation')}", *words]
    return words if stopped["alpha"] == 0.05 else [*words, "--alpha", f"{stopped['alpha']:g}"]


def _judged(record: AccuracyRecord) -> list[str]:
    if "rand" not in re.split(r"[ ,]+", str(record.method)):
        return []
    how: parts.DrawsJudged = record.draws or {"rule": randomised.ONE, "draws": 1}
    words = ["--rule", how["rule"]]
    return words if how["rule"] == randomised.ONE else [*words, "--draws", str(how["draws"])]


def _function(function: parts.UserFunction) -> list[str]:
    if "torch" not in function:
        return ["--function", str(function["name"])]
    words = ["--torch", str(function["name"])]
    if function.get("arguments"):
        words += ["--torch_args", json.dumps(function["arguments"])]
    return [*words, "--torch_output", str(function["output"])] if function.get("output") else words


def _corruptions(measured: parts.CorruptionAccuracies) -> list[str]:
    names = [
        kind if len(row) == len(SEVERITIES) else ",".join(f"{kind}-{severity}" for severity in row)
        for kind, row in measured["accuracy"].items()
    ]
    words = ["--corruptions", "all" if names == list(KINDS) else ",".join(names)]
    return [*words, "--frost", "PHOTOGRAPHS"] if measured.get("frost_sha256") else words


def _attack(record: AccuracyRecord) -> list[str]:
    if record.corruptions:
        return _corruptions(record.corruptions)
    if record.certified:
        how = record.certified
        noise = ["--certify", f"{how['sigma']:g}", "--draws", str(how["draws"])]
        return [*noise, "--alpha", f"{how['alpha']:g}"]
    attacks = record.attacks
    if not attacks:
        return ["--attack", "clean"]
    threats = list(dict.fromkeys(record.threats))
    several = [w for t in threats for w in ("--threat", t.written().replace(" ", ":"))]
    if record.worst_case:
        alone = any(part["robust"] is None for part in record.worst_case)
        return ["--worst_case", *several, *(["--union_only"] if alone else [])]
    if len(threats) > 1:
        words = several
    else:
        words = ["--norm", threats[0].norm, "--epsilon", fraction(threats[0].epsilon)]
    if record.fast:
        return [*words, "--attack", "autoattack", "--version", "fast"]
    name, *settings = (record.method or "").split(", ")
    name, functions, files = _of_user(name, attacks)
    names = list(dict.fromkeys(str(a["name"]) for a in attacks))
    if name.startswith("autoattack "):
        attack = ",".join(["autoattack", *functions])
        return [*words, "--attack", attack, "--version", name.split()[1], *files]
    if record.method in (None, "", sentences.UNION):
        whole = set(names) == {"apgd-ce", "apgd-t", "fab-t", "square"}
        words += ["--attack", "autoattack" if whole else ",".join(names)]
        same = {a.get("steps") for a in attacks}
        return words if whole or len(same) > 1 else [*words, "--steps", str(same.pop())]
    listed = [*filter(None, name.split(" + ")), *functions]
    words += ["--attack", ",".join(listed) or "clean", *files]
    for setting in settings:
        if match := _SETTINGS.fullmatch(setting):
            words += [f"--{match[1]}", match[2]]
        elif setting in _VERSIONS:
            words += ["--version", setting]
    return words


def _of_user(
    name: str, attacks: Sequence[parts.AttackSettings]
) -> tuple[str, list[str], list[str]]:
    """Part a method's name into those of our attacks, the user's functions, and words of files."""
    users = {one["name"]: one["file"] for one in attacks if "sha256" in one}
    others = " + ".join(one for one in name.split(" + ") if one not in users)
    functions = [file for file in users.values() if ":" in file]
    files = [w for file in users.values() if ":" not in file for w in ("--points", file)]
    return others, functions, files


def part(one: ReportedEvaluation) -> Html:
    """Write the command, the record and RobustBench's texts of an evaluation, folded."""
    summary = tag("summary", "To copy: command, record, RobustBench")
    command = copied("The command", evaluate(one, str(one.run) if one.run else None))
    record = json.dumps(one.record.to_json(), indent=1, ensure_ascii=False)
    shown = [remark(_about(one)), command, copied("The record", record), *_board(one)]
    return tag("details", summary, shown, class_="copyonly")


def _about(one: ReportedEvaluation) -> str:
    if not one.record.method and one.record.attacks:
        return (
            "A training tested itself here; jaxrobust train with its config repeats that. "
            "The command below asks evaluate's attack of this name, with other random draws."
        )
    same = "The command gives the same verdicts with the same weights, data and versions."
    if one.record.replayed is not None or "ladder" in str(one.record.method):
        return f"{same} What other evaluations had found was tried first here, as the record says."
    return f"{same} Add --noreplay where evaluations at other radii lie beside it by now."


def _board(one: ReportedEvaluation) -> list[Html | None]:
    record = one.record
    try:
        lacks = robustbench_entry.lacks(record)
        entry = json.dumps(robustbench_entry.entry(record), indent=2)
        text = robustbench_entry.issue("AuthorYearTitle", record, "WEIGHTS", "SHA256 OF THE FILE")
    except (KeyError, TypeError, ValueError, AttributeError):
        return [remark("The record lacks what RobustBench's entry is made of.")]
    if lacks:  # an entry would claim a leaderboard's data and radius
        reason = f"RobustBench would not count it, so there is no entry: {'; '.join(lacks)}."
        return [remark(reason)]
    return [copied("RobustBench's JSON", entry), copied("RobustBench's issue text", text)]
