"""AutoAttack: an ensemble of parameter-free attacks, one after the other on what still stands.

Source: Croce & Hein 2020 (arXiv 2003.01690), Croce & Hein 2021 (arXiv 2103.01208) for L1. The
verdicts are those of auto-attack a392200 (parity: tests/test_autoattack.py), with three
differences: an image stops as soon as it is fooled, so its adversarial image is the first that an
attack finds, not the latest (version "rand" runs to its end); draws belong to the image, not to its
place in a batch; an image is fooled only if a last forward pass and its norm in float64 confirm it.
"""

import hashlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks.machine import check_radius
from jaxrobust.evaluation import checks, engine, hosts, versions
from jaxrobust.evaluation.ledger import open_ledger
from jaxrobust.progress import Decisions, say
from jaxrobust.types import Array

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

    In a program of several processes each of them calls this, with the same arguments: they divide
    the images that stand before each attack, and all return the same verdicts.

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
      batch_size: slots on all devices of a process together; see `engine.make`.
      image_ids: N different ints below 2^32; an image's draws derive from its id, so a part of a
        dataset gets the verdicts it has in the whole. Default 0..N-1.
      ledger: a file (.jsonl) of verdicts; the same call continues with it, on any number of
        processes. Each writes a file beside it, in a folder that all of them see.
      identity: names the network in the ledger; by default its logits on 8 images do.
      search_fn: the same network in lower precision, to search with; `logits_fn` decides.
      verbose: progress and a table on stderr.
    Returns:
      `AutoAttackResult`.
    Raises:
      ValueError: settings or inputs that cannot be meant, a ledger of another evaluation.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    settings = versions.plan(norm, version, attacks, overrides)
    check_radius(norm, epsilon)
    if not (isinstance(seed, int | np.integer) and 0 <= seed < 2**32):
        raise ValueError(f"seed={seed!r}: pass an int from 0 to 2^32 - 1")
    checks.check_images(images, labels)
    ids = _ids(image_ids, len(images))
    runner = engine.make(
        logits_fn,
        search_fn=search_fn,
        slots=batch_size,
        image_size=max(images.shape[1:3]),
        keyed=version == "rand",
    )
    tell = say if verbose else lambda message: None
    with jax.set_mesh(runner.mesh):  # also where the caller has set another one
        classes = _classes(runner, images)
        checks.check_images(images, labels, classes=classes)
        settings = [versions.fit(setting, classes, tell) for setting in settings]
        images, labels = np.ascontiguousarray(images, np.float32), labels.astype(np.int32)
        first = _logits(runner, images[:8], ids[:8], int(seed), draw=0)
        evaluation = {
            "network": identity or np.round(first[:, :16].astype(float), 6).tolist(),
            "data": _hash(images, labels, ids),
            "norm": norm,
            "epsilon": float(epsilon),
            "attacks": [setting._asdict() for setting in settings],
            "seed": int(seed),
            "version": version,
            "search": "logits_fn" if search_fn is None else "search_fn",
        }
        book = open_ledger(ledger, evaluation)
        logits = _clean_logits(runner, images, ids, int(seed))
        sample = _Sample(images, labels, ids, logits, float(epsilon), int(seed))
        flags = {} if runner.keyed or not len(images) else _check_network(runner, images, labels)
        result = _cascade(runner, settings, sample, book, flags, verbose)
    tell(result.table())
    return result


