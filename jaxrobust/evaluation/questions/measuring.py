"""One evaluation of one network: searched image by image, or counted batch by batch."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import fixed_steps
from jaxrobust.data.sources import registry
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.network import collapse, label_checks, reliability
from jaxrobust.evaluation.questions.questions import GivenFlags
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records.record import AccuracyRecord, AttackCost, AttackSettings, Measured
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.models.interface.network_inputs import cast
from jaxrobust.runtime.devices import sharding
from jaxrobust.types import Attack, Threat, Weights

LogitsOf = Callable[[str], Any]  # compute type -> logits_fn


def networks_of(subject: Subject, weights: Weights) -> LogitsOf:
    """Return a cached function from compute type to the network as `autoattack` takes it."""

    @functools.cache
    def logits_fn(dtype: str) -> Any:
        net = subject.create(dtype)

        def logits(params: Any, stats: Any, images: Any, *keys: Any) -> Any:
            key = keys[0] if subject.keyed else None
            return net.apply(params, stats, images, key=key)[0]

        return jax.tree_util.Partial(logits, cast(weights.params, jnp.dtype(dtype)), weights.stats)

    return logits_fn


def counted(
    subject: Subject,
    source: registry.Source,
    weights: Weights,
    question: GivenFlags,
    places: np.ndarray,
) -> Measured:
    """Measure accuracy on clean images, or on the last iterates of an attack with fixed steps.

    With more than five classes `clean_top5` is noted; with an attack also `stable` and
    `local_lipschitz`, the means of the facts in `accuracy.judged`.
    """
    settings, attack = attack_of(question, subject.ball)
    mesh = sharding.make_mesh()
    batch = min(question.batch or subject.batch_size, question.n)
    images = accuracy.EvaluatedImages(
        source,
        image_size=subject.image_size,
        batch_size=-(-batch // mesh.size) * mesh.size,
        places=tuple(places.tolist()),
        seed=question.seed,
        preprocessing=question.preprocessing,
        workers=subject.workers,
    )
    net = subject.create("float32")
    counter = accuracy.counter(net, attack, mesh=mesh, top5=True, norm=subject.norm)
    start = time.perf_counter()
    run = (counter, weights, images, mesh)
    reached = accuracy.each(*run, bar=question.attack) if len(places) else dict(_NOTHING)
    seconds = time.perf_counter() - start  # with compilation
    measured = answered(reached, question, places, settings, seconds, source.num_classes)
    if not len(places):
        return measured
    moved = ("stable", "local_lipschitz") if question.fixed else ()
    keys = [key for key in ("clean_top5", *moved) if key in reached]
    return measured.noting(**{key: float(reached[key].mean()) for key in keys})


def answered(
    reached: dict[str, np.ndarray],
    question: GivenFlags,
    places: np.ndarray,
    settings: list[AttackSettings],
    seconds: float,
    classes: int,
) -> Measured:
    """Gather the results of `accuracy.judged` for the images at `places`."""
    verdicts, n = verdicts_of(reached, question.attack, places), len(places)
    fixed = question.fixed
    cost: AttackCost = {
        "attack": question.attack,
        "fooled": int((verdicts.clean & ~verdicts.robust).sum()),
        "forward": n * (fixed.forward + 2 if fixed else 1),
        "backward": n * fixed.backward if fixed else 0,
        "idle": 0,
        "seconds": seconds,
        "compile_seconds": 0.0,
    }
    robust = float(verdicts.robust.mean()) if n and fixed else None
    record = AccuracyRecord(
        attacks=settings,
        clean=float(verdicts.clean.mean()) if n else None,
        robust=robust,
        accuracy_after={question.attack: robust} if fixed else {},
        flags=reliability.check_answers(reached["finite"], verdicts.fooled_by, verdicts.reached)
        | label_checks.check_answers(reached["answers"], reached["labels"], classes)
        | collapse.flags(reached["answers"], reached["labels"]),
        costs=[cost],
    )
    return Measured(record, verdicts)


# The results if no images survive.
_NOTHING = {name: np.zeros(0, bool) for name in ("clean", "robust", "finite")}
_NOTHING |= {name: np.zeros(0, np.int32) for name in ("labels", "norms", "answers", "reached")}


def attack_of(question: GivenFlags, threat: Threat) -> tuple[list[AttackSettings], Attack]:
    """Make the attack and its settings for the record; without an attack, the list is empty."""
    if question.fixed is None:
        return [], lambda logits_fn, key, images, labels: images
    fixed, relative = question.fixed, question.relative_step
    length = fixed.length(threat.epsilon, step=question.step, relative=relative)
    settings: Any = fixed.settings(
        threat, length=length, start=question.start, l1_rule=question.l1_rule
    )
    return [settings], fixed_steps.attack_of(settings)


def verdicts_of(reached: dict[str, np.ndarray], attack: str, places: np.ndarray) -> Verdicts:
    """Build an attack's verdicts on the images at `places` of a split."""
    clean, robust = reached["clean"], reached["robust"]
    return Verdicts(
        image_ids=places.astype(np.uint32),
        labels=reached["labels"],
        clean=clean,
        fooled_by=np.where(clean, np.where(robust, "", attack), "clean"),
        norms=np.where(clean & ~robust, reached["norms"].astype(np.float64), 0.0),
        reached=np.where(clean & ~robust, reached["reached"], -1),
    )
