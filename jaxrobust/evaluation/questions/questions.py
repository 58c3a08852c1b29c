"""The flags of an evaluation: attacks with their settings, and threats."""

from jaxrobust import attacks
from jaxrobust.attacks import ensembles, fixed_steps
from jaxrobust.attacks import registry as attack_rows
from jaxrobust.attacks.inputs import filled
from jaxrobust.data import evaluation_transform
from jaxrobust.data.sources import registry
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.questions import mistakes
from jaxrobust.evaluation.questions.stated import ALONE, AUTOATTACK, GivenFlags
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.types import NORMS, check_length, check_threat


def following(attack: str, version: str, norm: str) -> tuple[str, ...]:
    """List the attacks of `--attack` and `--version` that follow input gradients."""
    if fixed_steps.parse(attack):
        return (attack,)
    rows = attack_rows.searching()
    versions = ensembles.versions(norm)
    names = versions.get(version, ()) if attack == AUTOATTACK else attack.split(",")
    return tuple(name for name in names if name in rows and rows[name][0].backward)


def check(question: GivenFlags, subject: Subject, source: registry.Source) -> None:
    """Raise on invalid flags, worded for the command line, before anything compiles."""
    mistakes.check_attack(question)
    if question.attack != "clean":
        if subject.threat is None:
            unit = "in units of the [0, 1] pixel range, such as 4/255"
            unit = "a number of pixels, such as 24" if subject.norm == "l0" else unit
            raise ValueError(f"give --epsilon, {unit}")
        check_threat(subject.threat, subject.image_size, subject.network.in_channels or 3)
    _check_fixed(question, subject.norm)
    mistakes.check_values(question)
    if question.searches and question.attack != ALONE:
        try:
            ensembles.plan(subject.norm, question.version, question.names, question.overrides())
        except ValueError as error:
            raise ValueError(f"--attack={question.attack}: {error}") from error
    channels = subject.network.in_channels
    if source.channels != channels:
        raise ValueError(
            f"the network takes {channels} channels, but {source.where()} has {source.channels}; "
            "give the --dataset that it was trained for"
        )
    preprocessing = pipeline.preprocessing_id(source, subject.image_size, question.preprocessing)
    evaluation_transform(preprocessing)  # raises if unknown


def _check_fixed(question: GivenFlags, norm: str) -> None:
    """Raise on invalid settings of attacks with fixed steps."""
    if question.fixed and norm not in NORMS:
        raise ValueError(
            f"--attack={question.attack} does not support {norm}; give --attack=autoattack, or set "
            f"--norm to one of {', '.join(NORMS)}"
        )
    check_length("--step", question.step or 0, norm)
    for flag, choices in (("start", fixed_steps.STARTS), ("l1_rule", tuple(attacks.L1_RULES))):
        value = getattr(question, flag)
        if value is not None and value not in choices:
            raise ValueError(f"--{flag}={value} is unknown; choose one of {', '.join(choices)}")
    if question.l1_rule and norm != "l1":
        raise ValueError(f"--l1_rule={question.l1_rule} is for l1, not {norm}; leave it out")
    if str(question.start).startswith("uniform") and not attacks.GEOMETRIES[norm].fill:
        raise ValueError(
            f"--start={question.start} is for {filled()}, not {norm}; leave it out, or give "
            "--start=random"
        )