def _cascade(runner, settings, sample, book, flags, verbose) -> AutoAttackResult:
    """The attacks, each on what the ones before have left standing."""
    n, classes = len(sample.images), sample.logits.shape[1]
    clean = np.argmax(sample.logits, axis=1) == sample.labels
    fooled_by = np.where(clean, "", "clean").astype("<U16")
    found = _Found(clean.copy(), fooled_by, sample.images.copy(), flags)
    costs, accuracy_after = [], {}
    with Decisions(n, interval=checks.binomial_interval, enabled=verbose) as meter:
        for number, setting in enumerate(settings):
            later = sum(versions.most_passes(s, classes) for s in settings[number + 1 :])
            costs.append(_Attack(runner, setting, sample, found, book, meter).run(later))
            accuracy_after[setting.name] = _mean(found.standing)
    flags |= checks.check_cascade({"clean": _mean(clean), **accuracy_after})
    if runner.search_fn is not None:
        costs.append(_search_gap(runner, settings, sample, found, book))
        accuracy_after[costs[-1].attack] = _mean(found.standing)
    return AutoAttackResult(
        clean=clean,
        robust=found.standing,
        fooled_by=found.fooled_by,
        images_adv=found.images_adv,
        flags=flags,
        accuracy_after=accuracy_after,
        attacks=[setting._asdict() for setting in settings],
        costs=costs,
    )


