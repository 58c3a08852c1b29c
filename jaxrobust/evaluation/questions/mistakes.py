"""Mistakes in the flags of an evaluation that the flags alone show, before JAX is imported."""

import math
import re
from collections.abc import Sequence
from typing import Any

from jaxrobust.evaluation.questions.stated import (
    ALONE,
    AUTOATTACK,
    FAST,
    FIXED,
    LENGTHS,
    SEARCHES,
    SETTINGS,
    STOPS,
    VERSIONS,
    GivenFlags,
    as_flag,
    of_shipped,
    several_of,
    stop_of,
    written,
)
from jaxrobust.runtime.commandline import functions, threats
from jaxrobust.runtime.text.spelling import near
from jaxrobust.runtime.threats import THREAT_NORMS, check_radius

_ATTACKS = ("clean", *FIXED[:1], AUTOATTACK, *SEARCHES)
_TYPES = ("float32", "bfloat16")  # of a search


def check(
    flags: GivenFlags,
    sizes: Sequence[int | None],
    threat: Sequence[str],
    ladder: str | None,
    radius_at: int | None,
) -> None:
    """Raise on mistakes that need neither JAX nor a file; `command.evaluated` finds the others."""
    flags = of_shipped(flags)
    check_network(flags, of_weights=bool(flags.weights))
    several = several_of(sizes, threat, ladder)
    if not has_users(flags):
        names = "|".join(("clean", AUTOATTACK, *FIXED, *SEARCHES)).replace("K", r"[1-9]\d{0,6}")
        wrong = [name for name in flags.attack.split(",") if not re.fullmatch(names, name)]
        stems = [name.removesuffix("-K") for name in FIXED]
        # Other names may belong to attacks that you added; `check_attack` decides.
        if any(near(name, _ATTACKS) or name.rpartition("-")[0] in stems for name in wrong):
            raise unknown_attack(flags.attack)
        check_fast(flags, several)
        check_stop(flags, several)
    check_certify(of_corruptions(flags))
    check_values(flags)
    if flags.epsilon is not None:  # a run says its norm itself, but every norm needs such a radius
        check_radius(flags.norm or ("linf" if flags.shipped else "l2"), flags.epsilon)
    check_many(flags, sizes, threat, ladder, radius_at)
    for text in threat:
        threats.parse(text)
    if ladder:
        threats.ladder(ladder)


def has_users(flags: GivenFlags) -> bool:
    """Return whether the flags name the user's own attacks or adversarial images."""
    names = flags.attack.split(",")
    is_own = [functions.is_name(name) or name.endswith(".py") for name in names]
    return bool(flags.points) or any(is_own)


def check_certify(flags: GivenFlags) -> None:
    """Raise if flags contradict `--certify`."""
    if flags.certify is None:
        return
    if flags.norm not in (None, "l2"):
        raise ValueError(
            f"--certify gives radii in l2, the norm of its noise; leave --norm={flags.norm} out"
        )
    if flags.epsilon is not None:
        raise ValueError("--certify finds the radius of each image itself; leave --epsilon out")
    if flags.attack != "clean":
        raise ValueError(f"--certify does not attack; leave --attack={flags.attack} out")
    others = ("corruptions", "bundle", "worst_case", "union_only", "replay", "noreplay", "rule")
    for flag in written(flags, *others):
        raise ValueError(f"{flag} has no effect with --certify; leave it out")
    if flags.version != "standard":
        raise ValueError(f"--certify does not support --version={flags.version}; leave it out")


def of_corruptions(flags: GivenFlags) -> GivenFlags:
    """Complete the flags of an evaluation with `--corruptions`; raise if some contradict it."""
    if flags.corruptions is None:
        if flags.frost is not None:
            raise ValueError(f"--frost={flags.frost} has no effect without --corruptions")
        return flags
    wished = corruptions_of(flags)
    if flags.attack != "clean":
        raise ValueError(f"--corruptions runs without an attack; leave --attack={flags.attack} out")
    if flags.frost is not None and all(corruption.kind != "frost" for corruption in wished):
        raise ValueError(f"--frost={flags.frost} has no effect without the corruption frost")
    if not (flags.dataset or "").startswith("cifar10-c:"):
        return flags
    for flag, value in (("split", flags.split), ("frost", flags.frost)):
        if value is not None:
            raise ValueError(
                f"--{flag}={value} has no effect on the files of {flags.dataset}; leave it out"
            )
    return flags._replace(split=str(wished[0]))


def corruptions_of(flags: GivenFlags) -> list[Any]:
    """Parse the corruptions of the flag."""
    from jaxrobust.data.transforms import corruptions

    try:
        return corruptions.chosen(str(flags.corruptions))
    except ValueError as error:
        raise ValueError(f"--corruptions={flags.corruptions}: {error}") from error


def unknown_attack(attack: str) -> ValueError:
    """Build the error for an attack, or a list of them, that does not exist."""
    wrong = next((name for name in attack.split(",") if name not in _ATTACKS), AUTOATTACK)
    return ValueError(
        f"--attack={attack} is unknown; {near(wrong, _ATTACKS)}choose one of clean, "
        f"{', '.join(FIXED)} (K steps), autoattack, or a comma-separated "
        f"list of its attacks: {', '.join(SEARCHES)}"
    )


