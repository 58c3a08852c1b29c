"""Clean and robust accuracy of a network on the images of a split."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key, UInt8

from jaxrobust import attacks
from jaxrobust import types as t
from jaxrobust.data import Prepared
from jaxrobust.data.source import Source
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import pipeline
from jaxrobust.data.stream.pipeline import Damage
from jaxrobust.evaluation.network import checks, collapse, label_checks
from jaxrobust.models.interface.network_inputs import cast, unit_range
from jaxrobust.runtime.devices import compilation, sharding
from jaxrobust.runtime.text import panel, patience
from jaxrobust.runtime.text.panel import PanelRow
from jaxrobust.runtime.text.progress import LinePart, say, watched

Counter = Callable[..., dict[str, t.Array]]
_COMPILED: weakref.WeakSet[Counter] = weakref.WeakSet()  # counters that have run a batch
_AT_ONCE = 512  # images of the program of `clean_share`
# The program runs once, so optimizing it does not pay (CPU, quickstart: 0.9 s instead of 2.1 s).
_FAST = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True)
class EvaluatedImages:
    """Which images are evaluated, and how they are read."""

    source: Source
    image_size: int  # pixels
    batch_size: int  # of all devices together
    limit: int = 0  # at most this many, spread over the classes; 0: all
    seed: int = 0  # of the attack's draws
    preprocessing: str | None = None  # an id of `evaluation_transform`; None: that of training
    workers: int = 0  # processes that decode; 0: threads of this process
    meets: Damage | None = None  # collects damaged images, which are skipped; None: they raise
    places: tuple[int, ...] | None = None  # only the images there; None: as `limit` says

    def __len__(self) -> int:
        if self.places is not None:
            return len(self.places)
        return min(len(self.source), self.limit or len(self.source))


def count(
    counter: Counter,
    weights: t.Weights,
    images: EvaluatedImages,
    mesh: jax.sharding.Mesh,
    *,
    bar: str = "",
    between: Callable[[], None] = lambda: None,
) -> dict:
    """Measure clean and robust accuracy and the number of images; `bar` names a progress bar.

    A counter of the top 5 adds `clean_top5`, and `found` adds its facts. `between` is called after
    each batch; an exception from it ends the count.
    """
    totals = dict.fromkeys(("count", "clean", "robust"), 0)
    parts: list[np.ndarray] = []  # answers and labels
    for counts in _judgements(counter, weights, images, mesh, bar):
        between()
        mask, answers, labels = (counts.pop(key) for key in ("mask", "answers", "labels"))
        parts.append(np.stack([answers, labels])[:, mask])
        for name, value in counts.items():
            totals[name] = totals.get(name, 0) + int(value)
    n = totals.pop("count")
    accuracies = {name: total / max(n, 1) for name, total in totals.items()} | {"images": n}
    return accuracies | (found(images, *np.concatenate(parts, axis=1)) if parts else {})


def found(images: EvaluatedImages, answers: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Derive further facts from clean answers: `collapse`, and `doubts`, flags of the labels."""
    choice = spread.choice(images.source, images.limit)
    doubts = label_checks.check_answers(answers, labels, images.source.num_classes)
    doubts |= spread.choice_flags(images.source, labels, choice)
    collapsed = collapse.of(answers, labels)
    facts: dict[str, Any] = {"collapse": collapsed._asdict()} if collapsed else {}
    return facts | ({"doubts": doubts} if doubts else {})