class _Sample(NamedTuple):
    """What is evaluated."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    epsilon: float
    seed: int


class _Found(NamedTuple):
    """What the attacks have found so far; they write into it."""

    standing: np.ndarray  # bool[N]
    fooled_by: np.ndarray
    images_adv: np.ndarray
    flags: dict[str, str]


class _Attack:
    """One attack on all images that stand, from the ledger as far as it knows them."""

    def __init__(self, runner, setting, sample, found, book, meter, suffix=""):
        self.runner, self.setting, self.sample, self.found = runner, setting, sample, found
        self.book, self.meter, self.suffix = book, meter, suffix
        self.name, self.classes = setting.name + suffix, sample.logits.shape[1]
        self.steps = self.idle = self.unconfirmed = 0  # of all processes after `join`
        self.compile_seconds = 0.0
        self.flat: list[bool] = []

    def run(self, later: int) -> Cost:
        """Decides every image; `later` passes are needed for one that survives this attack."""
        start, met = time.perf_counter(), int(self.found.standing.sum())
        pending = self.recall()
        mine, known = hosts.share(pending), met - len(pending)
        self.meter.begin(self.name, known + len(mine), known, int(self.found.standing.sum()))
        waiting: list[engine.Verdict] = []
        asked = time.perf_counter()
        for call, verdicts in self.calls(mine):
            for verdict in verdicts:
                if verdict.fooled:
                    waiting.append(verdict)
                else:
                    self.write(verdict, None, 0.0)
            # Whole batches, but nothing waits for long: it would be lost in a kill.
            if len(waiting) >= self.runner.slots or time.perf_counter() - asked > 5:
                self.confirm(waiting)
                waiting, asked = [], time.perf_counter()
            self.count(call, later // jax.process_count())
        self.confirm(waiting)
        self.join(mine, known)
        self.flag()
        return Cost(
            attack=self.name,
            fooled=met - int(self.found.standing.sum()),
            forward=self.steps * versions.forward(self.setting),
            backward=self.steps * versions.backward(self.setting, self.classes),
            idle=self.idle * versions.forward(self.setting),
            seconds=time.perf_counter() - start - self.compile_seconds,
            compile_seconds=self.compile_seconds,
        )

    def calls(self, mine):
        """The calls of the engine, and the verdicts on these images."""
        images, labels, ids, logits, epsilon, seed = self.sample
        targets = versions.targets(self.setting, logits[mine], labels[mine])
        settings = {"epsilon": epsilon, "seed": seed}
        return engine.decide(
            self.runner, self.setting, images, labels, ids, mine, targets, **settings
        )

    def count(self, call: engine.Call, later: int) -> None:
        """Takes note of what a call took."""
        self.steps += call.useful_steps
        self.idle += call.slot_steps - call.useful_steps
        self.compile_seconds += call.seconds * call.compiles
        made = call.useful_steps * versions.passes(self.setting, self.classes)
        most = versions.most_passes(self.setting, self.classes)
        self.meter.advance(made, call.seconds, call.compiles, most, later)

    def recall(self) -> np.ndarray:
        """Takes over what the ledger knows; returns the other images."""
        pending, shape = [], self.sample.images.shape[1:]
        for i in np.flatnonzero(self.found.standing).tolist():
            key = int(self.sample.ids[i])
            record = self.book.find(key, self.name)
            if record is None:
                pending.append(i)
                continue
            self.flat.append(record["flat"])
            if record["fooled"]:
                self.strike(i, self.sound(i, self.book.adversarial(key, self.name, shape)))
        return np.array(pending, int)

    def sound(self, i: int, point: np.ndarray) -> np.ndarray:
        """An adversarial image from the ledger, refused if it is none: a disk may have lost it."""
        images, label = self.sample.images[i : i + 1], self.sample.labels[i : i + 1]
        wrong = -np.eye(self.classes)[label]  # what remains in question is the point
        ball = {"norm": self.setting.norm, "epsilon": self.sample.epsilon}
        if not checks.verified(point[None], images, label, wrong, **ball)[0][0]:
            raise ValueError(
                f"the ledger's adversarial image of {self.name} on image {self.sample.ids[i]} is "
                "outside the ball: its .images file is damaged; remove both files"
            )
        return point

    def confirm(self, verdicts: list[engine.Verdict]) -> None:
        """The last word: one more forward pass, and the norm in float64."""
        for start in range(0, len(verdicts), self.runner.slots):
            part = verdicts[start : start + self.runner.slots]
            which = [v.image for v in part]
            images, labels, ids, _ = (a[which] for a in self.sample[:4])
            points = np.stack([v.adversarial for v in part if v.adversarial is not None])
            points = engine.settled(self.runner, self.setting.norm, points, images)
            logits = _logits(self.runner, points, ids, self.sample.seed, draw=self.draw())
            sure, norms = checks.verified(
                points,
                images,
                labels,
                logits,
                norm=self.setting.norm,
                epsilon=self.sample.epsilon,
            )
            for verdict, ok, norm, point in zip(part, sure, norms, points, strict=True):
                self.write(verdict, point if ok else None, float(norm) if ok else 0.0)
                self.unconfirmed += not ok

    def draw(self) -> int:
        """Of a randomised network's last forward pass; 0 is that of the clean images."""
        return 1 + engine.NUMBERS[self.setting.name]

    def write(self, verdict: engine.Verdict, adversarial: np.ndarray | None, norm: float) -> None:
        """A verdict into the ledger."""
        i = verdict.image
        record = {
            "image": int(self.sample.ids[i]),
            "attack": self.name,
            "fooled": adversarial is not None,
            "target": verdict.target,
            "restart": verdict.restart,
            "iterations": verdict.steps,
            "norm": norm,
            "seed": self.sample.seed,
            "flat": verdict.flat,
        }
        self.book.add(record, adversarial)
        self.flat.append(verdict.flat)
        if adversarial is not None:
            self.strike(i, adversarial)
        self.meter.decided(int(self.found.standing.sum()))

    def strike(self, i: int, adversarial: np.ndarray) -> None:
        """An image is fooled."""
        self.found.standing[i] = False
        self.found.fooled_by[i] = self.name
        self.found.images_adv[i] = adversarial

    def join(self, mine: np.ndarray, known: int) -> None:
        """Takes over what the other processes found, and adds up what all of them took."""
        fallen = mine[~self.found.standing[mine]]
        counts = np.array([self.steps, self.idle, self.unconfirmed])
        points = self.found.images_adv[fallen]
        parts = hosts.everyone((fallen, points, self.flat[known:], counts))
        for which, theirs, _, _ in parts:
            for i, adversarial in zip(which, theirs, strict=True):
                self.strike(i, adversarial)
        self.flat[known:] = [flat for part in parts for flat in part[2]]
        sums = np.sum([part[3] for part in parts], axis=0)
        self.steps, self.idle, self.unconfirmed = sums.tolist()

    def flag(self) -> None:
        """What this attack makes doubtful."""
        flags = self.found.flags
        if self.setting.name in ("apgd-ce", "apgd-dlr") and not self.suffix:
            flags.update(checks.check_gradients(np.array(self.flat, bool)))
        if self.unconfirmed and not self.runner.keyed:  # of a randomised network: as it must be
            flags[f"unconfirmed by {self.name}"] = (
                f"{self.unconfirmed} images were fooled in the search but not in a last forward "
                "pass, or left the ball; they count as robust. Numerics that depend on the batch "
                "do this: look for batch statistics, or compare with batch_size=1"
            )


