"""AutoAttack: an ensemble of parameter-free attacks, one after the other on what still stands.

Source: Croce & Hein 2020 (arXiv 2003.01690), Croce & Hein 2021 (arXiv 2103.01208) for L1. The
verdicts are those of auto-attack a392200 (parity: tests/test_autoattack.py), with three
differences: an image stops as soon as it is fooled, so its adversarial image is the first that an
attack finds, not the latest (version "rand" runs to its end); draws belong to the image, not to its
place in a batch; an image is fooled only if a last forward pass and its norm in float64 confirm it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.attacks import ROWS
from jaxrobust.attacks.inputs import check_radius
from jaxrobust.evaluation import checks, engine, networks, plan
from jaxrobust.evaluation.ledger import open_ledger
from jaxrobust.evaluation.progress import Decisions
from jaxrobust.runtime import hosts
from jaxrobust.runtime.progress import say
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
        programs, so another checkpoint compiles nothing; all else is part of the programs, which
        live as long as the function. With version "rand" it takes one key per image, [B], as a
        second argument.
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
      identity: names the network in the ledger; by default its logits on 8 images and a hash
        of its arrays do.
      search_fn: the same network in lower precision, to search with; `logits_fn` decides.
      verbose: progress and a table on stderr.
    Returns:
      `AutoAttackResult`.
    Raises:
      ValueError: settings or inputs that cannot be meant, a ledger of another evaluation, or one
        that another process has open.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    settings = plan.plan(norm, version, attacks, overrides)
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
        runner = engine.trace(runner, images.shape[1:])
        classes = runner.traces[0].classes
        checks.check_images(images, labels, classes=classes)
        settings = [plan.fit(setting, classes, tell) for setting in settings]
        images, labels = np.ascontiguousarray(images, np.float32), labels.astype(np.int32)
        first = _logits(runner, images[:8], ids[:8], int(seed), draw=0)
        evaluation = {
            **_networks(runner, identity, first),
            "data": networks.hashed(images, labels, ids),
            "norm": norm,
            "epsilon": float(epsilon),
            "attacks": [setting._asdict() for setting in settings],
            "seed": int(seed),
            "version": version,
            "search": "logits_fn" if search_fn is None else "search_fn",
        }
        with open_ledger(ledger, evaluation) as book:
            logits = _clean_logits(runner, images, ids, int(seed))
            sample = _Sample(images, labels, ids, logits, float(epsilon), int(seed))
            plain = not runner.keyed and len(images) > 0
            flags = _check_network(runner, images, labels) if plain else {}
            result = _cascade(runner, settings, sample, book, flags, verbose)
    tell(result.table())
    return result


def _cascade(runner, settings, sample, book, flags, verbose) -> AutoAttackResult:
    """Return the attacks, each on what the ones before have left standing."""
    n, classes = len(sample.images), sample.logits.shape[1]
    clean = checks.is_right(sample.logits, sample.labels)
    fooled_by = np.where(clean, "", "clean").astype("<U16")
    found = _Found(clean.copy(), fooled_by, sample.images.copy(), flags)
    costs, accuracy_after = [], {}
    with Decisions(n, interval=checks.binomial_interval, enabled=verbose) as meter:
        for number, setting in enumerate(settings):
            later = sum(plan.most_passes(s, classes) for s in settings[number + 1 :])
            costs.append(_Attack(runner, setting, sample, found, book, meter).run(later))
            accuracy_after[setting.name] = _mean(found.standing)
    flags |= checks.check_cascade({"clean": _mean(clean), **accuracy_after})
    if runner.search_fn is not None:
        costs.append(_search_again(runner, settings, sample, found, book))
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
        self.waiting: list[engine.Verdict] = []  # for a last word, since `confirmed`
        self.confirmed = time.perf_counter()
        self.doubtful: set[int] = set()  # images with an adversarial example that did not hold
        self.compile_seconds = 0.0
        self.flat: list[bool] = []

    def run(self, later: int) -> Cost:
        """Decides every image; `later` passes are needed for one that survives this attack."""
        start, met = time.perf_counter(), int(self.found.standing.sum())
        pending = self.recall()
        mine, known = hosts.share(pending), met - len(pending)
        self.meter.begin(self.name, known + len(mine), known, int(self.found.standing.sum()))
        for call in self.calls(mine):
            self.count(call, later // jax.process_count())
        self.join(mine, known)
        self.flag()
        return Cost(
            attack=self.name,
            fooled=met - int(self.found.standing.sum()),
            forward=self.steps * plan.forward(self.setting),
            backward=self.steps * plan.backward(self.setting, self.classes),
            idle=self.idle * plan.forward(self.setting),
            seconds=time.perf_counter() - start - self.compile_seconds,
            compile_seconds=self.compile_seconds,
        )

    def calls(self, mine):
        """Return the calls of the engine, which decide these images."""
        images, labels, ids, logits, epsilon, seed = self.sample
        targets = plan.targets(self.setting, logits[mine], labels[mine])
        settings = {"epsilon": epsilon, "seed": seed, "confirm": self.confirm}
        return engine.decide(
            self.runner, self.setting, images, labels, ids, mine, targets, **settings
        )

    def count(self, call: engine.Call, later: int) -> None:
        """Take note of what a call took."""
        self.steps += call.useful_steps
        self.idle += call.slot_steps - call.useful_steps
        self.compile_seconds += call.seconds * call.compiles
        made = call.useful_steps * plan.passes(self.setting, self.classes)
        most = plan.most_passes(self.setting, self.classes)
        self.meter.advance(made, call.seconds, call.compiles, most, later)

    def recall(self) -> np.ndarray:
        """Take over what the ledger knows; return the other images."""
        pending, fallen, shape = [], [], self.sample.images.shape[1:]
        for i in np.flatnonzero(self.found.standing).tolist():
            key = int(self.sample.ids[i])
            record = self.book.find(key, self.name)
            if record is None:
                pending.append(i)
                continue
            self.flat.append(record["flat"])
            if record["fooled"]:
                fallen.append(i)
                self.strike(i, self.book.adversarial(key, self.name, shape))
        for start in range(0, len(fallen), self.runner.slots):
            self.doubt(fallen[start : start + self.runner.slots])
        return np.array(pending, int)

    def doubt(self, which: list[int]) -> None:
        """Refuses adversarial images from the ledger that are none, by more than rounding."""
        images, labels, ids, _ = (a[which] for a in self.sample[:4])
        points = self.found.images_adv[which]
        ball = {"norm": self.setting.norm, "epsilon": self.sample.epsilon}
        own = np.eye(self.classes, dtype=bool)[labels]
        inside, _ = checks.verified(points, images, labels, ~own, **ball)  # whatever the logits
        logits = _logits(self.runner, points, ids, self.sample.seed, draw=self.draw())
        with np.errstate(invalid="ignore"):  # infinite ones
            margins = logits[own] - np.where(own, -np.inf, logits).max(axis=1)
            right = margins > hosts.ROUNDING * np.ptp(logits, axis=1)
        for i, there, stands in zip(which, inside, right, strict=True):
            if stands or not there:
                why = "does not fool this network" if there else "is outside the ball"
                raise ValueError(
                    f"the ledger's adversarial image of {self.name} on image {self.sample.ids[i]} "
                    f"{why}: its .images file is damaged or another evaluation's; remove both files"
                )

    def confirm(self, verdicts: list[engine.Verdict], last: bool) -> list[engine.Verdict]:
        """Write what holds, and return what does not, once enough has come for a whole batch.

        Nothing waits for long, where it would be lost in a kill; with `last` nothing waits at all.
        """
        for verdict in verdicts:
            if verdict.fooled:
                self.waiting.append(verdict)
            else:
                self.write(verdict, None, 0.0)
        due = last or len(self.waiting) >= self.runner.slots
        if not due and time.perf_counter() - self.confirmed <= 5:
            return []
        waiting, self.waiting, self.confirmed = self.waiting, [], time.perf_counter()
        parts = range(0, len(waiting), self.runner.slots)
        return [v for i in parts for v in self.refuted(waiting[i : i + self.runner.slots])]

    def refuted(self, part: list[engine.Verdict]) -> list[engine.Verdict]:
        """Return the last word: one more forward pass, and the norm in float64."""
        which = [v.image for v in part]
        images, labels, ids, _ = (a[which] for a in self.sample[:4])
        points = np.stack([v.adversarial for v in part if v.adversarial is not None])
        points = engine.settled(self.runner, self.setting.norm, points, images)
        logits = _logits(self.runner, points, ids, self.sample.seed, draw=self.draw())
        ball = {"norm": self.setting.norm, "epsilon": self.sample.epsilon}
        sure, norms = checks.verified(points, images, labels, logits, **ball)
        wrong = []
        for verdict, ok, norm, point in zip(part, sure, norms, points, strict=True):
            if ok:
                self.write(verdict, point, float(norm))
            elif self.runner.keyed:  # one wrong draw; as in the reference, the run is over
                self.write(verdict, None, 0.0)
            else:
                wrong.append(verdict)
        self.doubtful |= {verdict.image for verdict in wrong}
        return wrong

    def draw(self) -> int:
        """Of a randomised network's last forward pass; 0 is that of the clean images."""
        return 1 + plan.named(self.setting.name).number

    def write(self, verdict: engine.Verdict, adversarial: np.ndarray | None, norm: float) -> None:
        """Write a verdict into the ledger."""
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
        """Take note that an image is fooled."""
        self.found.standing[i] = False
        self.found.fooled_by[i] = self.name
        self.found.images_adv[i] = adversarial

    def join(self, mine: np.ndarray, known: int) -> None:
        """Take over what the other processes found, and add up what all of them took."""
        fallen = mine[~self.found.standing[mine]]
        unconfirmed = sum(self.found.standing[list(self.doubtful)])
        counts = np.array([self.steps, self.idle, unconfirmed])
        points = self.found.images_adv[fallen]
        parts = hosts.everyone((fallen, points, self.flat[known:], counts))
        for which, theirs, _, _ in parts:
            for i, adversarial in zip(which, theirs, strict=True):
                self.strike(i, adversarial)
        self.flat[known:] = [flat for part in parts for flat in part[2]]
        sums = np.sum([part[3] for part in parts], axis=0)
        self.steps, self.idle, self.unconfirmed = sums.tolist()

    def flag(self) -> None:
        """Flag what this attack makes doubtful."""
        flags = self.found.flags
        untargeted = not (self.setting.targets or self.suffix)
        if untargeted and ROWS[self.setting.machine].flat:
            flags.update(checks.check_gradients(np.array(self.flat, bool)))
        if self.unconfirmed:
            flags[f"unconfirmed by {self.name}"] = (
                f"{self.unconfirmed} images were fooled in the search but not in a last forward "
                "pass, or left the ball, nor was anything else found in the steps after; they "
                "count as robust. Numerics that depend on the batch do this: look for batch "
                "statistics, or compare with batch_size=1"
            )


