"""The flags of an evaluation: attacks with their settings, and threats."""

import math
from typing import Any, NamedTuple

from jaxrobust import attacks
from jaxrobust.attacks import ensembles, fixed_steps
from jaxrobust.attacks import registry as attack_rows
from jaxrobust.attacks.inputs import filled
from jaxrobust.data import evaluation_transform
from jaxrobust.data.sources import registry
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.network import randomised
from jaxrobust.evaluation.network.user_attacks import ALONE, UserAttack
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import stopping
from jaxrobust.runtime.text.spelling import near
from jaxrobust.types import NORMS, check_length, check_threat

AUTOATTACK = "autoattack"
_SETTINGS = ("steps", "targets", "restarts")  # of a named attack
_LENGTHS = ("relative_step", "step")  # of attacks with fixed steps
_FIXED = (*_LENGTHS, "start", "l1_rule")


class GivenFlags(NamedTuple):
    """The flags of `jaxrobust evaluate`; None means not given."""

    workdir: str | None = None
    phase: str | None = None
    model: str | None = None
    function: str | None = None
    torch: str | None = None
    torch_args: dict[str, Any] | None = None
    torch_output: str | None = None
    weights: str | None = None
    options: dict[str, Any] | None = None
    selected: bool = False
    shipped: str | None = None  # name of a packaged run, which `of_shipped` expands
    dataset: str | None = None
    split: str | None = None
    classes: str | None = None
    data_dir: str | None = None
    preprocessing: str | None = None  # None: `pipeline.preprocessing_id`
    num_classes: int | None = None
    image_size: int | None = None
    n: int = 0  # images of the split, spread over its classes; 0: all
    norm: str | None = None
    epsilon: float | None = None
    # Or clean, one of `fixed_steps`, or names of `registry.searching`, with commas.
    attack: str = AUTOATTACK
    version: str = (
        "standard"  # of AutoAttack; or plus, rand, custom, or fast, which is not AutoAttack
    )
    finish: bool = False  # complete an evaluation of the fast version to the standard one
    search_dtype: str = "float32"  # compute type of AutoAttack's search; verdicts use float32
    batch: int | None = None  # images at a time, rounded up to the devices; AutoAttack: per process
    seed: int = 0  # of the attacks' draws
    steps: int | None = None  # of a named attack, replacing its default; likewise the next two
    targets: int | None = None
    restarts: int | None = None
    relative_step: float | None = None  # fixed steps: each step is this times epsilon / K
    step: float | None = None  # fixed steps: their length in units of the norm
    start: str | None = None  # fixed steps: a row of `fixed_steps.STARTS`; None: the default
    l1_rule: str | None = None  # fixed steps in L1: a row of `attacks.L1_RULES`; None: sparse
    rule: str | None = None  # for verdicts of version rand, see `randomised.verdict`
    draws: int | None = None  # number of draws for the rule
    worst_case: bool = False
    union_only: bool = False  # attack in each ball only the survivors of the balls before it
    replay: tuple[str, ...] = ()  # folders of evaluations whose adversarial images are tried first
    noreplay: bool = False  # do not replay this network's results at other radii either
    again: bool = False  # compute a second record even if one exists
    against: str | None = None  # stop once this record is behind or ahead: see `stops`
    until_width: float | None = None  # points; stop once the interval is narrower
    tie: float | None = None  # points; also stop once both differ by less
    alpha: float | None = None  # of a stop; None: 0.05
    corruptions: str | None = None
    frost: str | None = None
    certify: float | None = None
    points: tuple[str, ...] = ()
    users: tuple[UserAttack, ...] = ()  # from --points and --attack, read by `of_users`
    bundle: str | None = None
    out: str | None = None

    @property
    def names(self) -> tuple[str, ...] | None:
        """List the attacks of the search; None: those of the version."""
        if self.attack == ALONE:
            return ()
        return None if self.attack == AUTOATTACK else tuple(self.attack.split(","))

    @property
    def searches(self) -> bool:
        """Tell whether AutoAttack's engine runs, which attacks each image until it is fooled."""
        names = attack_rows.searching().keys()
        return self.attack in (AUTOATTACK, ALONE) or set(self.attack.split(",")) <= names

    @property
    def replays(self) -> bool:
        """Tell whether stored adversarial images can be tried: not on a randomised network."""
        return self.searches and self.version != "rand"

    @property
    def fixed(self) -> fixed_steps.FixedSteps | None:
        """Find the attack with fixed steps; None if it is another kind."""
        return fixed_steps.parse(self.attack)

    @property
    def changes(self) -> dict[str, Any]:
        """List the settings that replace the attack's defaults."""
        settings = {key: getattr(self, key) for key in (*_SETTINGS, *_FIXED)}
        return {key: value for key, value in settings.items() if value is not None}

    @property
    def method(self) -> str:
        """Name the attack with its settings, for the record."""
        judged = [randomised.verdict(self.rule, self.draws).words()] * (self.version == "rand")
        if self.version == ensembles.FAST:
            return stopping.FAST_METHOD
        names = [] if self.attack == ALONE else self.attack.split(",")
        names = [f"{AUTOATTACK} {self.version}"] if self.attack == AUTOATTACK else names
        attacks = " + ".join([*names, *(user.name for user in self.users)])
        if self.attack == AUTOATTACK:
            return ", ".join([attacks, *judged])
        version = [self.version] if self.version != "standard" else []
        words = [f"{key} {_as_flag(key, value)}" for key, value in self.changes.items()]
        return ", ".join([attacks, *version, *words, *judged])

    def overrides(self) -> dict[str, dict[str, Any]] | None:
        """List each attack's changes to settings that it has, as `autoattack` takes them."""
        changes, overrides = self.changes, {}
        for name in self.names or ():
            of_name = {key: changes[key] for key in ensembles.adjustable(name) if key in changes}
            if of_name:
                overrides[name] = of_name
        return overrides or None


