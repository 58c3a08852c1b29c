"""Candidates of a choice: their evaluation at an image size, and results of earlier calls."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrobust import evaluation
from jaxrobust.config import Values, network_of, plain
from jaxrobust.data import Prepared
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.network import collapse, fingerprint, tracing
from jaxrobust.evaluation.questions import target as subjects
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.processes import hosts
from jaxrobust.training import build
from jaxrobust.training.run import splits
from jaxrobust.types import Threat, threats
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import kept

# (weights, full) -> clean, robust, images; unless full, `robust` may be an upper bound.
Measure = Callable[[Any, bool], dict[str, Any]]
_REPLAYED = 4  # candidates whose adversarial images are kept; neighbors are the most alike


class Size(NamedTuple):
    """The evaluation of candidates at one image size."""

    preprocessing: str
    measure: Measure
    network: Any  # (params, stats, images) -> logits
    images: Any  # `data.Prepared`


def changed(config: Any, changes: dict[str, dict[str, Any]]) -> Any:
    """Copy a config with changed values in some sections; None leaves a value unchanged."""
    copy = plain(config)
    for section, values in changes.items():
        copy[section] |= {key: value for key, value in values.items() if value is not None}
    return json.loads(json.dumps(copy), object_hook=Values)


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
    size: dict[str, Any] = {"image_size": image_size, "preprocessing": preprocessing}
    shown = Prepared(images.source, images=len(images), **size)

    def forward(params: Any, stats: Any, batch: Any) -> Any:
        return net.apply(params, stats, batch)[0]

    if steps is None:
        return Size(preprocessing, _autoattack(config, forward, shown, folder), forward, shown)
    mesh = sharding.make_mesh()
    build.divides(images.batch_size, mesh.size, "--batch")
    evaluate = build.evaluation(config, mesh, steps=steps)

    def measure(weights: Any, full: bool) -> dict[str, Any]:
        del full  # this attack always runs in full
        return accuracy.count(evaluate, weights, images, mesh, bar="images")

    return Size(preprocessing, measure, forward, shown)


def _autoattack(config: Any, forward: Any, shown: Any, folder: Path) -> Measure:
    """Measure with AutoAttack or its first attack, replaying the last candidates' ledgers."""
    # With several norms, a robust image withstands all of them; each norm has its own ledgers.
    balls = threats(config.attack)
    ledgers: dict[Threat, list[Path]] = {ball: [] for ball in balls}

    def under(ball: Threat, weights: Any, full: bool) -> Any:
        earlier = ledgers[ball]
        name = f"{config.model.image_size}-{len(earlier)}" + f"-{ball.norm}" * (len(balls) > 1)
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
            replay=earlier[-_REPLAYED:],
        )
        earlier.append(ledger)
        for old in earlier[-_REPLAYED - 1 : -_REPLAYED]:
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


def computed(run: Path, phase: str, sizes: Mapping[int, Any]) -> dict[str, Any]:
    """Hash the program and images of each size, with the versions that traced the programs."""
    here = Mesh(np.array(jax.local_devices()[:1]), ("device",))
    _, both = kept.read(run, phase, kept.steps_of(run, phase)[0])
    hashed = {}
    for side, size in sizes.items():
        weights = kept.at_size(run, phase, both.of("raw"), side)
        called = jax.tree_util.Partial(size.network, *weights)
        network = tracing.argument("network", called, here)
        exact = fingerprint.exact(network, size.images.shape[1:], batch=1)
        programs = {key: exact[key] for key in ("program", "gradient")}
        hashed[str(side)] = programs | {"images": size.images.content_sha256()}
    return {"computed": hashed, "by": fingerprint.versions()}


def candidates(
    path: Path, question: dict[str, Any], computed: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the finished candidates, and the hashes of computations at all sizes."""
    if not path.exists():
        return [], computed
    begun = kept.read_selection(path)
    if words := hosts.differences({key: begun.get(key) for key in question}, question):
        raise ValueError(
            f"{path} holds a different choice: {words}. Use the same flags, or move the file away"
        )
    if "computed" not in begun:
        raise ValueError(
            f"{path} was written by an older version that fingerprinted neither the network nor "
            "the images, so its candidates may differ: move the file away"
        )
    for size, hashed in computed["computed"].items():
        there = begun["computed"].get(size, hashed)
        other = [key for key in hashed if there[key] != hashed[key]]
        whose = ""  # another version may trace the same network as another program
        if "images" not in other and fingerprint.other_versions(begun["by"], computed["by"]):
            whose = f" (begun by {fingerprint.words(begun['by'])})"
        if other:
            raise ValueError(
                f"{path} holds a different choice: under the same name, it differs at {size} px in "
                f"its {' and '.join(other)}{whose}. Move the file away"
            )
    both = begun["computed"] | computed["computed"]
    return begun["candidates"], computed | {"computed": both}


def check_weights(run: Path, candidates: list[dict[str, Any]]) -> None:
    """Raise if the run's weights are no longer those of the candidates."""
    for row in candidates:
        _, both = kept.read(run, row["phase"], row["step"])
        weights = kept.at_size(run, row["phase"], both.of(row["weights"]), row["image_size"])
        if hashes.weights_sha256(*weights) != row["weights_sha256"]:
            raise ValueError(
                f"the weights of {row['phase']}, step {row['step']}, {row['weights']} differ from "
                f"those in {run / kept.SELECTION}; move that file away"
            )