def _search_again(runner, settings, sample, found, book) -> Cost:
    """Search survivors with the network that decides: some, and if one of them falls, all.

    So `robust` is what one search left, never a mixture of two.
    """
    survivors = np.flatnonzero(found.standing)
    count = min(_SAMPLE, len(survivors))
    chosen = np.zeros_like(found.standing)
    chosen[np.random.default_rng(sample.seed).choice(survivors, count, replace=False)] = True
    runner = runner._replace(search_fn=None)
    costs = _attacked(runner, settings, sample, found, book, chosen)
    fallen = int((chosen & ~found.standing).sum())
    text = f"of {count} survivors of the search with search_fn, {fallen} were fooled by one with "
    text += "logits_fn itself"
    if fallen and count < len(survivors):
        costs += _attacked(runner, settings, sample, found, book, found.standing & ~chosen)
        every = int((~found.standing[survivors]).sum())
        text += f", hence all {len(survivors)} were attacked so, and {every} fell"
    found.flags["search-gap"] = text + ("; search with logits_fn" if fallen else "")
    return Cost("full", *(sum(column) for column in list(zip(*costs, strict=True))[1:]))


def _attacked(runner, settings, sample, found, book, chosen) -> list[Cost]:
    """Return what attacks on some images cost that stand; those that fall no longer do."""
    again = found._replace(standing=chosen.copy())
    interval, count = checks.binomial_interval, int(chosen.sum())
    with Decisions(count, interval=interval, enabled=False) as meter:
        costs = [
            _Attack(runner, setting, sample, again, book, meter, suffix=" (full)").run(0)
            for setting in settings
        ]
    found.standing[chosen & ~again.standing] = False
    return costs


