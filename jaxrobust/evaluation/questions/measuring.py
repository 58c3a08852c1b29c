"""One question to one network: searched image by image, or counted batch by batch."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import fixed_steps
from jaxrobust.data import Prepared
from jaxrobust.data.sources import registry
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.engine.autoattack import AutoAttackResult, autoattack
from jaxrobust.evaluation.engine.cascade import Cost
from jaxrobust.evaluation.network import collapse, reliability
from jaxrobust.evaluation.network.fingerprint import Fingerprint
from jaxrobust.evaluation.network.images import Subset
from jaxrobust.evaluation.questions.questions import Question
from jaxrobust.evaluation.questions.target import Subject
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.models.interface.inputs import cast
from jaxrobust.runtime.devices import sharding
from jaxrobust.types import Attack, Classifier, Threat, Weights

LogitsOf = Callable[[str], Any]  # compute type -> logits_fn


def networks_of(subject: Subject, weights: Weights) -> LogitsOf:
    """Return the network as `autoattack` takes it, by compute type; each is made once.

    So all questions share what is compiled for it.
    """
    made: dict[str, Any] = {}

    def logits_fn(dtype: str) -> Any:
        if dtype not in made:
            net = subject.create(dtype)
            params = cast(weights.params, jnp.dtype(dtype))
            apply = _with_keys if subject.keyed else _plain
            made[dtype] = jax.tree_util.Partial(apply(net), params, weights.stats)
        return made[dtype]

    return logits_fn


def _plain(net: Classifier) -> Any:
    return lambda *given: net.apply(*given)[0]


def _with_keys(net: Classifier) -> Any:
    return lambda *given: net.apply(*given[:-1], key=given[-1])[0]


def searched(
    subject: Subject,
    prepared: Prepared,
    logits_of: LogitsOf,
    asked: Question,
    *,
    known: Fingerprint,
    ledger: Path,
    standing: np.ndarray | None = None,
    beyond: np.ndarray | None = None,
    replay: Sequence[Path] = (),
) -> dict[str, Any]:
    """Measure accuracy before and after AutoAttack, or attacks of it; print how it goes.

    Args:
      prepared: the images.
      known: the network's fingerprint.
      standing: bool[N], the only images to look at; default: all.
      beyond: bool[N], images that an evaluation at a larger radius has found robust.
      replay: ledgers of other evaluations of these images.
    Returns:
      What `records.accuracy_record` takes, `accuracy_after`, `verdicts` and `costs`.
    """
    labels, places = prepared.labels(), np.arange(len(prepared))
    images: Any = prepared
    if standing is not None:
        places = np.flatnonzero(standing)
        images, labels = Subset(prepared, places), labels[places]
    decides = logits_of("float32")
    result = autoattack(
        _keyed(decides) if asked.version == "rand" and not subject.keyed else decides,
        images,
        labels,
        **subject.ball.settings(),
        version=asked.version,
        attacks=asked.names,
        overrides=asked.overrides(),
        seed=asked.seed,
        batch_size=asked.batch or subject.slots_for(len(labels)),
        image_ids=places.tolist(),
        ledger=ledger,
        identity=known,
        search_fn=None if asked.search_dtype == "float32" else logits_of(asked.search_dtype),
        replay=replay,
        robust_beyond=None if beyond is None else beyond[places],
        rule=asked.rule,
        draws=asked.draws,
    )
    return of_autoattack(result, subject.ball)


def of_autoattack(result: AutoAttackResult, threat: Threat) -> dict[str, Any]:
    """Return what `searched` says of what AutoAttack found under a threat."""
    n = len(result.clean)
    return {
        "attacks": [threat.settings() | settings for settings in result.attacks],
        "clean": float(result.clean.mean()) if n else None,
        "robust": float(result.robust.mean()) if n else None,
        "accuracy_after": dict(result.accuracy_after),
        "flags": dict(result.flags),
        "verdicts": result.verdicts,
        "costs": [cost._asdict() for cost in result.costs],
    } | {
        key: known[key]
        for known, keys in (
            (result.about, records.SAID),
            (result.about["fingerprint"], ("begun_by",)),
        )
        for key in keys
        if key in known
    }


def _keyed(logits_fn: Any) -> Any:
    """Return a network that is given keys, of which it has no use."""
    return jax.tree_util.Partial(_without_keys, logits_fn)


def _without_keys(logits_fn: Any, images: Any, keys: Any) -> Any:
    del keys
    return logits_fn(images)


def counted(
    subject: Subject,
    source: registry.Source,
    weights: Weights,
    asked: Question,
    *,
    standing: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measure accuracy on clean images, and with an attack of fixed steps on its last iterates.

    Args:
      standing: bool[N], the only images to look at; default: all.
    Returns:
      As `searched`, `clean_top5` where there are more than five classes, and of an attack `stable`
      and `local_lipschitz`, the means of what `accuracy.judged` says.
    """
    settings, attack = attack_of(asked, subject.ball)
    mesh = sharding.make_mesh()
    batch = min(asked.batch or subject.batch_size, asked.images)
    places = np.arange(asked.images) if standing is None else np.flatnonzero(standing)
    images = accuracy.Images(
        source,
        image_size=_known(subject.network.image_size),
        batch_size=-(-batch // mesh.size) * mesh.size,
        limit=asked.images,
        places=None if standing is None else tuple(places.tolist()),
        seed=asked.seed,
        preprocessing=asked.preprocessing,
        workers=subject.workers,
    )
    net = subject.create("float32")
    counter = accuracy.counter(
        net, attack, mesh=mesh, dtype="float32", top5=True, each=subject.norm
    )
    start = time.perf_counter()
    run = (counter, weights, images, mesh)
    reached = accuracy.each(*run, bar=asked.attack) if len(places) else dict(_NOTHING)
    seconds = time.perf_counter() - start  # with what compiles
    moved = ("stable", "local_lipschitz") if asked.fixed else ()
    found = answered(reached, asked, places, settings, seconds)
    if not len(places):
        return found
    means = {key: float(reached[key].mean()) for key in ("clean_top5", *moved) if key in reached}
    return found | means


def answered(
    reached: dict[str, np.ndarray],
    asked: Question,
    places: np.ndarray,
    settings: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Return what `counted` says of all that `accuracy.judged` says image by image."""
    found, n = told(reached, asked.attack, places), len(places)
    named = asked.fixed
    cost = Cost(
        attack=asked.attack,
        fooled=int((found.clean & ~found.robust).sum()),
        forward=n * (named.forward + 2 if named else 1),
        backward=n * named.backward if named else 0,
        idle=0,
        seconds=seconds,
        compile_seconds=0.0,
    )
    robust = float(found.robust.mean()) if n and named else None
    return {
        "attacks": settings,
        "clean": float(found.clean.mean()) if n else None,
        "robust": robust,
        "accuracy_after": {asked.attack: robust} if named else {},
        "flags": reliability.check_answers(reached["finite"], found.fooled_by, found.reached)
        | collapse.flags(reached["answers"], reached["labels"]),
        "verdicts": found,
        "costs": [cost._asdict()],
    }


# What is reached where nothing stands any more.
_NOTHING = {name: np.zeros(0, bool) for name in ("clean", "robust", "finite")}
_NOTHING |= {name: np.zeros(0, np.int32) for name in ("labels", "norms", "answers", "reached")}


def attack_of(asked: Question, threat: Threat) -> tuple[list[dict[str, Any]], Attack]:
    """Return the settings of an attack for the record, none if there is none, and the attack."""
    if asked.fixed is None:
        return [], lambda logits_fn, key, images, labels: images
    length = asked.fixed.length(threat.epsilon, step=asked.step, relative=asked.relative_step)
    settings = asked.fixed.settings(threat, length=length, start=asked.start, l1_rule=asked.l1_rule)
    return [settings], fixed_steps.attack_of(settings)


def told(reached: dict[str, np.ndarray], attack: str, places: np.ndarray | None = None) -> Verdicts:
    """Return the verdicts of an attack on the images at some places of a split; None: its first."""
    clean, robust = reached["clean"], reached["robust"]
    ids = np.arange(len(clean)) if places is None else places
    return Verdicts(
        image_ids=ids.astype(np.uint32),
        labels=reached["labels"],
        clean=clean,
        fooled_by=np.where(clean, np.where(robust, "", attack), "clean"),
        norms=np.where(clean & ~robust, reached["norms"].astype(np.float64), 0.0),
        reached=np.where(clean & ~robust, reached["reached"], -1),
    )


def _known(size: int | None) -> int:
    assert size is not None, "settled"
    return size
