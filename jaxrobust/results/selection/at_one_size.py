"""How the candidates of a choice are evaluated at one image size: counted, or under AutoAttack."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust import evaluation
from jaxrobust.config import Values, network_of, plain
from jaxrobust.data import Prepared
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.network import collapse
from jaxrobust.evaluation.questions import target as subjects
from jaxrobust.runtime.devices import sharding
from jaxrobust.training import build
from jaxrobust.training.run import splits
from jaxrobust.types import Threat, threats

# (weights, in full) -> clean, robust, images; not in full: `robust` may be an upper bound.
Measure = Callable[[Any, bool], dict[str, Any]]
_REPLAYED = 4  # candidates whose adversarial images are kept; neighbours resemble each other most


class Size(NamedTuple):
    """How candidates are evaluated at one image size."""

    preprocessing: str
    measure: Measure
    network: Any  # (params, stats, images) -> logits
    images: Any  # `data.Prepared`


def changed(config: Any, changes: dict[str, dict[str, Any]]) -> Any:
    """Copy a config, with other values in some of its sections; None leaves a value as it is."""
    own = plain(config)
    for section, values in changes.items():
        own[section] |= {key: value for key, value in values.items() if value is not None}
    return json.loads(json.dumps(own), object_hook=Values)


def at_size(
    run: Path, phase: str, config: Any, image_size: int, *, steps: int | None, folder: Path
) -> Size:
    """Prepare the evaluation of candidates at an image size; nothing compiles yet."""
    source = splits.opened(config, "selection_split")
    wanted = subjects.preprocessing(subjects.of_run(run, phase), image_size, source)
    config = changed(config, {"model": {"image_size": image_size}})
    config["data"]["preprocessing"] = wanted
    images = splits.evaluated(config, "selection_split", config.evaluation, run)
    preprocessing = pipeline.preprocessing_id(source, image_size, wanted)
    net = network_of(config, dtype="float32")
    how: dict[str, Any] = {"image_size": image_size, "preprocessing": preprocessing}
    shown = Prepared(images.source, images=len(images), **how)

    def forward(params: Any, stats: Any, given: Any) -> Any:
        return net.apply(params, stats, given)[0]

    if steps is None:
        return Size(preprocessing, _autoattack(config, forward, shown, folder), forward, shown)
    mesh = sharding.make_mesh()
    build.divides(images.batch_size, mesh.size, "--batch")
    evaluate = build.evaluation(config, mesh, steps=steps)

    def measure(weights: Any, full: bool) -> dict[str, Any]:
        del full  # this attack is one
        return accuracy.count(evaluate, weights, images, mesh, bar="images")

    return Size(preprocessing, measure, forward, shown)


def _autoattack(config: Any, forward: Any, shown: Any, folder: Path) -> Measure:
    """Measure by AutoAttack or its first attack; the last candidates' ledgers are replayed.

    Of several norms an image is robust when it withstands all, and each has ledgers for itself.
    """
    balls = threats(config.attack)
    ledgers: dict[Threat, list[Path]] = {ball: [] for ball in balls}

    def under(ball: Threat, weights: Any, full: bool) -> Any:
        own = ledgers[ball]
        name = f"{config.model.image_size}-{len(own)}" + f"-{ball.norm}" * (len(balls) > 1)
        ledger = folder / f"ledger-{name}.jsonl"
        result = evaluation.autoattack(
            jax.tree_util.Partial(forward, *weights),
            shown,
            shown.labels(),
            **ball.settings(),
            image_ids=shown.ids.tolist(),
            attacks=None if full else ("apgd-ce",),
            seed=config.seed,
            batch_size=config.evaluation.batch_size,
            ledger=ledger,
            replay=own[-_REPLAYED:],
        )
        own.append(ledger)
        for old in own[-_REPLAYED - 1 : -_REPLAYED]:
            old.with_suffix(".images").unlink(missing_ok=True)
        return result

    def measure(weights: Any, full: bool) -> dict[str, Any]:
        results = [under(ball, weights, full) for ball in balls]
        costs = [cost for result in results for cost in result.costs]
        passes = sum(cost.forward + 2 * cost.backward for cost in costs)
        reached: dict[str, Any] = {"images": len(shown), "passes": passes}
        if one := collapse.of(results[0].answers, results[0].verdicts.labels):
            reached["collapse"] = one._asdict()
        robust = np.logical_and.reduce([result.robust for result in results])
        return {"clean": float(results[0].clean.mean()), "robust": float(robust.mean())} | reached

    return measure
