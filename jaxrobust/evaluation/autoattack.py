"""AutoAttack: an ensemble of parameter-free attacks, one after the other on what still stands.

Source: Croce & Hein 2020 (arXiv 2003.01690), Croce & Hein 2021 (arXiv 2103.01208) for L1. The
verdicts are those of auto-attack a392200 (parity: tests/test_autoattack.py), with three
differences: an image stops as soon as it is fooled, so its adversarial image is the first that an
attack finds, not the latest; draws belong to the image, not to its place in a batch; an image is
fooled only if a last forward pass and its norm in float64 confirm it.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import BALLS
from jaxrobust.attacks.machine import check_radius
from jaxrobust.evaluation import checks, engine
from jaxrobust.evaluation.engine import CE, DLR, Setting
from jaxrobust.evaluation.ledger import Ledger
from jaxrobust.progress import Decisions, say
from jaxrobust.types import Array

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "custom": ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"),
}
_BASE = {
    "apgd-ce": Setting("apgd-ce", "apgd", "", steps=100),
    "apgd-dlr": Setting("apgd-dlr", "apgd", "", steps=100),
    "apgd-t": Setting("apgd-t", "apgd", "", steps=100, targets=9),
    "fab": Setting("fab", "fab", "", steps=100, restarts=5),
    "fab-t": Setting("fab-t", "fab", "", steps=100, targets=9),
    "square": Setting("square", "square", "", steps=5000),
}
_FIVE = {"restarts": 5}
_CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {},
    "plus": {"apgd-ce": _FIVE, "apgd-dlr": _FIVE},  # FAB has five anyway
    "rand": {"apgd-ce": {"eot": 20}, "apgd-dlr": {"eot": 20}},
    "custom": {"apgd-ce": _FIVE, "apgd-dlr": _FIVE},
    "standard, l1": {
        "apgd-ce": {"restarts": 5, "machine": "apgd-multi-radius"},
        "apgd-t": {"targets": 5, "machine": "apgd-multi-radius"},
    },
}
_FORWARD = {"apgd": 1, "apgd-multi-radius": 1, "fab": 2, "square": 1}  # passes of one step
_SAMPLE = 64  # survivors of a search in lower precision that are attacked again


class Cost(NamedTuple):
    """What an attack took; a pass is that of one image."""

    attack: str
    fooled: int
    forward: int
    backward: int
    idle: int  # forward passes in slots without an image
    seconds: float
    compile_seconds: float


class AutoAttackResult(NamedTuple):
    """The verdicts on N images."""

    clean: np.ndarray  # bool[N], classified correctly
    robust: np.ndarray  # bool[N], no attack found anything
    fooled_by: np.ndarray  # str[N]: the attack; "clean" if misclassified as it is; "" if robust
    images_adv: np.ndarray  # f32[N,H,W,C]; the image itself where no attack succeeded
    flags: dict[str, str]  # what makes the numbers doubtful, and what to do about it
    accuracy_after: dict[str, float]  # robust accuracy after each attack
    attacks: list[dict[str, Any]]  # their settings
    costs: list[Cost]

    def table(self) -> str:
        """Accuracy after each attack, what it added and what it cost, for people."""
        n = len(self.clean)
        lines = [
            f"{'attack':10}  {'accuracy':>8}  {'fooled':>6}  {'forward':>9}  {'backward':>9}  time"
        ]
        lines.append(f"{'clean':10}  {_share(self.clean.sum(), n)}")
        for c in self.costs:
            accuracy = _share(self.accuracy_after[c.attack] * n, n)
            lines.append(
                f"{c.attack:10}  {accuracy}  {c.fooled:6d}  {c.forward:9,d}  {c.backward:9,d}  "
                f"{c.seconds:.1f} s + {c.compile_seconds:.1f} s compiling"
            )
        low, high = checks.binomial_interval(int(self.robust.sum()), n)
        lines.append(
            f"robust {int(self.robust.sum())} of {n}, 95 % interval {low:.1%} to {high:.1%}"
        )
        lines += [f"flag {name}: {text}" for name, text in self.flags.items()]
        return "\n".join(lines)


def autoattack(
    logits_fn: Callable[..., Array],
    images: np.ndarray | Array,
    labels: np.ndarray | Array,
    *,
    norm: str,
    epsilon: float,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    image_ids: Sequence[int] | None = None,
    ledger: str | Path | None = None,
    identity: str | None = None,
    search_fn: Callable[..., Array] | None = None,
    verbose: bool = True,
) -> AutoAttackResult:
    """Robust accuracy of a network under AutoAttack.

    Args:
      logits_fn: f32[B,H,W,C] in [0, 1] -> f[B,K], not softmax; normalises inside. Best a
        `jax.tree_util.Partial(apply, params, stats)`: its arrays are arguments of the compiled
        programs, so another checkpoint compiles nothing. With version "rand" it takes one key per
        image, [B], as a second argument.
      images: f32[N,H,W,C] in [0, 1].
      labels: i[N].
      norm: "linf", "l2" or "l1".
      epsilon: radius, in units of pixels in [0, 1] (8/255).
      version: "standard"; "plus" (more restarts, untargeted FAB); "rand" (randomised defences,
        averaged gradients); "custom" (`attacks`, 5 restarts).
      attacks: names to run, those of the version by default.
      overrides: changes of an attack's `steps`, `restarts`, `targets` or `eot`, by name.
      seed: of all random draws.
      batch_size: slots on all local devices together; see `engine.make`.
      image_ids: N different ints below 2^32; an image's draws derive from its id, so a part of a
        dataset gets the verdicts it has in the whole. Default 0..N-1.
      ledger: a file (.jsonl) of verdicts; the same call continues with it.
      identity: names the network in the ledger; by default a hash of its logits on 8 images.
      search_fn: the same network in lower precision, to search with; `logits_fn` decides.
      verbose: progress and a table on stderr.
    Returns:
      `AutoAttackResult`.
    Raises:
      ValueError: settings or inputs that cannot be meant, a ledger of another evaluation.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    checks.check_images(images, labels)
    ids = _ids(image_ids, len(images))
    images, labels = np.ascontiguousarray(images, np.float32), labels.astype(np.int32)
    plan = _plan(norm, epsilon, version, attacks, overrides)
    runner = engine.make(
        logits_fn,
        search_fn=search_fn,
        slots=batch_size,
        image_size=max(images.shape[1:3]),
        keyed=version == "rand",
    )
    classes = _classes(runner, images)
    checks.check_images(images, labels, classes=classes)
    tell = say if verbose else lambda message: None
    plan = [_fit(setting, classes, tell) for setting in plan]

    logits = _logits(runner, images, ids, seed, draw=0)
    clean = np.argmax(logits, axis=1) == labels if len(images) else np.zeros(0, bool)
    flags: dict[str, str] = {}
    if len(images) and not runner.keyed:
        flags |= checks.check_network(
            lambda x: engine.forward(runner, x),
            logits_fn,
            images,
            labels,
            batch_size=runner.slots // runner.mesh.size,
        )
    identities = {
        "network": identity or _hash(images, np.round(logits[:8].astype(np.float64), 3)),
        "data": _hash(images, labels, ids),
        "norm": norm,
        "epsilon": float(epsilon),
        "version": version,
        "attacks": [setting._asdict() for setting in plan],
        "seed": seed,
        "search": "logits_fn" if search_fn is None else "search_fn",
    }
    run = _Run(
        runner, images, labels, ids, logits, float(epsilon), seed, Ledger(ledger, identities)
    )
    standing, fooled_by = clean.copy(), np.where(clean, "", "clean").astype("<U16")
    images_adv, costs, accuracy_after = images.copy(), [], {}
    meter = Decisions(len(images), interval=checks.binomial_interval, enabled=verbose)
    with meter:
        for number, setting in enumerate(plan):
            later = sum(_most_passes(s, classes) for s in plan[number + 1 :])
            cost = _attack(run, setting, standing, fooled_by, images_adv, flags, meter, later)
            costs.append(cost)
            accuracy_after[setting.name] = float(standing.mean()) if len(images) else 0.0
        if search_fn is not None:
            _check_search(run, plan, standing, fooled_by, images_adv, flags, meter)
    flags |= checks.check_cascade(
        {"clean": float(clean.mean()), **accuracy_after} if len(images) else {}
    )
    result = AutoAttackResult(
        clean, standing, fooled_by, images_adv, flags, accuracy_after, identities["attacks"], costs
    )
    tell(result.table())
    return result