def following(attack: str, version: str, norm: str) -> tuple[str, ...]:
    """List the attacks of `--attack` and `--version` that follow input gradients."""
    if fixed_steps.parse(attack):
        return (attack,)
    rows = attack_rows.searching()
    versions = ensembles.versions(norm)
    names = versions.get(version, ()) if attack == AUTOATTACK else attack.split(",")
    return tuple(name for name in names if name in rows and rows[name][0].backward)


def _as_flag(key: str, value: Any) -> str:
    """Format a setting for people; a step such as 0.8/255 exactly, so that it can be reread."""
    return value if isinstance(value, str) else repr(value) if key == "step" else f"{value:g}"


def check(question: GivenFlags, subject: Subject, source: registry.Source) -> None:
    """Raise on invalid flags, worded for the command line, before anything compiles."""
    if not (question.searches or question.attack == "clean" or question.fixed):
        single = [name for name, row in attack_rows.fixed().items() if row.single]
        names = ("clean", *single, AUTOATTACK, *attack_rows.searching())
        unknown = [name for name in question.attack.split(",") if name not in names]
        raise ValueError(
            f"--attack={question.attack} is unknown; {near(unknown[0], names) if unknown else ''}"
            f"one of clean, {fixed_steps.written()}, autoattack, or of its attacks, with commas: "
            f"{', '.join(attack_rows.searching())}"
        )
    if question.attack != "clean":
        if subject.threat is None:
            unit = "in units of the [0, 1] pixel range, such as 4/255"
            unit = "a number of pixels, such as 24" if subject.norm == "l0" else unit
            raise ValueError(f"give --epsilon, {unit}")
        check_threat(subject.threat, subject.image_size, subject.network.in_channels or 3)
        if question.bundle and subject.norm not in NORMS:
            raise ValueError(
                f"--bundle supports {', '.join(NORMS)}, not {subject.norm}; leave it out"
            )
    _check_choices(question, subject)
    for flag, value, low in (
        ("n", question.n, 0),
        ("batch", question.batch, 1),
        ("seed", question.seed, 0),
        *((key, getattr(question, key), 1) for key in _SETTINGS),
    ):
        if value is not None and value < low:
            raise ValueError(f"--{flag}={value} must be at least {low}")
    if question.seed >= 2**32:  # JAX makes keys from 32 bits and would drop the rest
        raise ValueError(f"--seed={question.seed} must be below 2^32")
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


