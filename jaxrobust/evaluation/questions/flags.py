"""Resolves the flags of the command: the network, its weights, and the facts stored with them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.network import user_attacks
from jaxrobust.evaluation.questions import mistakes, questions
from jaxrobust.evaluation.questions import target as subjects
from jaxrobust.evaluation.questions.stated import FAST, STOPS, GivenFlags, written
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.models.published import PUBLISHED
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.files import buckets
from jaxrobust.runtime.text.progress import say
from jaxrobust.runtime.text.spelling import norm
from jaxrobust.types import Threat, Weights, threats
from jaxrobust.weights import imports
from jaxrobust.weights.fetch import sources as weights_sources
from jaxrobust.weights.trained import history, kept, runs


def of_users(flags: GivenFlags, several: Sequence[str]) -> GivenFlags:
    """Read the user's points and attacks; flags in `several` ask for more than one evaluation."""
    attack, users = user_attacks.of_flags(flags.attack, flags.points)
    if not users:
        return flags
    version = ["version"] if flags.version in (FAST, "rand") else []
    names = ("corruptions", "certify", *version, "finish", *STOPS, "worst_case", "union_only")
    if others := [*written(flags, *names), *several]:
        raise ValueError(
            f"{users[0].flag} only works for a single evaluation of one threat; "
            f"leave {' and '.join(others)} out"
        )
    return flags._replace(attack=attack, users=users)


def placed(flags: GivenFlags) -> GivenFlags:
    """Fill in the paths that flags name; fetch weights if needed."""
    flags = _with_weights(flags._replace(norm=flags.norm and norm(flags.norm)))
    local: dict[str, Any] = {
        flag: str(buckets.opened(flag, path))
        for flag in ("workdir", "out", "bundle")
        if (path := getattr(flags, flag))
    }
    flags = flags._replace(**local)
    remote = [flag for flag, path in local.items() if buckets.address(Path(path))]
    if remote and jax.process_count() > 1:
        raise ValueError(
            f"--{remote[0]} in a bucket needs a single host, since the hosts of an evaluation read "
            "each other's files; mount the bucket with gcsfuse on each host and give that path"
        )
    if not flags.selected:
        return flags
    if not flags.workdir:
        raise ValueError("--selected chooses weights of a run; give its --workdir RUN")
    if flags.phase:
        raise ValueError("--selected also chooses the phase; leave --phase out")
    chosen = kept.selected(Path(flags.workdir))
    return flags._replace(phase=chosen.phase, image_size=flags.image_size or chosen.image_size)


def _with_weights(flags: GivenFlags) -> GivenFlags:
    if not flags.weights or flags.workdir or flags.function or flags.torch:
        return flags
    if flags.model and weights_sources.is_missing_file(flags.weights):
        return flags  # other mistakes are reported first
    here = imports.local(weights_sources.parse(flags.weights), model=flags.model)
    if here.kind == "run":
        if flags.model:
            raise ValueError(
                f"--weights {here.path} is a run, which stores its model; leave --model out"
            )
        return flags._replace(workdir=str(here.path), weights=None)
    imported = here.kind == "folder" and flags.model in PUBLISHED
    return flags._replace(weights=str(here.path), model=None if imported else flags.model)


def check(flags: GivenFlags) -> None:
    """Raise if flags, whose weights are here, contradict each other or name no network."""
    mistakes.check_network(flags, of_weights=_folder(flags) is not None)


def _folder(flags: GivenFlags) -> Path | None:
    folder = Path(flags.weights) if flags.weights else None
    if folder and (flags.workdir or flags.function or flags.torch or not folder.is_dir()):
        return None  # a file does not name its model
    return folder


def origin(flags: GivenFlags) -> Subject:
    """Describe the network named by checked flags."""
    if flags.workdir:
        return subjects.of_run(Path(flags.workdir), flags.phase)
    random = flags.version == "rand"
    if flags.function:
        return subjects.of_function(flags.function, random=random)
    if flags.torch:
        return subjects.of_torch(flags.torch, flags.torch_args, flags.torch_output, random=random)
    if folder := _folder(flags):
        subject = subjects.of_folder(folder, flags.model, flags.options)
    else:
        subject = subjects.of_file(str(flags.model), Path(str(flags.weights)), flags.options)
    classes = subject.network.num_classes
    if None not in (classes, flags.num_classes) and classes != flags.num_classes:
        raise ValueError(
            f"--num_classes={flags.num_classes}, but {folder} has {classes} classes; leave it out"
        )
    return subject


def trained(flags: GivenFlags) -> list[Threat]:
    """List the threats that a run trained with if there are several, else none."""
    if not flags.workdir:
        return []
    balls = threats(runs.run_config(Path(flags.workdir), flags.phase).attack)
    return list(balls) if len(balls) > 1 else []


def own_balls(flags: GivenFlags) -> list[Threat]:
    """List a run's several threats if flags ask for an attack and name no norm, else none."""
    names_ball = flags.norm or flags.epsilon is not None or flags.attack == "clean"
    other = names_ball or flags.worst_case or flags.corruptions or flags.certify is not None
    return [] if other else trained(flags)


def settled(flags: GivenFlags) -> tuple[Subject, Subject, registry.Source]:
    """Describe the network of checked flags, complete the evaluated subject, and open its images.

    For a run with several norms, --norm alone implies the radius that it trained with.
    """
    of_flags = origin(flags)
    for ball in trained(flags) if flags.norm and flags.epsilon is None else []:
        if ball.norm == flags.norm:
            flags = flags._replace(epsilon=ball.epsilon)
    sizes = {"num_classes": flags.num_classes, "image_size": flags.image_size}
    keys = ("dataset", "split", "classes", "data_dir", "norm", "epsilon")
    about = {key: getattr(flags, key) for key in keys}
    return of_flags, *subjects.settled(of_flags, network=sizes, **about)


def weights(
    flags: GivenFlags, subject: Subject, source: registry.Source
) -> tuple[str | None, Subject, Weights]:
    """Load a subject's weights; return their name, the subject updated from them, and them."""
    if flags.workdir:
        run = Path(flags.workdir)
        phase = runs.phase_of(run, flags.phase)
        runs.check_classes(runs.classes_file(run, phase), source, renamed=True)
        if other := runs.rewritten(run, subject.origin()):
            say(other)
        size = subject.network.image_size
        if flags.selected:
            name, read = kept.selected_weights(run, kept.selected(run), image_size=size)
            subject = replace(subject, chosen=kept.chosen_on(run))
        else:
            name, read = runs.run_weights(run, flags.phase, image_size=size)
        steps = history.of_run(run, name.partition(",")[0], chosen=subject.chosen)
        return name, replace(subject, history=steps), read
    if flags.torch:
        few = min(pytorch.find("compared_images"), len(source))
        size = subject.image_size
        preprocessing = pipeline.preprocessing_id(source, size, flags.preprocessing)
        prepared = Prepared(source, image_size=size, preprocessing=preprocessing, images=few)
        images = np.asarray(prepared[np.arange(len(prepared))], np.float32)
        search = (flags.attack, flags.version, subject.norm)
        following = () if flags.corruptions else questions.following(*search)
        return None, *subjects.with_arrays(subjects.in_jax(subject, images, following))
    if flags.function:
        return None, *subjects.with_arrays(subject)
    name, network, read = subjects.file_weights(subject.network, Path(str(flags.weights)))
    return name, replace(subject, network=network), read