class _Run(NamedTuple):
    """What all attacks of one evaluation share."""

    engine: engine.Engine
    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    logits: np.ndarray  # of the images
    epsilon: float
    seed: int
    ledger: Ledger


def _attack(run, setting, standing, fooled_by, images_adv, flags, meter, later, suffix=""):
    """Runs one attack on the images that still stand; updates the arrays, returns its cost."""
    name, start = setting.name + suffix, time.perf_counter()
    indices = np.flatnonzero(standing)
    shape = run.images.shape[1:]
    flat, unconfirmed, passes = [], [], {"steps": 0, "idle": 0, "compile": 0.0}

    def strike(i, adversarial):
        standing[i], fooled_by[i], images_adv[i] = False, name, adversarial

    pending = []
    for i in indices:
        record = run.ledger.find(int(run.ids[i]), name)
        if record is None:
            pending.append(i)
            continue
        flat.append(record["flat"])
        if record["fooled"]:
            strike(i, run.ledger.adversarial(int(run.ids[i]), name, shape))
    pending = np.array(pending, int)
    meter.begin(name, len(indices), len(indices) - len(pending), int(standing.sum()))

    def write(verdict, fooled, norm, adversarial):
        i = pending[verdict.image]
        record = {"image": int(run.ids[i]), "attack": name, "fooled": fooled}
        record |= {"target": verdict.target, "restart": verdict.restart}
        record |= {"iterations": verdict.steps, "norm": norm, "seed": run.seed}
        run.ledger.add(record | {"flat": verdict.flat}, adversarial)
        flat.append(verdict.flat)
        if fooled:
            strike(i, adversarial)
        meter.decided(int(standing.sum()))

    def confirm(verdicts):
        """The last word: one more forward pass, and the norm in float64."""
        which = pending[[v.image for v in verdicts]]
        points = np.stack([v.adversarial for v in verdicts])
        points = engine.settled(run.engine, setting.norm, points, run.images[which])
        logits = _logits(run.engine, points, run.ids[which], run.seed, draw=1)
        sure, norms = checks.verified(
            points,
            run.images[which],
            run.labels[which],
            logits,
            norm=setting.norm,
            epsilon=run.epsilon,
        )
        for verdict, ok, norm, point in zip(verdicts, sure, norms, points, strict=True):
            write(verdict, bool(ok), float(norm) if ok else 0.0, point if ok else None)
            unconfirmed.extend([verdict.image] * (not ok))

    def report(call):
        made = call.useful_steps * _passes(setting, run.logits.shape[1])
        passes["steps"] += call.useful_steps
        passes["idle"] += call.slot_steps - call.useful_steps
        passes["compile"] += call.seconds * call.compiles
        most = _most_passes(setting, run.logits.shape[1])
        meter.advance(0 if call.compiles else made, call.seconds, call.compiles, most, later)

    waiting: list[engine.Verdict] = []
    for verdict in engine.decide(
        run.engine,
        setting,
        run.images[pending],
        run.labels[pending],
        _targets(setting, run.logits[pending], run.labels[pending]),
        run.ids[pending],
        epsilon=run.epsilon,
        seed=run.seed,
        report=report,
    ):
        if not verdict.fooled:
            write(verdict, False, 0.0, None)
            continue
        waiting.append(verdict)
        if len(waiting) == run.engine.slots:
            confirm(waiting)
            waiting = []
    if waiting:
        confirm(waiting)
    if setting.name in ("apgd-ce", "apgd-dlr"):
        flags |= checks.check_gradients(np.array(flat, bool))
    if unconfirmed:
        flags["unconfirmed"] = (
            f"{len(unconfirmed)} images were fooled in the search by {name} but not in a last "
            "forward pass, or left the ball; they count as robust. Numerics that depend on the "
            "batch do this: look for batch statistics, or compare with batch_size=1"
        )
    forward = _FORWARD[setting.machine] * setting.eot
    return Cost(
        attack=name,
        fooled=int(len(indices) - standing.sum()),
        forward=passes["steps"] * forward,
        backward=passes["steps"] * _backward(setting, run.logits.shape[1]),
        idle=passes["idle"] * forward,
        seconds=time.perf_counter() - start - passes["compile"],
        compile_seconds=passes["compile"],
    )