def check_attack(question: GivenFlags) -> None:
    """Raise if the attack is unknown, or does not have a setting; imports JAX for the names."""
    from jaxrobust.attacks import ensembles

    if not (question.searches or question.attack == "clean" or question.fixed):
        raise unknown_attack(question.attack)
    attack = question.users[0].file if question.attack == ALONE else question.attack
    _check_version(question, attack)
    if question.users and not question.searches:
        raise ValueError(
            f"{question.users[0].flag} needs attacks that work image by image, not "
            f"--attack={attack}; give --attack=autoattack, or clean to try only its points"
        )
    if question.union_only and not question.searches:
        raise ValueError(
            f"--union_only needs attacks that work image by image, not {attack}; leave it out"
        )
    if question.replay and not question.replays:
        rand = " and --version=rand" if question.searches else ""
        raise ValueError(f"--replay has no effect with --attack={attack}{rand}; leave it out")
    if question.replay and question.noreplay:
        raise ValueError("--noreplay contradicts --replay; give one of them")
    if question.version == ensembles.CUSTOM and attack == AUTOATTACK:
        raise ValueError("--version=custom needs a list of attacks: --attack apgd-ce,apgd-t")
    names = question.names if question.searches else None
    for flag, value in question.changes.items():
        takes = any(flag in ensembles.adjustable(name) for name in names or ())
        if not (takes if flag in SETTINGS else question.fixed):
            remedy = "name one of its attacks, such as apgd-t" if attack == AUTOATTACK else ""
            typed = f"--{flag}={as_flag(flag, value)}"
            raise ValueError(
                f"{typed} has no effect with --attack={attack}; {remedy or 'leave it out'}"
            )


def _check_version(question: GivenFlags, attack: str) -> None:
    from jaxrobust.evaluation.network import randomised

    if not question.searches or question.attack == ALONE:
        for flag in written(question, "version", "search_dtype"):
            raise ValueError(f"{flag} has no effect with --attack={attack}; leave it out")
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
                f"--{flag}={value} is for randomized networks; give --version=rand, or leave it out"
            )


def check_many(
    flags: GivenFlags,
    sizes: Sequence[int | None],
    threat: Sequence[str],
    ladder: str | None,
    radius_at: int | None,
) -> None:
    """Raise if image sizes and threats contradict each other or other flags."""
    if flags.certify is not None and (threat or ladder):
        flag = "ladder" if ladder else "threat"
        raise ValueError(f"--certify finds the radius of each image itself; leave --{flag} out")
    if len(set(sizes)) < len(sizes):
        listed = ", ".join(map(str, sizes))
        raise ValueError(f"--image_size={listed} repeats a size; give each once")
    if small := [size for size in sizes if size is not None and size < 1]:
        raise ValueError(f"--image_size={small[0]} must be at least 1")
    if flags.corruptions and len(sizes) > 1:
        raise ValueError("--corruptions supports only one --image_size; give one")
    if flags.bundle and flags.version == "rand":
        raise ValueError("--bundle needs a deterministic network, not --version=rand")
    has_ball = flags.norm or flags.epsilon is not None
    if ladder and (threat or has_ball):
        raise ValueError("--ladder sets norm and radii; leave --threat, --norm and --epsilon out")
    if threat and has_ball:
        raise ValueError("--threat sets norm and radius; leave --norm and --epsilon out")
    if radius_at is not None and not (radius_at > 0 and sizes and threat):
        raise ValueError(
            f"--radius_at={radius_at} must be an image size in pixels; also give --threat, the "
            "radius at that size, and --image_size, the sizes to scale to"
        )


def check_values(flags: GivenFlags) -> None:
    """Raise if a value is out of range, or none of a few choices."""
    for flag, value, low in (
        ("n", flags.n, 0),
        ("batch", flags.batch, 1),
        ("seed", flags.seed, 0),
        *((key, getattr(flags, key), 1) for key in SETTINGS),
    ):
        if value is not None and value < low:
            raise ValueError(f"--{flag}={value} must be at least {low}")
    if flags.seed >= 2**32:  # JAX makes keys from 32 bits and would drop the rest
        raise ValueError(f"--seed={flags.seed} must be below 2^32")
    if flags.step is not None and flags.relative_step is not None:
        raise ValueError(
            f"--step={flags.step:g} and --relative_step={flags.relative_step:g} both set "
            "the step size; give one"
        )
    for flag in LENGTHS:
        value = getattr(flags, flag)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag}={value:g} must be above 0")
    for flag, choices in (("version", VERSIONS), ("search_dtype", _TYPES)):
        if (name := getattr(flags, flag)) not in choices:
            raise ValueError(f"--{flag}={name} is unknown; choose one of {', '.join(choices)}")


