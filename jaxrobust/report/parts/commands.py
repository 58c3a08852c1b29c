"""Texts to copy: the command that reproduces a number, its record, RobustBench's texts."""

import json
import re
import shlex

from markupsafe import Markup

from jaxrobust.data.splits.spread import ALL
from jaxrobust.data.transforms.corruptions import KINDS, SEVERITIES
from jaxrobust.evaluation.network import randomised
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.record import (
    AccuracyRecord,
    CorruptionAccuracies,
    DrawsJudged,
    UserFunction,
)
from jaxrobust.publish import robustbench_entry
from jaxrobust.report import markup
from jaxrobust.report.gathered import ReportedEvaluation
from jaxrobust.report.parts import sentences
from jaxrobust.types import fraction

_SETTINGS = re.compile(r"(steps|targets|restarts|relative_step|step|start|l1_rule) ([\w.+-]+)")
_VERSIONS = ("plus", "rand", "custom")


def evaluate(one: ReportedEvaluation, workdir: str | None) -> str:
    """Return the command of an evaluation, of a task the call; `workdir` is the run, if known."""
    record = one.record
    if record.task:
        return f"evaluation.autoattack(network, images, targets, task=...)  # {record.task}"
    words = ["jaxrobust", "evaluate"]
    if workdir:
        phase = re.match(r"(\w+), step", str(record.weights))
        words += ["--workdir", workdir, *(["--phase", phase[1]] if phase else [])]
    elif record.function and record.function.get("name"):
        words += _function(record.function)
    else:
        words += ["--model", str((record.model or {}).get("name")), "--weights", "WEIGHTS"]
    of_files = (record.corruptions or {}).get("images") == "files"  # each file is a split
    split, n = (None if of_files else record.split), 0
    ids = str((record.stopped or {}).get("images") or record.image_ids)
    if record.image_choice != ALL and (record.image_choice or ids.startswith("0..")):
        n = records.images_of(AccuracyRecord(image_ids=ids)) or 0 if record.stopped else one.images
    if n and not record.image_choice and split and "[" not in split:
        split, n = f"{split}[:{n}]", 0  # --n of older versions took the first images
    images = {"dataset": record.dataset, "split": split, "preprocessing": record.preprocessing}
    words += [word for flag, value in images.items() if value for word in (f"--{flag}", value)]
    words += ["--n", str(n)] if n else []
    words += _attack(record)
    if "rand" in re.split(r"[ ,]+", str(record.method)):
        judged: DrawsJudged = record.draws or {"rule": randomised.ONE, "draws": 1}
        words += ["--rule", judged["rule"]]
        words += [] if judged["rule"] == randomised.ONE else ["--draws", str(judged["draws"])]
    if stopped := record.stopped:
        if against := stopped.get("against"):
            words += ["--against", f"FOLDER#{against.get('evaluation')}"]
        for name, share in (
            ("tie", stopped.get("tie")),
            ("until_width", stopped.get("until_width")),
        ):
            words += [f"--{name}", f"{100 * share:g}"] if share else []
        words += [] if stopped["alpha"] == 0.05 else ["--alpha", f"{stopped['alpha']:g}"]
    words += ["--seed", str(record.seed or 0)]
    words += ["--search_dtype", "bfloat16"] if record.search_dtype == "bfloat16" else []
    return shlex.join(words)


def _function(function: UserFunction) -> list[str]:
    if "torch" not in function:
        return ["--function", str(function["name"])]
    words = ["--torch", str(function["name"])]
    if function.get("arguments"):
        words += ["--torch_args", json.dumps(function["arguments"])]
    return [*words, "--torch_output", str(function["output"])] if function.get("output") else words


def _corruptions(measured: CorruptionAccuracies) -> list[str]:
    names = [
        kind if len(row) == len(SEVERITIES) else ",".join(f"{kind}-{severity}" for severity in row)
        for kind, row in measured["accuracy"].items()
    ]
    words = ["--corruptions", "all" if names == list(KINDS) else ",".join(names)]
    return [*words, "--frost", "PHOTOGRAPHS"] if measured.get("frost_sha256") else words