def _check_search(run, plan, standing, fooled_by, images_adv, flags, meter):
    """Attacks a sample of the survivors once more, searching with the network that decides."""
    survivors = np.flatnonzero(standing)
    count = min(_SAMPLE, len(survivors))
    sample = np.random.default_rng(run.seed).choice(survivors, count, replace=False)
    chosen = np.zeros_like(standing)
    chosen[sample] = True
    run = run._replace(engine=run.engine._replace(search_fn=None))
    for setting in plan:
        _attack(run, setting, chosen, fooled_by, images_adv, flags, meter, 0, suffix=" (full)")
    fooled = int(count - chosen.sum())
    standing[sample] = chosen[sample]
    flags["search-gap"] = (
        f"of {count} survivors of the search with search_fn, {fooled} were fooled by one with "
        "logits_fn itself" + ("; search with logits_fn" if fooled else "")
    )


def _targets(setting: Setting, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """i32[n, T]: the likeliest wrong classes of the clean images, or the code of a loss."""
    n = len(labels)
    if not setting.targets:
        return np.full((n, 1), DLR if setting.name == "apgd-dlr" else CE, np.int32)
    wrong = logits.astype(np.float64)
    wrong[np.arange(n), labels] = -np.inf
    # From the end of an ascending order, as the reference: of equal logits the last class first.
    return np.argsort(wrong, axis=1, kind="stable")[:, ::-1][:, : setting.targets].astype(np.int32)


def _logits(runner, images, ids, seed, *, draw):
    """f32[n, K]; a randomised network gets the keys of the images and of this draw."""
    if not len(images):
        return np.zeros((0, _classes(runner, images)), np.float32)
    keys = np.stack([np.full(len(ids), (seed * 16 + draw) % 2**32), ids], axis=1).astype(np.uint32)
    return engine.forward(runner, images, keys)


def _backward(setting: Setting, classes: int) -> int:
    per_step = {"square": 0, "fab": 1 if setting.targets else classes}.get(setting.machine, 1)
    return per_step * setting.eot


def _passes(setting: Setting, classes: int) -> int:
    """Forward and backward passes of one step."""
    return _FORWARD[setting.machine] * setting.eot + _backward(setting, classes)


def _most_passes(setting: Setting, classes: int) -> int:
    """For an image that is never fooled."""
    starts = {"apgd-multi-radius": 3, "fab": 0}.get(setting.machine, 1)
    jobs = setting.restarts * max(setting.targets, 1)
    return (setting.steps + starts) * jobs * _passes(setting, classes)


# --- Settings and inputs ---


def _plan(norm, epsilon, version, names, overrides) -> list[Setting]:
    """The attacks to run, in order."""
    if norm not in BALLS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(BALLS)}")
    check_radius(norm, epsilon)
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} is unknown; choose one of {', '.join(VERSIONS)}")
    if names is None:
        if version == "custom":
            raise ValueError("version='custom' needs attacks=(...); " + _choices(version))
        names = VERSIONS[version]
    if isinstance(names, str):
        raise ValueError(f"attacks={names!r} is a string; pass ({names!r},)")
    for name in [*names, *(overrides or {})]:
        if name not in VERSIONS[version]:
            raise ValueError(f"attack {name!r} is not in version {version!r}; {_choices(version)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"attacks={tuple(names)} are none or repeated; {_choices(version)}")
    changes = _CHANGES[version] | _CHANGES.get(f"{version}, {norm}", {})
    plan = []
    for name in names:
        change = changes.get(name, {}) | dict((overrides or {}).get(name, {}))
        if unknown := set(change) - {"machine", *_EDITABLE}:
            raise ValueError(f"overrides of {name}: {sorted(unknown)}; editable: {_EDITABLE}")
        plan.append(_BASE[name]._replace(norm=norm, **change))
    return plan


_EDITABLE = ("steps", "restarts", "targets", "eot")


def _choices(version: str) -> str:
    return "choose from " + ", ".join(VERSIONS[version])


def _fit(setting: Setting, classes: int, tell: Callable[[str], None]) -> Setting:
    """The setting for this number of classes; says what changes."""
    if setting.targets > classes - 1:
        tell(
            f"{setting.name}: {classes - 1} target classes instead of {setting.targets}, "
            f"the logits have {classes} classes"
        )
        setting = setting._replace(targets=classes - 1)
    if setting.name == "apgd-t" and classes < 4:
        tell("apgd-t: the targeted DLR loss needs 4 classes; climbs the margin z_t - z_y instead")
    if setting.name == "apgd-dlr" and classes < 3:
        tell("apgd-dlr: the DLR loss needs 3 classes; climbs the margin instead")
    return setting


def _classes(runner: engine.Engine, images: np.ndarray) -> int:
    """K, from the shape of the logits."""
    each = runner.slots // runner.mesh.size  # what a device gives to the network
    points = jax.ShapeDtypeStruct((each, *images.shape[1:]), jnp.float32)
    keys = (jax.eval_shape(lambda: jax.random.split(jax.random.key(0), each)),)
    for fn in (runner.logits_fn, runner.search_fn or runner.logits_fn):
        try:
            shape = jax.eval_shape(fn, points, *(keys if runner.keyed else ())).shape
        except TypeError as error:
            takes = "images and keys [B]" if runner.keyed else "images only"
            raise ValueError(f"logits_fn must take {takes} for this version: {error}") from error
        if len(shape) != 2 or shape[0] != each or shape[1] < 2:
            raise ValueError(
                f"logits_fn gives {shape} for {each} images; return logits f[B, K] with K >= 2"
            )
    return shape[1]


def _ids(ids: Sequence[int] | None, n: int) -> np.ndarray:
    numbers = np.arange(n) if ids is None else np.asarray(ids)
    if not n:
        return np.zeros(0, np.uint32)
    whole = numbers.shape == (n,) and np.issubdtype(numbers.dtype, np.integer)
    if not whole or len(np.unique(numbers)) < n or numbers.min() < 0 or numbers.max() >= 2**32:
        raise ValueError(f"image_ids: pass {n} different ints from 0 to 2^32 - 1, one per image")
    return numbers.astype(np.uint32)


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _share(count: int, n: int) -> str:
    return f"{count / n:8.2%}" if n else f"{'-':>8}"