def check_network(flags: GivenFlags, *, of_weights: bool) -> None:
    """Raise if the flags do not name one network; `of_weights`: --weights may name it alone."""
    if flags.norm not in (None, *THREAT_NORMS):
        raise ValueError(f"--norm={flags.norm} is unknown; choose one of {', '.join(THREAT_NORMS)}")
    networks = written(flags, "workdir", "function", "torch")
    if flags.model or (of_weights and not networks):
        networks.append("--model" if flags.model else "--weights")
    if len(networks) != 1:
        several = f"{' and '.join(networks)} each name a network (records go to --out DIR); "
        raise ValueError(
            (several if networks else "")
            + "give --workdir RUN, or --model NAME --weights PATH --dataset NAME (omit --model if "
            "PATH is a folder that jaxrobust import wrote, or a name such as "
            "Salman2020Do_R18), or --function my_net.py:logits_fn --dataset NAME, or --torch "
            "my_models.py:build --dataset NAME"
        )
    if flags.model and not flags.weights:
        raise ValueError("--model needs --weights PATH")
    extra = written(flags, "weights", "num_classes", "options")
    if flags.workdir and extra:
        raise ValueError(
            f"--workdir does not support {' and '.join(extra)}; use --model instead of --workdir"
        )
    if flags.weights and flags.phase:
        raise ValueError("--phase needs a --workdir, because --weights has only one phase")
    if (flags.function or flags.torch) and (extra := [*extra, *written(flags, "phase")]):
        flag = "--torch" if flags.torch else "--function"
        verb, them = ("has", "it") if len(extra) == 1 else ("have", "them")
        raise ValueError(f"{' and '.join(extra)} {verb} no effect with {flag}; leave {them} out")
    if flags.function and flags.search_dtype == "bfloat16":
        raise ValueError(
            "--search_dtype=bfloat16 needs a network whose compute type can be set; leave it out, "
            "or pass a search_fn to evaluation.autoattack"
        )
    if not flags.torch and (needless := written(flags, "torch_args", "torch_output")):
        raise ValueError(f"without --torch, leave {' and '.join(needless)} out")


def check_fast(flags: GivenFlags, several: Sequence[str]) -> None:
    """Raise if flags contradict --version=fast or --finish; `several` ask for more than one."""
    if flags.version != FAST and not flags.finish:
        return
    asked = "--finish" if flags.finish else f"--version={FAST}"
    if flags.finish and flags.version not in ("standard", FAST):
        raise ValueError(
            f"--finish completes a standard evaluation; leave --version={flags.version} out"
        )
    others = written(flags, "corruptions", "certify") or written(flags, "attack")
    again = ["again"] if flags.finish else []
    others += written(flags, *STOPS, "search_dtype", "worst_case", "union_only", *again)
    if others := [*others, *several]:
        verb = "completes" if flags.finish else "is for"
        raise ValueError(
            f"{asked} {verb} one evaluation with all or some of AutoAttack's standard "
            f"attacks; leave {' and '.join(others)} out, or leave {asked} out"
        )
    if flags.bundle and not flags.finish:
        raise ValueError(
            f"--bundle needs all of AutoAttack, not --version={FAST}; "
            "leave it out now, and give it with --finish"
        )


def check_stop(flags: GivenFlags, several: Sequence[str]) -> None:
    """Raise if flags of a stop contradict others; `several` names flags of many evaluations."""
    stop = stop_of(flags)
    for name in ("alpha", "tie") if stop is None else ():
        value = getattr(flags, name)
        if value is not None and not (name == "alpha" and flags.certify is not None):
            of = "--against, --until_width or --certify" if name == "alpha" else "--against"
            raise ValueError(f"--{name}={value:g} has no effect without {of}; leave it out")
    if stop is None:
        return
    if flags.certify is not None:
        raise ValueError(f"{stop} stops attacks, but --certify runs none; leave one of them out")
    if flags.against and flags.until_width is not None:
        raise ValueError("--against and --until_width both set when to stop; give one of them")
    if flags.alpha is not None and not 0 < flags.alpha < 1:
        raise ValueError(
            f"--alpha={flags.alpha:g} must be a probability of a false alarm between 0 and 1, such "
            "as 0.05"
        )
    if flags.tie is not None and not flags.against:
        raise ValueError(f"--tie={flags.tie:g} has no effect without --against; leave it out")
    for name in ("tie", "until_width"):
        points = getattr(flags, name)
        if points is not None and not 0 < points < 100:
            raise ValueError(f"--{name}={points:g} must be above 0 and below 100 points")
    _check_others(flags, stop, several)


def _check_others(flags: GivenFlags, stop: str, several: Sequence[str]) -> None:
    from jaxrobust.attacks import fixed_steps  # JAX

    if not fixed_steps.is_cascade(flags.attack):
        raise ValueError(
            f"{stop} needs attacks that work image by image, such as --attack=autoattack; "
            f"leave {flags.attack} out"
        )
    if flags.version == "rand":
        raise ValueError(f"{stop} needs a deterministic network, not --version=rand")
    names = ("search_dtype", "replay", "worst_case", "union_only", "corruptions", "bundle")
    if others := [*written(flags, *names), *several]:
        raise ValueError(
            f"{stop} needs one plain evaluation in float32; leave {' and '.join(others)} out, or "
            f"leave {stop} out"
        )
