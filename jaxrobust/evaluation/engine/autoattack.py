"""AutoAttack: an ensemble of parameter-free attacks, each run on the images that survive so far.

Source: Croce & Hein 2020 (arXiv 2003.01690), Croce & Hein 2021 (arXiv 2103.01208) for L1. The
verdicts are those of auto-attack a392200 (parity: tests/evaluation/engine/test_autoattack.py),
with three differences. An image stops as soon as it is fooled, so its adversarial image is the
first that an attack finds, not the latest (version "rand" runs to its end). Random draws depend on
the image, not on its place in a batch. An image counts as fooled only if a last forward pass and
its norm in float64 confirm it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.attacks import Setting, ensembles, inputs
from jaxrobust.attacks.refused_network import as_function
from jaxrobust.evaluation.engine import engine, turns
from jaxrobust.evaluation.engine import replay as replays
from jaxrobust.evaluation.engine.evaluation_progress import Decisions
from jaxrobust.evaluation.engine.ledger import Ledger, open_ledger
from jaxrobust.evaluation.engine.outcome import AttackContext, Outcome, classified
from jaxrobust.evaluation.engine.result import AutoAttackResult, ResultFacts
from jaxrobust.evaluation.engine.schedule import Sample
from jaxrobust.evaluation.network import (
    checks,
    collapse,
    fingerprint,
    label_checks,
    randomised,
    reliability,
    user_attacks,
)
from jaxrobust.evaluation.network import images as image_sets
from jaxrobust.evaluation.network.fingerprint import Fingerprint
from jaxrobust.evaluation.network.images import Adversarial, ImageSet, InRange, Subset, clipped
from jaxrobust.evaluation.network.user_attacks import UserAttack
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.stopping import StopRule
from jaxrobust.evaluation.records.verdicts import HashedImages, Verdicts
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text import patience, spelling
from jaxrobust.runtime.text.progress import say
from jaxrobust.tasks.task import Task, TaskNetwork
from jaxrobust.types import Array, Threat, check_number


class _Evaluation(NamedTuple):
    """A checked call of `autoattack`."""

    runner: engine.Engine
    images: Any  # clipped to [0, 1]
    labels: np.ndarray
    ids: np.ndarray  # u32[N]
    threat: Threat
    seed: int
    settings: list[Setting]
    full: list[Setting]  # settings of its ledger: "fast" does a part of "standard"
    rule: randomised.VerdictRule | None
    sources: Sequence[replays.LedgerSource]
    robust_beyond: np.ndarray  # bool[N]
    stop: StopRule | None
    users: Sequence[UserAttack]
    verbose: bool
    of_task: TaskNetwork | None  # None: logits of classes
    identity: dict[str, Any]  # of its ledger
    hashes: np.ndarray = np.zeros(0, str)  # of the images

    @property
    def answers(self) -> str:
        """Return the word for what decides whether an image is right."""
        return "logits" if self.of_task is None else "scores"

    def waiting(self, text: str) -> AbstractContextManager[Any]:
        """Show that a long operation is running."""
        return patience.of(text, here=self.verbose and jax.process_index() == 0)


def autoattack(
    logits_fn: Callable[..., Array],
    images: np.ndarray | Array | ImageSet,
    labels: Any,
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
    identity: str | fingerprint.Fingerprint | None = None,
    search_fn: Callable[..., Array] | None = None,
    replay: Sequence[str | Path] = (),
    robust_beyond: np.ndarray | None = None,
    rule: str | None = None,
    draws: int | None = None,
    stop: StopRule | None = None,
    users: Sequence[UserAttack] = (),
    task: Task | None = None,
    verbose: bool = True,
) -> AutoAttackResult:
    """Return the robust accuracy of a network under AutoAttack.

    In a multi-process program every process calls this with the same arguments. They share the
    surviving images before each attack, and all return the same verdicts.

    Args:
      logits_fn: f32[B,H,W,C] in [0, 1] -> f[B,K], not softmax; normalizes inside. A function, an
        NNX module or `(linen_module, variables)`; preferably a `jax.tree_util.Partial(apply,
        params, stats)`: its arrays are arguments of the compiled programs, so another checkpoint
        needs no compilation. All else is part of the programs, which live as long as the function.
        With version "rand" it takes a second argument, one key per image, [B].
      images: f32[N,H,W,C] in [0, 1], or an `evaluation.ImageSet`, which loads a few at a time; then
        `images_adv` is one too, and with a `ledger` stays on disk. Pixels up to 1e-6 outside are
        clipped, and the record says so.
      labels: i[N]; with a `task` its targets, arrays [N, ...].
      norm: "linf", "l2", "l1" or "l0". In l0, version "standard" is Sparse-AutoAttack (Zhong et al.
        2024): Sparse-PGD with unprojected and with projected gradients, then Sparse-RS.
      epsilon: radius, in units of pixels in [0, 1] (8/255); in l0 the number of pixels.
      version: "standard"; "plus" (more restarts, untargeted FAB); "rand" (randomized defenses,
        averaged gradients); "custom" (`attacks`, 5 restarts); "fast" (some jobs of "standard" on
        all images, the others on a sample of the survivors; `about["fast"]` bounds what they would
        still fool, and the same call with "standard" continues its ledger).
      attacks: names to run; by default those of the version.
      overrides: changes of an attack's `steps`, `restarts`, `targets` or `eot`, by name.
      seed: of all random draws.
      batch_size: total number of slots on all devices of a process; see `engine.make`.
      image_ids: N different ints below 2^32; an image's draws derive from its id, so a subset of a
        dataset gets the same verdicts as in the full set. Default 0..N-1.
      ledger: a file (.jsonl) of verdicts; the same call resumes from it, on any number of
        processes. Each writes a file next to it, in a folder shared by all of them.
      identity: the network's name, for readers of the ledger. The network is identified by its
        fingerprint: the traced programs of its logits and input gradient and all its arrays. A
        caller who already has the fingerprint passes it here.
      search_fn: the same network in lower precision, used for the search; `logits_fn` decides.
      replay: ledgers of other evaluations of these images (radius, norm, seed, epoch, network);
        their adversarial images are tried before any attack, one forward pass each.
      robust_beyond: bool[N], images that such an evaluation has found robust at a larger radius of
        the same norm: only the first attack is run on these. None: no image.
      rule: how version "rand" reaches verdicts: "majority" (an image is right if more than half of
        its draws are; the default), "mean" (if the label has the largest mean of their softmax
        probabilities) or "one-draw" (if its only draw is right, as in auto-attack). The result of
        "one-draw" is always listed too.
      draws: number of draws per image for the rule, 20 by default.
      stop: a rule that ends the evaluation once it is decided (`records.stopping.StopRule`). The
        images go through all attacks in lots, in an order fixed by the seed and their ids. The
        result covers the images attacked; `about["stopped"]` bounds that of all. The same call
        without it continues the ledger to the standard result. Not with `replay`, `robust_beyond`,
        `search_fn` or version "rand", where verdicts may still change at the end.
      users: your own points or functions (`network.user_attacks`), tried last on the survivors, or
        alone with `attacks=()`. Not with `stop` or versions "rand" and "fast".
      task: the task of a network that returns anything but logits (`jaxrobust.tasks`). APGD with
        five restarts and Square maximize its loss, as "apgd-task" and "square-task" of `attacks`;
        `clean` and `robust` say whether the score holds. Only with version "standard".
      verbose: print progress and a table on stderr.
    Returns:
      `AutoAttackResult`.
    Raises:
      ValueError: invalid settings or inputs, a network whose logits are finite for no image, a
        ledger of another evaluation, or one that another process has open.

    >>> weights = np.eye(4, dtype=np.float32)
    >>> logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
    >>> images = np.float32([[0.9, 0, 0, 0], [0, 0.2, 0, 0.1]]).reshape(2, 2, 2, 1)
    >>> result = autoattack(
    ...     logits_fn, images, [0, 1], norm="linf", epsilon=0.1, attacks=("apgd-ce",), verbose=False
    ... )
    >>> result.robust.tolist(), result.accuracy_after
    ([True, False], {'apgd-ce': 0.5})
    """
    logits_fn = as_function(logits_fn)
    if task is not None and isinstance(task, Task) and getattr(task.goal, "logits", False):
        task = None
    targets, labels = labels, labels if task is None else np.zeros(len(images), np.int32)
    inputs.check_array("labels", labels)
    in_memory = hasattr(images, "dtype") or not isinstance(images, ImageSet)
    if in_memory:
        inputs.check_array("images", images)
    pixels: Any = np.asarray(images) if in_memory else images
    labels, norm = np.asarray(labels), spelling.norm(norm)
    if task is not None:
        _refuse_with_task(version, users)
        version = ensembles.TASK
    elif version == ensembles.TASK:
        raise ValueError("version='task' needs a task; pass task=..., such as tasks.segmentation()")
    ledger_version = "standard" if version == ensembles.FAST else version
    settings, full = (
        _plan(norm, name, attacks, overrides, users=users, stop=stop)
        for name in (version, ledger_version)
    )
    verdict_rule = _verdict_rule(version, rule, draws)
    threat = Threat(norm, check_number("epsilon", epsilon))
    if not (isinstance(seed, int | np.integer) and 0 <= seed < 2**32):
        raise ValueError(f"seed={seed!r} must be an int from 0 to 2^32 - 1")
    checks.check_images(pixels, labels)
    if norm == "l0":
        inputs.check_pixels(threat.epsilon, of=pixels.shape[1] * pixels.shape[2])
    pixels, overshot = clipped(pixels) if in_memory else (InRange(pixels), None)
    ids = _checked_ids(image_ids, len(pixels))
    beyond = np.zeros(len(pixels), bool) if robust_beyond is None else np.asarray(robust_beyond)
    if beyond.shape != (len(pixels),) or beyond.dtype != bool:
        raise ValueError(f"robust_beyond: pass {len(pixels)} booleans, one per image")
    operand, of_task = "" if verdict_rule is None else "keys", None
    if task is not None:
        operand, of_task = "ids", TaskNetwork.of(task, logits_fn, targets, ids)
        search = search_fn and TaskNetwork.of(task, search_fn, of_task.targets, ids).judged()
        logits_fn, search_fn = of_task.judged(), search
    runner = engine.make(
        logits_fn,
        search_fn=search_fn,
        slots=batch_size,
        image_size=max(pixels.shape[1:3]),
        operand=operand,
        tally=verdict_rule.tally if verdict_rule else "",
    )
    _refuse_combinations(runner, version, len(replay) > 0, bool(beyond.any()), stop)
    user_attacks.check(users, pixels, ids, threat)
    sources = [replays.source(Path(path)) for path in replay]
    identity_facts: dict[str, Any] = {"network": identity if isinstance(identity, str) else None}
    if of_task is not None:
        identity_facts["task"] = of_task.identity
    call = _Evaluation(
        *(runner, pixels, labels, ids, threat, int(seed), settings, full, verdict_rule),
        *(sources, beyond, stop, users, verbose, of_task),
        identity_facts | {"version": ledger_version},
    )
    with jax.set_mesh(runner.mesh):  # also if the caller has set a different one
        call = _prepare(call, identity if isinstance(identity, Fingerprint) else None)
        with open_ledger(ledger, call.identity, ids) as book:
            evaluation, attacked, answers = _run(call, book, fast=version == ensembles.FAST)
    about = attacked.about | {"version": version, "chosen": bool(attacks is not None or overrides)}
    if overshot := overshot if in_memory else pixels.overshot():
        about["clipped"] = overshot
    complete = not isinstance(identity, Fingerprint)  # else they may be a part of a caller's images
    result = _described(call, evaluation, attacked._replace(about=about), answers, complete)
    if verbose:
        say(result.table(brief=not complete))  # who has the rest of the images says the rest
    return result


def _plan(
    norm: str,
    version: str,
    attacks: Sequence[str] | None,
    overrides: Mapping[str, Mapping[str, Any]] | None,
    *,
    users: Sequence[UserAttack],
    stop: StopRule | None,
) -> list[Setting]:
    """List the attacks to run; the list may be empty if the user brings some."""
    if users and (stop is not None or version in ("rand", ensembles.FAST)):
        raise ValueError(
            "users cannot be combined with stop, or with version 'rand' or 'fast'; omit users"
        )
    if users and attacks is not None and not len(attacks):
        return []
    return ensembles.plan(norm, version, attacks, overrides)


def _refuse_with_task(version: str, users: Sequence[UserAttack]) -> None:
    if version != "standard":
        raise ValueError(f"version={version!r} needs logits; omit either version or task")
    if functions := [user.flag for user in users if user.function is not None]:
        raise ValueError(f"{functions[0]} needs logits; pass its points instead, or omit task")


def _verdict_rule(
    version: str, rule: str | None, draws: int | None
) -> randomised.VerdictRule | None:
    if version == "rand":
        return randomised.verdict(rule, draws)
    if rule is not None or draws is not None:
        option = f"rule={rule!r}" if rule is not None else f"draws={draws!r}"
        raise ValueError(f"{option} is for randomized networks; pass version='rand', or omit it")
    return None


def _checked_ids(ids: Sequence[int] | None, n: int) -> np.ndarray:
    numbers = np.arange(n) if ids is None else np.asarray(ids)
    if not n:
        return np.zeros(0, np.uint32)
    integers = numbers.shape == (n,) and np.issubdtype(numbers.dtype, np.integer)
    if not integers or len(np.unique(numbers)) < n or numbers.min() < 0 or numbers.max() >= 2**32:
        raise ValueError(f"image_ids must be {n} distinct ints from 0 to 2^32 - 1, one per image")
    return numbers.astype(np.uint32)


def _refuse_combinations(
    runner: engine.Engine, version: str, replay: bool, beyond: bool, stop: StopRule | None
) -> None:
    options = {"version='rand'": runner.keyed, "search_fn": runner.search_fn is not None}
    options |= {"replay": replay, "robust_beyond": beyond}
    if runner.keyed and (replay or options["search_fn"]):
        option = "replay" if replay else "search_fn"
        raise ValueError(f"version='rand' does not support {option}; leave it out")
    present = [name for name, is_used in options.items() if is_used]
    if version == ensembles.FAST:
        present = [name for name in present if name != "replay"] + ["stop"] * (stop is not None)
        if present:
            raise ValueError(
                f"version='fast' cannot be combined with {present[0]}; omit one of them"
            )
    if stop is not None and present:
        raise ValueError(
            f"{present[0]} may change verdicts that stop has already used; omit it, or omit stop"
        )


def _prepare(call: _Evaluation, network: Fingerprint | None) -> _Evaluation:
    """Trace the network, fit the attacks to its classes, and identify it and the images."""
    runner, images, labels = call.runner, call.images, call.labels
    with call.waiting("tracing the network"):
        runner = engine.trace(runner, images.shape[1:])
    classes = runner.traces[0].classes
    checks.check_images(images, labels, classes=classes)
    tell = say if call.verbose else lambda text: None
    full = [ensembles.fit(setting, classes, tell) for setting in call.full]
    settings = [ensembles.fit(setting, classes, lambda text: None) for setting in call.settings]
    labels = labels.astype(np.int32)
    if isinstance(images, np.ndarray):
        images = np.ascontiguousarray(images, np.float32)
    with call.waiting("fingerprinting network and images"):
        batch: Any = {"batch": runner.slots // runner.mesh.size, "operand": runner.operand}
        if network is None:
            network = fingerprint.of_network(runner.logits_fn, images, labels=labels, **batch)
        search = runner.search_fn and fingerprint.exact(runner.search_fn, images.shape[1:], **batch)
        digest, hashes = image_sets.hashes(images, labels, call.ids)
        if call.of_task is not None:
            digest, hashes = call.of_task.hashes(digest, hashes)
    identity: dict[str, Any] = (
        call.identity
        | {
            "fingerprint": network._asdict() | {"images": digest},
            **call.threat.settings(),
            "attacks": [setting._asdict() for setting in full],
            "seed": call.seed,
            "search": search,
            "image": list(images.shape[1:]),
        }
        | ({"verdict": call.rule._asdict()} if call.rule else {})
    )
    replays.check_images(call.sources, HashedImages(call.ids, hashes), images.shape[1:])
    sources = replays.ordered(call.sources, identity)
    if call.stop is not None:
        call.stop.check(call.ids, labels, hashes)
        hosts.agree({"stop": call.stop.settings()})
    return call._replace(
        runner=runner,
        images=images,
        labels=labels,
        settings=settings,
        full=full,
        sources=sources,
        identity=identity,
        hashes=hashes,
    )


def _run(
    call: _Evaluation, book: Ledger, *, fast: bool
) -> tuple[AttackContext, turns.AttackedImages, tuple[np.ndarray, np.ndarray]]:
    """Run replays, attacks and the user's attacks, each on the images that survive so far."""
    # Also return the predicted classes of the clean images, and whether their logits are finite.
    runner, images, labels, ids = call.runner, call.images, call.labels, call.ids
    count = max([1, *(setting.targets for setting in call.full)])
    with call.waiting(f"classifying {len(images)} images"):
        clean, once, finite, sure, likely = classified(
            runner, images, labels, ids, seed=call.seed, count=count, rule=call.rule
        )
    reliability.check_answers(finite, of=call.answers)  # raises if none is finite
    answers = np.where(clean, labels, likely[:, 0].astype(int))  # the likeliest class
    answers = np.where(finite, answers, -1)
    hosts.together(lambda: book.confirm(answers, clean, sure, call.hashes))
    classes = runner.traces[0].classes
    sample = Sample(images, labels, ids, clean, likely, classes, call.threat, call.seed)
    flags: dict[str, str] = {}
    with call.waiting("checking that the network can be attacked"):
        if call.of_task is not None and len(images):
            flags |= call.of_task.flags(images, runner.slots // runner.mesh.size)
        elif not runner.keyed and len(images):
            forward, per_device = partial(engine.forward, runner), runner.slots // runner.mesh.size
            seen_here = reliability.check_network(
                forward, runner.logits_fn, images, labels, batch_size=per_device
            )
            for others in hosts.everyone(seen_here):  # raised in any process, of the same images
                flags |= others
    outcome = Outcome.of(clean, call.settings, flags, once if call.rule else None)
    evaluation = AttackContext(runner, sample, outcome, book, call.rule)
    interval: Any = partial(call.stop.bounds, of=len(images)) if call.stop else None
    planned = [setting.name for setting in call.settings]
    with Decisions(
        len(images),
        interval=interval or checks.binomial_interval,
        enabled=call.verbose,
        attacks=planned,
    ) as meter:
        attacked = _attacked(call, evaluation, meter, fast)
    if call.rule is not None and outcome.once is not None:
        one = records.one_draw(turns.mean(once), outcome.once)
        attacked.about["draws"] = {
            "rule": call.rule.rule,
            "draws": call.rule.draws,
            "one_draw": one,
        }
    return evaluation, attacked, (answers, finite)


def _attacked(
    call: _Evaluation, evaluation: AttackContext, meter: Decisions, fast: bool
) -> turns.AttackedImages:
    outcome, costs, after, about = evaluation.outcome, [], {}, ResultFacts()
    if call.sources:
        network = replays.network_of(call.identity)
        cost, about["replayed"] = replays.run(evaluation, call.sources, network)
        costs, after = [cost], {cost.attack: turns.mean(outcome.standing)}
    if fast:
        policy: Any = partial(turns.fast, full=call.full, verbose=call.verbose)
    elif call.stop is not None:
        policy = partial(turns.lot_by_lot, rule=call.stop, verbose=call.verbose)
    else:
        policy = partial(turns.all_images, robust_beyond=call.robust_beyond)
    attacked = policy(evaluation, call.settings, meter)
    costs, after, about = (
        costs + attacked.costs,
        after | attacked.accuracy_after,
        about | attacked.about,
    )
    for user in call.users:
        costs.append(replays.try_user(evaluation, user))
        after[user.name] = turns.mean(outcome.standing)
    clean = turns.mean(evaluation.sample.clean[attacked.met])
    outcome.flags.update(reliability.check_cascade({"clean": clean, **after}))
    if evaluation.runner.search_fn is not None:
        cost, about["search_sample"] = turns.search_again(evaluation, call.settings)
        costs.append(cost)
        after[cost.attack] = turns.mean(outcome.standing)
    return turns.AttackedImages(attacked.met, costs, after, about)


def _described(
    call: _Evaluation,
    evaluation: AttackContext,
    attacked: turns.AttackedImages,
    answers: tuple[np.ndarray, np.ndarray],
    complete: bool,
) -> AutoAttackResult:
    """Gather verdicts, flags and facts of the attacked images."""
    _, sample, outcome, book, _ = evaluation
    met, n = attacked.met, len(sample.ids)
    fooled_by = np.array(outcome.names)[outcome.fooled_by]
    norms, reached = np.zeros(n), np.full(n, -1, np.int32)
    for name in set(fooled_by.tolist()) - {"", "clean"}:
        places = fooled_by == name
        norms[places] = book.rows(name)["norm"][places]
        reached[places] = book.rows(name)["reached"][places]
    adversarial: Any = Adversarial(sample.images, book, fooled_by)
    if "stopped" in attacked.about:
        adversarial = Subset(adversarial, met)
    columns = (sample.ids, sample.labels, sample.clean, fooled_by, norms, reached, call.hashes)
    verdicts = Verdicts(*(column[met] for column in columns))
    classes, finite = (column[met] for column in answers)
    network, flags = fingerprint.resolved(call.identity["fingerprint"]), outcome.flags
    flags |= reliability.check_answers(finite, verdicts.fooled_by, verdicts.reached, call.answers)
    if call.of_task is None:
        labels = verdicts.labels
        flags |= label_checks.check_answers(classes, labels, sample.classes, complete=complete)
        flags |= collapse.flags(classes, labels)
    flags |= reliability.check_slopes(network["probe"])
    about: ResultFacts = {
        **attacked.about,
        "norm": call.threat.norm,
        "epsilon": call.identity["epsilon"],
        "seed": call.seed,
        "image_ids": records.ranges(verdicts.image_ids.tolist()),
        "images_sha256": network["images"],
        "classes": sample.classes,
        "image": sample.images.shape[1:],
        "arrays_sha256": network["arrays"],
        "fingerprint": network | ({"begun_by": book.begun_by} if book.begun_by else {}),
    }
    if call.of_task is not None:
        about["task"] = call.of_task.task.name
    if call.robust_beyond.any():
        about["robust_beyond"] = int(call.robust_beyond.sum())
    return AutoAttackResult(
        clean=verdicts.clean,
        robust=outcome.standing[met],
        fooled_by=verdicts.fooled_by,
        images_adv=adversarial[:] if isinstance(sample.images, np.ndarray) else adversarial,
        flags=flags,
        accuracy_after=attacked.accuracy_after,
        attacks=[*(s._asdict() for s in call.settings), *(u.settings() for u in call.users)],
        costs=attacked.costs,
        about=about,
        verdicts=verdicts,
        answers=classes,
    )