def _check_choices(question: GivenFlags, subject: Subject) -> None:
    attack = question.users[0].file if question.attack == ALONE else question.attack
    _check_version(question, attack)
    if question.users and not question.searches:
        raise ValueError(
            f"{question.users[0].flag} is tried on what attacks leave image by image, not on what "
            f"--attack={attack} does; give --attack autoattack, or clean for its points alone"
        )
    if question.union_only and not question.searches:
        raise ValueError(
            f"--union_only needs attacks that continue image by image, not {attack}; leave it out"
        )
    if question.replay and not question.replays:
        rand = " of --version=rand" if question.searches else ""
        raise ValueError(f"--replay has no effect on --attack={attack}{rand}; leave it out")
    if question.replay and question.noreplay:
        raise ValueError("--noreplay contradicts --replay; give one of them")
    if question.version == ensembles.CUSTOM and attack == AUTOATTACK:
        raise ValueError("--version=custom needs its attacks: --attack apgd-ce,apgd-t")
    names = question.names if question.searches else None
    for flag, value in question.changes.items():
        takes = any(flag in ensembles.adjustable(name) for name in names or ())
        if not (takes if flag in _SETTINGS else question.fixed):
            remedy = "name an attack of it, such as apgd-t" if attack == AUTOATTACK else ""
            typed = f"--{flag}={_as_flag(flag, value)}"
            raise ValueError(
                f"{typed} has no effect on --attack={attack}; {remedy or 'leave it out'}"
            )
    _check_fixed(question, subject.norm)


def _check_version(question: GivenFlags, attack: str) -> None:
    versions = (*ensembles.VERSIONS, ensembles.CUSTOM)
    for flag, choices in (("version", versions), ("search_dtype", ("float32", "bfloat16"))):
        value = getattr(question, flag)
        if value not in choices:
            raise ValueError(f"--{flag}={value} is unknown; one of {', '.join(choices)}")
        if value != choices[0] and (not question.searches or question.attack == ALONE):
            raise ValueError(f"--{flag}={value} has no effect on --attack={attack}; leave it out")
    if question.version == "rand":
        if question.search_dtype != "float32":
            raise ValueError("--version=rand searches in float32; leave --search_dtype out")
        try:
            randomised.verdict(question.rule, question.draws)
        except ValueError as error:
            raise ValueError(f"--{error}") from error
        return
    for flag, value in (("rule", question.rule), ("draws", question.draws)):
        if value is not None:
            raise ValueError(
                f"--{flag}={value} judges randomised networks; give --version=rand, or leave it out"
            )


def _check_fixed(question: GivenFlags, norm: str) -> None:
    """Raise on invalid settings of attacks with fixed steps."""
    if question.fixed and norm not in NORMS:
        raise ValueError(
            f"--attack={question.attack} has no {norm} ball; give --attack=autoattack, or --norm, "
            f"one of {', '.join(NORMS)}"
        )
    if question.step is not None and question.relative_step is not None:
        raise ValueError(
            f"--step={question.step:g} and --relative_step={question.relative_step:g} both say how "
            "long a step is; give one"
        )
    for flag in _LENGTHS:
        value = getattr(question, flag)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag}={value:g} must be above 0")
    check_length("--step", question.step or 0, norm)
    for flag, choices in (("start", fixed_steps.STARTS), ("l1_rule", tuple(attacks.L1_RULES))):
        value = getattr(question, flag)
        if value is not None and value not in choices:
            raise ValueError(f"--{flag}={value} is unknown; one of {', '.join(choices)}")
    if question.l1_rule and norm != "l1":
        raise ValueError(f"--l1_rule={question.l1_rule} is for l1, not {norm}; leave it out")
    if str(question.start).startswith("uniform") and not attacks.GEOMETRIES[norm].fill:
        raise ValueError(
            f"--start={question.start} is for {filled()}, not {norm}; leave it out, or give "
            "--start=random"
        )