def _attack(record: AccuracyRecord) -> list[str]:
    if record.corruptions:
        return _corruptions(record.corruptions)
    if smoothing := record.certified:
        noise = ["--certify", f"{smoothing['sigma']:g}", "--draws", str(smoothing["draws"])]
        return [*noise, "--alpha", f"{smoothing['alpha']:g}"]
    attacks = record.attacks
    if not attacks:
        return ["--attack", "clean"]
    threats = list(dict.fromkeys(record.threats))
    words = [w for t in threats for w in ("--threat", t.written().replace(" ", ":"))]
    if record.worst_case:
        union_only = any(part["robust"] is None for part in record.worst_case)
        return ["--worst_case", *words, *(["--union_only"] if union_only else [])]
    if len(threats) == 1:
        words = ["--norm", threats[0].norm, "--epsilon", fraction(threats[0].epsilon)]
    if record.fast:
        return [*words, "--attack", "autoattack", "--version", "fast"]
    method, *settings = (record.method or "").split(", ")
    # A user's function is named among the attacks; a user's file of points has its own flag.
    users = {one["name"]: one["file"] for one in attacks if "sha256" in one}
    method = " + ".join(name for name in method.split(" + ") if name not in users)
    functions = [file for file in users.values() if ":" in file]
    files = [w for file in users.values() if ":" not in file for w in ("--points", file)]
    if method.startswith("autoattack "):
        attack = ",".join(["autoattack", *functions])
        return [*words, "--attack", attack, "--version", method.split()[1], *files]
    if record.method in (None, "", sentences.UNION):
        names = list(dict.fromkeys(str(a["name"]) for a in attacks))
        is_autoattack = set(names) == sentences.AUTOATTACK
        words += ["--attack", "autoattack" if is_autoattack else ",".join(names)]
        steps = {a.get("steps") for a in attacks}
        same_steps = len(steps) == 1 and not is_autoattack
        return [*words, "--steps", str(steps.pop())] if same_steps else words
    listed = [*filter(None, method.split(" + ")), *functions]
    words += ["--attack", ",".join(listed) or "clean", *files]
    for setting in settings:
        if match := _SETTINGS.fullmatch(setting):
            words += [f"--{match[1]}", match[2]]
        elif setting in _VERSIONS:
            words += ["--version", setting]
    return words


def part(one: ReportedEvaluation) -> Markup:
    """Return the command, the record and RobustBench's texts of an evaluation, folded."""
    command = evaluate(one, str(one.run) if one.run else None)
    record = json.dumps(one.record.to_json(), indent=1, ensure_ascii=False)
    texts = {"The command": command, "The record": record}
    note = ""
    try:
        lacks = robustbench_entry.lacks(one.record)
        entry = json.dumps(robustbench_entry.entry(one.record), indent=2)
        issue = ("AuthorYearTitle", one.record, "WEIGHTS", "SHA256 OF THE FILE")
        board = {"RobustBench's JSON": entry}
        board["RobustBench's issue text"] = robustbench_entry.issue(*issue)
    except (KeyError, TypeError, ValueError, AttributeError):
        note = "The record lacks fields that RobustBench's entry needs."
    else:
        if lacks:  # an entry would claim the data and radius of a leaderboard
            note = f"RobustBench would not accept it, so there is no entry: {'; '.join(lacks)}."
        else:
            texts |= board
    copied = Markup().join(markup.parts.copied(*item) for item in texts.items())
    inside = markup.parts.note(about(one)) + copied + markup.parts.note(note)
    title = "To copy: command, record, RobustBench"
    return markup.parts.folded(title, inside, kind="copyonly")


def about(one: ReportedEvaluation) -> str:
    """Describe what the command reproduces."""
    if not one.record.method and one.record.attacks:
        return (
            "This is the test of a training run; to repeat it, run jaxrobust train with its "
            "config. The command below uses the attack of the same name with other random draws."
        )
    if one.record.task:
        return "No command supports tasks: call this in Python, with the record's seed and attacks."
    same = "The command gives the same verdicts with the same weights, data and versions."
    if one.record.replayed is not None or "ladder" in str(one.record.method):
        return f"{same} Images from other evaluations were tried first here, as the record says."
    return f"{same} Add --noreplay if the folder now contains evaluations at other radii."
