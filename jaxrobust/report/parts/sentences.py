"""The sentences of a page: the meaning of a number, its precision, and reasons to doubt it."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from jaxrobust.evaluation.records import checked, records, stopping
from jaxrobust.evaluation.records.record import AccuracyRecord, AttackSettings, FastSample
from jaxrobust.report.figures import spelled
from jaxrobust.report.gathered import Gathered, ReportedEvaluation, ReportedRun, section
from jaxrobust.types import fraction

_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0"}
_FEW = 1000  # images; below, a page mentions the width of the interval
_TRIAL = 100  # images; smaller evaluations are headlines only if none is larger
UNION = "union"
STANDARD = "autoattack standard"
AUTOATTACK = {"apgd-ce", "apgd-t", "fab-t", "square"}


def percent(value: float | None) -> str:
    """Format a fraction as a percentage, or None as a dash."""
    return "-" if value is None else f"{100 * value:.1f}%"


def between(ends: Sequence[float] | None) -> str:
    """Format an interval in percent, or None as an empty string."""
    return "" if not ends else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}%"


def interval(one: ReportedEvaluation, key: Literal["clean", "robust"]) -> Sequence[float] | None:
    """Return the exact 95% interval of `clean` or `robust`, from the record or its images.

    For an evaluation stopped by a rule, return the bounds of its sequence; `interval_name` says
    which of the two it is.
    """
    if stopped := one.record.stopped:
        return stopped.get(key)
    ends = one.record.interval and one.record.interval.get(key)
    if ends or not one.images:
        return ends
    accuracy = {"clean": one.record.clean, "robust": one.record.robust}[key]
    return records.interval(accuracy, one.images)


def interval_name(one: ReportedEvaluation) -> str:
    """Describe the result of `interval`."""
    if stopped := one.record.stopped:
        return f"{100 * (1 - stopped['alpha']):g}% sequence for all {stopped['of']:,} images"
    return "95% interval"


def ball(attack: AttackSettings) -> str:
    """Format norm and radius of an attack."""
    norm = str(attack.get("norm"))
    return f"{_NORMS.get(norm, norm)} {fraction(float(attack.get('epsilon') or 0))}"


def balls(record: AccuracyRecord) -> list[str]:
    """Return the distinct threats of a record."""
    return list(dict.fromkeys(ball(attack) for attack in record.attacks))


def method(record: AccuracyRecord) -> str:
    """Name the attack of a record, without its threat."""
    if record.worst_case or record.method:
        return "worst case" if record.worst_case else str(record.method)
    if not record.attacks:
        return "no attack"
    first = record.attacks[0]
    return first["name"] + (f", steps {first['steps']}" if first.get("steps") else "")


def network(one: ReportedEvaluation) -> str:
    """Name the network of an evaluation."""
    weights = one.record.weights
    return f"{one.model or 'the network'}{f' ({weights})' if weights else ''}"


def headline(one: ReportedEvaluation) -> str:
    """Describe an evaluation in one sentence that assumes no knowledge of attacks."""
    record, clean = one.record, percent(one.record.clean)
    count = f"{one.images:,} images" if one.images else "the images"
    where = f"{count} of {record.dataset} (split {record.split})"
    if record.certified:
        sigma = record.certified["sigma"]
        curve = [(float(r), value) for r, value in record.certified["accuracy"].items()]
        radius, certain = max((pair for pair in curve if pair[0] <= sigma), default=curve[0])
        return (
            f"{one.name}: {network(one)}, smoothed by noise of {sigma:g}, is certified to classify "
            f"{percent(curve[0][1])} of {where} correctly, and {percent(certain)} under any change "
            f"of at most {radius:.4g} in l2."
        )
    right = f"classifies {clean} of {where} correctly"
    if record.task:
        right = f"is correct on {clean} of {where} in the task {record.task}"
    text = f"{one.name}: {network(one)} {right}"
    if ends := interval(one, "clean"):
        text += f" ({interval_name(one)} {between(ends)})"
    if record.robust is None:
        return f"{text}; it was not attacked."
    ends = interval(one, "robust")
    robust = percent(record.robust) + (f" ({between(ends)})" if ends else "")
    threats = balls(record)
    within = threats[0] if len(threats) == 1 else f"all of {', '.join(threats)}"
    if record.fast:
        robust += " under attack by the fast version"
        return f"{text}, and {robust} within {within}: {at_least(record.fast)}."
    by = "" if record.method == UNION else f" by {method(record)}"
    return f"{text}, and {robust} under attack{by} within {within}."


def at_least(fast: FastSample) -> str:
    """State the fast version's bound on the standard version's accuracy."""
    return (
        f"AutoAttack's standard version would leave at least {stopping.fast_bound(fast)}, with "
        f"{100 * fast['level']:g}% confidence"
    )


def doubts(one: ReportedEvaluation, runs: Sequence[ReportedRun]) -> list[str]:
    """Return all reasons to doubt the number of an evaluation, each in a sentence or two."""
    record, n = one.record, one.images
    reasons = [f"Flag {name}: {text}" for name, text in record.flags.items()]
    version = str(record.method).removesuffix(", stopped")
    standard = "autoattack task" if record.task else STANDARD
    union = record.method == UNION and {a.get("name") for a in record.attacks} >= AUTOATTACK
    # A worst case runs AutoAttack in only one of its norms.
    if record.robust is not None and (record.worst_case or not (version == standard or union)):
        reasons.append(
            f"The attack was {'the ' * bool(record.fast)}{method(record)}, not the standard "
            "version of AutoAttack: a stronger attack can only fool more images, so the robust "
            "accuracy is at most this value."
        )
    ends = interval(one, "clean" if record.robust is None else "robust")
    if n and n < _FEW and ends and not record.stopped:
        reasons.append(
            f"Only {n:,} images were evaluated, so the 95% interval is "
            f"{100 * (ends[1] - ends[0]):.1f} points wide."
        )
    if str(record.split).startswith("train"):
        reasons.append("The images come from the training split, which the network may have seen.")
    if tried := records.replayed_line(record):
        reasons.append(
            f"Adversarial images from other evaluations were tried before the attacks: {tried}, "
            "although the attacks alone might not have fooled them."
        )
    if "+changes" in str(record.commit):
        reasons.append("The code had uncommitted changes when this was measured.")
    if record.search_dtype == "bfloat16":
        reasons.append("The attacks searched in bfloat16, and may be weaker than in float32.")
    if any(run.at_work and run.folder == one.run for run in runs):
        reasons.append("The run is still training; later checkpoints will give other numbers.")
    return reasons


def chosen(gathered: Gathered) -> list[ReportedEvaluation]:
    """Choose the strongest evaluation of each network for the headlines.

    Evaluations of 100 images or more come before smaller ones, which are ordered by size. Then come
    standard AutoAttack before other attacks, the radius of the training before others, more images
    and attacks before fewer, and newer records. The most robust network is first.
    """
    best: dict[str, ReportedEvaluation] = {}
    radii = {run.folder: section(run.config, "attack").get("epsilon") for run in gathered.runs}

    def worth(one: ReportedEvaluation) -> tuple[Any, ...]:
        record, attacks = one.record, one.record.attacks
        attacked = record.robust is not None, record.method == STANDARD, record.method != UNION
        trained = radii.get(one.run) if one.run else None
        same = any(a.get("epsilon") == trained for a in attacks)
        more = one.images, len(attacks), str(record.time or "")
        return min(one.images, _TRIAL), not record.stopped, *attacked, same, *more

    for one in gathered.evaluations:
        key = str(one.run.resolve() if one.run else identity(one))
        if key not in best or worth(one) > worth(best[key]):
            best[key] = one
    return sorted(best.values(), key=lambda e: -(e.record.robust or 0.0))


def identity(one: ReportedEvaluation) -> str:
    """Identify a network by the hash of its weights, otherwise by record file and weights name."""
    return str(one.record.weights_sha256 or f"{one.file} {one.record.weights}")


def question(one: ReportedEvaluation) -> str:
    """Return a text that is equal for records whose verdicts can be compared."""
    record = one.record
    images = [record.dataset, record.split, record.ids_sha256, record.classes_sha256]
    search = [record.preprocessing, record.search_dtype, record.image_size, record.attacks]
    return json.dumps([*images, *search, checked.procedure(record), checked.pictures(record)])


def state(run: ReportedRun) -> str:
    """Describe the progress of a run in a sentence or two."""
    if not run.metrics.curves:
        return f"{run.name} has no metrics yet."
    phase = run.phases[-1]
    curves = run.metrics.curves[phase]
    last = int(max(curve.steps[-1] for curve in curves.values() if len(curve.steps)))
    planned = run.planned.get(phase)
    of = f" of {planned:,}" if planned else ""
    text = f"{run.name}: phase {phase} is at step {last:,}{of}"
    if "selection_robust" in curves and "selection_clean" in curves:
        clean, robust = (curves[f"selection_{key}"].values[-1] for key in ("clean", "robust"))
        text += (
            f"; on the selection split, {spelled(float(clean), True)} of the images are classified "
            f"correctly, and {spelled(float(robust), True)} under the selection attack"
        )
    return f"{text}. {f'Running: {run.at_work}.' if run.at_work else 'No process is running.'}"