def _check_network(runner, images, labels):
    """Return what any process saw; all look at the same images."""
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
    logits = np.zeros((len(images), runner.traces[0].classes), np.float32)
    for which, values in hosts.everyone(
        (mine, _logits(runner, images[mine], ids[mine], seed, draw=0))
    ):
        logits[which] = values
    return logits


def _logits(runner, images, ids, seed, *, draw):
    """f32[n, K]."""
    if not len(images):
        return np.zeros((0, runner.traces[0].classes), np.float32)
    return engine.forward(runner, images, ids, seed=seed, draw=draw)


def _networks(runner: engine.Engine, name: str | None, first: np.ndarray) -> dict[str, Any]:
    """Return what tells networks apart in a ledger: the name, or first logits and all arrays."""
    if name:
        return {"network": name}
    both = {"weights": runner.logits_fn, "search weights": runner.search_fn}
    pairs = zip(both.items(), runner.traces, strict=False)
    hashes = {key: networks.weights(network, seen) for (key, network), seen in pairs}
    return {"network": first[:, :16].astype(float).tolist()} | hashes


def _ids(ids: Sequence[int] | None, n: int) -> np.ndarray:
    numbers = np.arange(n) if ids is None else np.asarray(ids)
    if not n:
        return np.zeros(0, np.uint32)
    whole = numbers.shape == (n,) and np.issubdtype(numbers.dtype, np.integer)
    if not whole or len(np.unique(numbers)) < n or numbers.min() < 0 or numbers.max() >= 2**32:
        raise ValueError(f"image_ids: pass {n} different ints from 0 to 2^32 - 1, one per image")
    return numbers.astype(np.uint32)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _share(count: float, n: int) -> str:
    return f"{count / n:8.2%}" if n else f"{'-':>8}"