def _search_gap(runner, settings, sample, found, book) -> Cost:
    """Attacks some of the survivors once more, searching with the network that decides."""
    survivors = np.flatnonzero(found.standing)
    count = min(_SAMPLE, len(survivors))
    chosen = np.zeros_like(found.standing)
    chosen[np.random.default_rng(sample.seed).choice(survivors, count, replace=False)] = True
    again = found._replace(standing=chosen.copy())
    runner = runner._replace(search_fn=None)
    with Decisions(count, interval=checks.binomial_interval, enabled=False) as meter:
        costs = [
            _Attack(runner, setting, sample, again, book, meter, suffix=" (full)").run(0)
            for setting in settings
        ]
    fallen = chosen & ~again.standing
    found.standing[fallen] = False
    found.flags["search-gap"] = (
        f"of {count} survivors of the search with search_fn, {fallen.sum()} were fooled by one "
        "with logits_fn itself" + ("; search with logits_fn" if fallen.any() else "")
    )
    return Cost("full", *(sum(column) for column in list(zip(*costs, strict=True))[1:]))


def _check_network(runner, images, labels):
    """What any process saw; all look at the same images."""
    flags = checks.check_network(
        lambda x: engine.forward(runner, x),
        runner.logits_fn,
        images,
        labels,
        batch_size=runner.slots // runner.mesh.size,
    )
    return {name: text for seen in hosts.everyone(flags) for name, text in seen.items()}


def _clean_logits(runner, images, ids, seed):
    """f32[N, K], the same bits in all processes, each of which computes its share."""
    mine = hosts.share(np.arange(len(images)))
    logits = np.zeros((len(images), _classes(runner, images)), np.float32)
    for which, values in hosts.everyone(
        (mine, _logits(runner, images[mine], ids[mine], seed, draw=0))
    ):
        logits[which] = values
    return logits


def _logits(runner, images, ids, seed, *, draw):
    """f32[n, K]."""
    if not len(images):
        return np.zeros((0, _classes(runner, images)), np.float32)
    return engine.forward(runner, images, ids, seed=seed, draw=draw)


def _classes(runner: engine.Engine, images: np.ndarray) -> int:
    """K, from the shape of the logits."""
    each = runner.slots // runner.mesh.size  # what a device gives to the network
    points = jax.ShapeDtypeStruct((each, *images.shape[1:]), jnp.float32)
    keys = (jax.eval_shape(lambda: jax.random.split(jax.random.key(0), each)),)
    operands = (points, *(keys if runner.keyed else ()))
    for fn in (runner.logits_fn, runner.search_fn or runner.logits_fn):
        try:
            inspect.signature(fn).bind(*operands)
        except TypeError as error:
            takes = "images and keys [B]" if runner.keyed else "images only"
            raise ValueError(f"logits_fn must take {takes} for this version: {error}") from error
        except ValueError:  # it has no signature to read
            pass
        try:
            logits = jax.eval_shape(fn, *operands)
        except jax.errors.TracerArrayConversionError as error:
            raise ValueError(
                "logits_fn turns its images into NumPy arrays; write it with jax.numpy, so that "
                "it can be differentiated and compiled"
            ) from error
        shape: Sequence[int] = getattr(logits, "shape", ())
        if len(shape) != 2 or shape[0] != each or shape[1] < 2:
            raise ValueError(
                f"logits_fn gives {shape or type(logits).__name__} for {each} images; "
                "return logits f[B, K] with K >= 2, and nothing else"
            )
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise ValueError(f"logits_fn gives {logits.dtype}; return floating point logits")
    return int(shape[1])


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
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _share(count: float, n: int) -> str:
    return f"{count / n:8.2%}" if n else f"{'-':>8}"
