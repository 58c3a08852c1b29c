"""From the flags of the command to what they name: a network, its weights, and what these say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.attacks.ensembles import FAST
from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.network import user_attacks
from jaxrobust.evaluation.questions import questions
from jaxrobust.evaluation.questions import target as subjects
from jaxrobust.evaluation.questions.questions import GivenFlags
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.models.published import PUBLISHED
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.files import folders
from jaxrobust.runtime.text.progress import say
from jaxrobust.runtime.text.spelling import norm
from jaxrobust.types import NORMS, Threat, Weights, threats
from jaxrobust.weights import imports
from jaxrobust.weights.fetch import shipped
from jaxrobust.weights.fetch import sources as weights_sources
from jaxrobust.weights.trained import history, kept, runs

_STOPS = ("against", "until_width")


def of_shipped(given: GivenFlags) -> GivenFlags:
    """Spell out the flags that the name of a run of the package stands for; those given stay.

    Raises:
      ValueError: another network is named beside it, or a phase that the run has not.
    """
    if given.shipped is None:
        return given
    if named := written(given, "workdir", "model", "weights", "function", "torch"):
        raise ValueError(
            f"{given.shipped} names a network, and so does {' and '.join(named)}; leave one out"
        )
    weights = f"{given.shipped}:{given.phase}" if given.phase else given.shipped
    shipped.weights(weights)  # refuses
    if Path(weights).exists():
        raise ValueError(
            f"{weights} names the network of the package and a path here; give that one with "
            f"--workdir {weights} or --weights {weights}, or evaluate the package's elsewhere"
        )
    out = given.out or f"runs/evaluation-{weights.replace(':', '-')}"
    dataset = given.dataset or shipped.RUNS[given.shipped].dataset
    return given._replace(weights=weights, shipped=weights, phase=None, out=out, dataset=dataset)


def written(given: GivenFlags, *names: str) -> list[str]:
    """List those of some flags that are given, as on the command line."""
    values = {name: getattr(given, name) for name in names}
    valued = ("attack", "version", "search_dtype")
    return [
        f"--{name}={value}" if name in valued else f"--{name}"
        for name, value in values.items()
        if value != GivenFlags._field_defaults[name]
    ]


def of_users(given: GivenFlags, several: Sequence[str]) -> GivenFlags:
    """Read the points and attacks of the user; `several` name many evaluations."""
    attack, users = user_attacks.of_flags(given.attack, given.points)
    if not users:
        return given
    version = ["version"] if given.version in (FAST, "rand") else []
    names = ("corruptions", "certify", *version, "finish", *_STOPS, "worst_case", "union_only")
    if others := [*written(given, *names), *several]:
        raise ValueError(
            f"{users[0].flag} is tried on the images that one evaluation of one threat leaves; "
            f"leave {' and '.join(others)} out"
        )
    return given._replace(attack=attack, users=users)


def placed(given: GivenFlags) -> GivenFlags:
    """Fill in the paths of what flags name; weights are brought here if need be."""
    given = _with_weights(given._replace(norm=given.norm and norm(given.norm)))
    mounted: dict[str, Any] = {
        flag: str(folders.mounted(flag, path))
        for flag in ("workdir", "out", "bundle")
        if (path := getattr(given, flag))
    }
    given = given._replace(**mounted)
    if not given.selected:
        return given
    if not given.workdir:
        raise ValueError("--selected names weights of a run; give its --workdir RUN")
    if given.phase:
        raise ValueError("--selected names the phase too; leave --phase out")
    chosen = kept.selected(Path(given.workdir))
    return given._replace(phase=chosen.phase, image_size=given.image_size or chosen.image_size)


def _with_weights(given: GivenFlags) -> GivenFlags:
    if not given.weights or given.workdir or given.function or given.torch:
        return given
    if given.model and weights_sources.is_missing_file(given.weights):
        return given  # whose other mistakes are said first
    here = imports.local(weights_sources.parse(given.weights), model=given.model)
    if here.kind == "run":
        if given.model:
            raise ValueError(
                f"--weights {here.path} is a run, which says whose it is; leave --model out"
            )
        return given._replace(workdir=str(here.path), weights=None)
    imported = here.kind == "folder" and given.model in PUBLISHED
    return given._replace(weights=str(here.path), model=None if imported else given.model)


def check(given: GivenFlags) -> None:
    """Raise `ValueError` for flags that contradict each other, or name nothing to evaluate."""
    if given.norm not in (None, *NORMS):
        raise ValueError(f"--norm={given.norm} is unknown; one of {', '.join(NORMS)}")
    named = written(given, "workdir", "function", "torch")
    if given.model or _folder(given):
        named.append("--model" if given.model else "--weights")
    if len(named) != 1:
        several = f"{' and '.join(named)} name a network each, and records go to --out DIR; "
        raise ValueError(
            (several if named else "")
            + "give --workdir RUN, or --model NAME --weights PATH --dataset NAME (no --model where "
            "PATH is a folder that jaxrobust import wrote, or a name such as "
            "Salman2020Do_R18), or --function my_net.py:logits_fn --dataset NAME, or --torch "
            "my_models.py:build --dataset NAME"
        )
    if given.model and not given.weights:
        raise ValueError("--model needs --weights PATH, its weights")
    extra = written(given, "weights", "num_classes", "options")
    if given.workdir and extra:
        raise ValueError(f"{' and '.join(extra)} would replace the run's own; that takes --model")
    if given.weights and given.phase:
        raise ValueError("--phase is one of a --workdir; --weights has but one")
    if (given.function or given.torch) and (extra := [*extra, *written(given, "phase")]):
        flag = "--torch" if given.torch else "--function"
        raise ValueError(f"{' and '.join(extra)} says nothing of a {flag}; leave it out")
    if given.function and given.search_dtype == "bfloat16":
        raise ValueError(
            "--search_dtype=bfloat16 needs a network whose compute type can be set; leave it out, "
            "or pass evaluation.autoattack a search_fn"
        )
    if not given.torch and (needless := written(given, "torch_args", "torch_output")):
        raise ValueError(f"{' and '.join(needless)} belongs to --torch; leave it out")


def check_fast(given: GivenFlags, several: Sequence[str]) -> None:
    """Refuse flags that contradict --version=fast or --finish; `several` name many evaluations."""
    if given.version != FAST and not given.finish:
        return
    asked = "--finish" if given.finish else f"--version={FAST}"
    if given.finish and given.version not in ("standard", FAST):
        raise ValueError(
            f"--finish makes an evaluation of the standard version; leave --version={given.version}"
            " out"
        )
    others = written(given, "corruptions", "certify") or written(given, "attack")
    again = ["again"] if given.finish else []
    others += written(given, *_STOPS, "search_dtype", "worst_case", "union_only", *again)
    if others := [*others, *several]:
        what = "goes on with" if given.finish else "is"
        raise ValueError(
            f"{asked} {what} one evaluation, whose attacks are all of AutoAttack's standard "
            f"version or a part of them; leave {' and '.join(others)} out, or leave {asked} out"
        )
    if given.bundle and not given.finish:
        raise ValueError(
            f"--bundle is of numbers that others check as AutoAttack's, not of --version={FAST}; "
            "leave it out, and give it with --finish"
        )


def _folder(given: GivenFlags) -> Path | None:
    folder = Path(given.weights) if given.weights else None
    if folder and (given.workdir or given.function or given.torch or not folder.is_dir()):
        return None  # a file, which does not say whose it is
    return folder


def origin(given: GivenFlags) -> Subject:
    """Describe the network that checked flags name."""
    if given.workdir:
        return subjects.of_run(Path(given.workdir), given.phase)
    random = given.version == "rand"
    if given.function:
        return subjects.of_function(given.function, random=random)
    if given.torch:
        return subjects.of_torch(given.torch, given.torch_args, given.torch_output, random=random)
    if folder := _folder(given):
        subject = subjects.of_folder(folder, given.model, given.options)
    else:
        subject = subjects.of_file(str(given.model), Path(str(given.weights)), given.options)
    classes = subject.network.num_classes
    if None not in (classes, given.num_classes) and classes != given.num_classes:
        raise ValueError(
            f"--num_classes={given.num_classes}, but {folder} holds {classes}; leave it out"
        )
    return subject


def trained(given: GivenFlags) -> list[Threat]:
    """List the balls that a run trained in where they are several, else none."""
    if not given.workdir:
        return []
    balls = threats(runs.run_config(Path(given.workdir), given.phase).attack)
    return list(balls) if len(balls) > 1 else []


def own_balls(given: GivenFlags) -> list[Threat]:
    """List the several balls of a run where flags ask of an attack and name no norm, else none."""
    named = given.norm or given.epsilon is not None or given.attack == "clean"
    other = named or given.worst_case or given.corruptions or given.certify is not None
    return [] if other else trained(given)


def settled(given: GivenFlags) -> tuple[Subject, Subject, registry.Source]:
    """Describe the network of checked flags, settle the evaluated subject, and open its images.

    Of a run of several norms --norm alone means the radius that it trained with in that norm.
    """
    of_flags = origin(given)
    for ball in trained(given) if given.norm and given.epsilon is None else []:
        if ball.norm == given.norm:
            given = given._replace(epsilon=ball.epsilon)
    sizes = {"num_classes": given.num_classes, "image_size": given.image_size}
    keys = ("dataset", "split", "classes", "data_dir", "norm", "epsilon")
    about = {key: getattr(given, key) for key in keys}
    return of_flags, *subjects.settled(of_flags, network=sizes, **about)


def weights(
    given: GivenFlags, subject: Subject, source: registry.Source
) -> tuple[str | None, Subject, Weights]:
    """Load the weights of a settled subject: their name, the subject with what they say, them."""
    if given.workdir:
        run = Path(given.workdir)
        phase = runs.phase_of(run, given.phase)
        runs.check_classes(runs.classes_file(run, phase), source, renamed=True)
        if other := runs.rewritten(run, subject.origin()):
            say(other)
        size = subject.network.image_size
        if given.selected:
            which, read = kept.selected_weights(run, kept.selected(run), image_size=size)
            subject = replace(subject, chosen=kept.chosen_on(run))
        else:
            which, read = runs.run_weights(run, given.phase, image_size=size)
        steps = history.of_run(run, which.partition(",")[0], chosen=subject.chosen)
        return which, replace(subject, history=steps), read
    if given.torch:
        few = min(pytorch.find("compared_images"), len(source))
        size = subject.image_size
        how = pipeline.preprocessing_id(source, size, given.preprocessing)
        prepared = Prepared(source, image_size=size, preprocessing=how, images=few)
        images = np.asarray(prepared[np.arange(len(prepared))], np.float32)
        following = () if given.corruptions else questions.following(given.attack, given.version)
        return None, *subjects.with_arrays(subjects.in_jax(subject, images, following))
    if given.function:
        return None, *subjects.with_arrays(subject)
    which, network, read = subjects.file_weights(subject.network, Path(str(given.weights)))
    return which, replace(subject, network=network), read