def each(
    counter: Counter,
    weights: t.Weights,
    images: EvaluatedImages,
    mesh: jax.sharding.Mesh,
    *,
    bar: str = "",
) -> dict[str, np.ndarray]:
    """Run a counter made with `norm` on every image; return arrays [N] in the split's order."""
    parts: list[dict[str, np.ndarray]] = []
    for judged in _judgements(counter, weights, images, mesh, bar):
        is_image = judged.pop("count")
        parts.append({name: values[is_image] for name, values in judged.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _judgements(
    counter: Counter, weights: t.Weights, images: EvaluatedImages, mesh: jax.sharding.Mesh, bar: str
) -> Iterator[dict[str, np.ndarray]]:
    batches = pipeline.evaluation_batches(
        images.source,
        batch_size=images.batch_size,
        image_size=images.image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        preprocessing=images.preprocessing,
        limit=images.limit or None,
        places=images.places,
        workers=images.workers,
        strict=images.meets is None,
    )
    key = jax.random.key(images.seed)
    steps, done = -(-len(images) // images.batch_size), 0
    progress = lambda: f"{bar}: {done} of {steps} batches"  # noqa: E731
    first_host = bool(bar) and jax.process_index() == 0
    with (
        contextlib.closing(batches),
        panel.opened(bar, here=first_host) as meter,
        patience.lasting(progress, here=first_host) as wait,
    ):
        for b in batches:
            meter.show([PanelRow("batches", [LinePart(f"{done} of {steps}")])], done, steps)
            if watched():  # the panel already shows progress
                wait.again()
            if images.meets is not None:
                images.meets.add(b.damaged)
            arrays = sharding.global_arrays(mesh, (b.images, b.labels, b.mask, b.ids))
            with _compiling(counter, bar, (weights, arrays)):
                judgement = jax.device_get(counter(*weights, *arrays, key))
            done += 1
            yield judgement


def _compiling(counter: Counter, bar: str, arguments: Any) -> contextlib.AbstractContextManager:
    if not bar or counter in _COMPILED:
        return contextlib.nullcontext()
    _COMPILED.add(counter)
    program = compilation.program(f"{bar}, with a batch", arguments)
    return compilation.waiting(f"{bar}: compiling the evaluation", program, say)


def apgd_ce(threat: t.Threat, *, steps: int) -> t.Attack:
    """Make AutoAttack's APGD-CE from one random start, with the last misclassified iterate."""
    attacks.apgd(**threat.settings(), steps=steps)  # raises now, not while compiling

    def attack(
        logits_fn: t.LogitsFn, keys: t.Array | None, images: t.Images, labels: t.Labels
    ) -> t.Images:
        run = partial(attacks.apgd_run, norm=threat.norm, epsilon=threat.epsilon, steps=steps)
        points = run(logits_fn, images, labels, key=keys, start="random").x_best_adv
        return attacks.GEOMETRIES[threat.norm].settle(points, images)

    return attack


def of_union(searches: Sequence[t.Attack]) -> t.Attack:
    """Combine attacks into one: for each image the first point that fools, else the last point.

    It costs as much as all of them, plus a forward pass for each but the last.
    """
    first, *others = searches
    if not others:
        return first

    def attack(
        logits_fn: t.LogitsFn, keys: t.Array | None, images: t.Images, labels: t.Labels
    ) -> t.Images:
        points = first(logits_fn, keys, images, labels)
        for search in others:
            with jax.default_matmul_precision(t.VERDICT_PRECISION):
                logits = logits_fn(points)
            right = (logits.argmax(-1) == labels) & jnp.isfinite(logits).all(-1)
            candidates = search(logits_fn, keys, images, labels)
            points = jnp.where(right[:, None, None, None], candidates, points)
        return points

    return attack


@dataclass(frozen=True)
class Judging:
    """How images are judged, and what else is measured.

    `top5`: whether the label is among the five largest clean logits, given more than five classes.
    `moved`: how the attack changed the outputs (see `judged`), and whether clean logits are finite.
    """

    net: t.Classifier
    attack: t.Attack
    dtype: str  # the network's compute type
    top5: bool = False
    norm: str = "linf"  # of the perturbations' `norms`
    moved: bool = False


def counter(
    net: t.Classifier,
    attack: t.Attack,
    *,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    top5: bool = False,
    norm: str | None = None,
) -> Counter:
    """Jit `counts` for a network with this compute type, on all devices of a mesh.

    With `norm`, which measures the perturbations, jit `judged` instead: facts of each image.
    """
    replicated, split = sharding.replicated(mesh), sharding.by_image(mesh)
    judging = Judging(net, attack, dtype, top5, norm=norm or "linf", moved=bool(norm))
    return jax.jit(
        partial(judged if norm else counts, judging=judging),
        in_shardings=(replicated, replicated, split, split, split, split, replicated),
        out_shardings=replicated,
    )


def clean_share(net: t.Classifier, weights: t.Weights, images: Prepared) -> float:
    """Compute the clean accuracy on images f32[N,H,W,C]; logits that are not finite are wrong.

    Runs one small program on up to 512 images at once. Its compilation is announced with the
    seconds that it last took on this machine, unless these were few.
    """
    labels, right = images.labels(), np.zeros(len(images), bool)
    forward = jax.jit(
        lambda params, stats, points: net.apply(params, stats, points)[0], compiler_options=_FAST
    )
    for start in range(0, len(images), _AT_ONCE):
        part = np.arange(start, min(start + _AT_ONCE, len(images)))
        operands = (weights.params, weights.stats, images[part])
        name = compilation.program("clean accuracy", operands)
        first = "a few seconds the first time"
        waiting = compilation.waiting("clean accuracy: compiling", name, say, unknown=first)
        with waiting, jax.default_matmul_precision(t.VERDICT_PRECISION):
            logits = jax.device_get(forward(*operands))
        right[part] = checks.is_right(logits, labels[part])
    return float(right.mean())


def counts(*batch: Any, judging: Judging) -> dict[str, t.Array]:
    """Count the images of a padded batch classified correctly, clean and after the attack."""
    results = judged(*batch, judging=judging)
    sums = {name: results[name].sum() for name in results if results[name].dtype == bool}
    answers = {name: results[name] for name in ("answers", "labels")}
    return sums | answers | {"mask": results["count"]}


def judged(
    params: t.Params,
    stats: t.Params,
    images: t.Images | UInt8[t.Array, "B H W channels"],
    labels: t.Labels,
    mask: t.Mask,
    ids: t.Counts,
    key: Key[t.Array, ""],
    *,
    judging: Judging,
) -> dict[str, t.Array]:
    """Tell which images of a padded batch are classified correctly, clean and after the attack.

    The attack uses training's matmul precision, the verdicts full precision.

    Args:
      images: uint8 or f32[B,H,W,C]; labels, ids: i32[B]; mask: bool[B], False for padding.
      key: every image draws from `fold_in(key, id)`, so a verdict does not depend on its batch.
    Returns:
      bool[B], False for padding: `count` (it is an image), `clean`, `robust`, `clean_top5`. f32[B]:
      `norms` of the perturbations in `norm`. i32[B]: `labels`, and the predicted classes of the
      clean images, `answers`, and under the attack, `reached`; -1 for no answer. With `moved`
      also `stable` (the class stays, right or wrong) and `local_lipschitz`, f32[B],
      |z(x) - z(x')|_1 / |x - x' + 1e-6|_inf.
    Source of the latter two: Huang et al. 2022 (arXiv 2212.11005), whose evaluation adds 1e-6 to
      every pixel; parity: tests/evaluation/engine/test_cifar_attacks.py.
    """
    frozen_params = cast(params, jnp.dtype(judging.dtype))

    def logits_fn(x: t.Images) -> t.Logits:
        return judging.net.apply(frozen_params, stats, x)[0]

    def verdict(x: t.Images) -> tuple[t.Mask, t.Logits]:
        with jax.default_matmul_precision(t.VERDICT_PRECISION):
            logits = logits_fn(x)
        # `argmax` takes NaN as the largest; an answer with NaN counts as wrong.
        return (logits.argmax(-1) == labels) & jnp.isfinite(logits).all(-1), logits

    images = unit_range(images)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    images_adv = judging.attack(logits_fn, keys, images, labels)
    right, logits = verdict(images)
    clean = right & mask
    withstands, logits_adv = verdict(images_adv)
    robust = withstands & clean
    finite = jnp.isfinite(logits).all(-1)
    answers = jnp.where(finite, logits.argmax(-1), -1)
    reached = jnp.where(jnp.isfinite(logits_adv).all(-1), logits_adv.argmax(-1), -1)
    delta = (images_adv - images).reshape(len(labels), -1)
    norms = jnp.linalg.norm(delta, checks.ORDER[judging.norm], axis=1)
    results = {"count": mask, "clean": clean, "robust": robust, "norms": norms, "labels": labels}
    results |= {"answers": answers.astype(jnp.int32), "reached": reached.astype(jnp.int32)}
    if judging.moved:
        distance = jnp.abs((images - images_adv).reshape(len(images), -1) + 1e-6).max(1)
        results["stable"] = (logits.argmax(-1) == logits_adv.argmax(-1)) & mask
        results["local_lipschitz"] = jnp.abs(logits - logits_adv).sum(1) / distance
        results["finite"] = finite & mask
    if judging.top5 and logits.shape[-1] > 5:
        _, largest = jax.lax.top_k(logits, 5)
        results["clean_top5"] = (largest == labels[:, None]).any(-1) & finite & mask
    return results
