"""AutoAttack: an ensemble of parameter-free attacks, one after the other on what still stands.

Source: Croce & Hein 2020 (arXiv 2003.01690), Croce & Hein 2021 (arXiv 2103.01208) for L1. The
verdicts are those of auto-attack a392200 (parity: tests/evaluation/engine/test_autoattack.py),
with three differences: an image stops as soon as it is fooled, so its adversarial image is the
first that an attack finds, not the latest (version "rand" runs to its end); draws belong to the
image, not to its place in a batch; an image is fooled only if a last forward pass and its norm in
float64 confirm it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.attacks import Setting, ensembles
from jaxrobust.attacks.inputs import check_array
from jaxrobust.evaluation.engine import engine, ensemble, lots
from jaxrobust.evaluation.engine import replay as replays
from jaxrobust.evaluation.engine.evaluation_progress import Decisions
from jaxrobust.evaluation.engine.fast import fast_version
from jaxrobust.evaluation.engine.ledger import open_ledger
from jaxrobust.evaluation.engine.outcome import (
    AttackContext,
    Outcome,
    Sample,
    answers_of,
    logits_of,
)
from jaxrobust.evaluation.engine.result import AutoAttackResult, ResultFacts
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
from jaxrobust.evaluation.network.images import ImageSet, InRange, clipped
from jaxrobust.evaluation.network.user_attacks import UserAttack
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.stopping import StopRule
from jaxrobust.evaluation.records.verdicts import HashedImages
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text import patience, spelling
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Array, Threat, check_number, unmasked


def autoattack(
    logits_fn: Callable[..., Array],
    images: np.ndarray | Array | ImageSet,
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
    identity: str | fingerprint.Fingerprint | None = None,
    search_fn: Callable[..., Array] | None = None,
    replay: Sequence[str | Path] = (),
    robust_beyond: np.ndarray | None = None,
    rule: str | None = None,
    draws: int | None = None,
    stop: StopRule | None = None,
    users: Sequence[UserAttack] = (),
    verbose: bool = True,
) -> AutoAttackResult:
    """Return the robust accuracy of a network under AutoAttack.

    In a program of several processes each of them calls this, with the same arguments: they divide
    the images that stand before each attack, and all return the same verdicts.

    Args:
      logits_fn: f32[B,H,W,C] in [0, 1] -> f[B,K], not softmax; normalises inside. Best a
        `jax.tree_util.Partial(apply, params, stats)`: its arrays are arguments of the compiled
        programs, so another checkpoint compiles nothing; all else is part of the programs, which
        live as long as the function. With version "rand" it takes one key per image, [B], as a
        second argument.
      images: f32[N,H,W,C] in [0, 1], or an `evaluation.ImageSet`, of which few are in memory at a
        time; `images_adv` is one then too, and with a `ledger` stays on disk. Pixels up to 1e-6
        outside are clipped, and the record says so.
      labels: i[N].
      norm: "linf", "l2" or "l1".
      epsilon: radius, in units of pixels in [0, 1] (8/255).
      version: "standard"; "plus" (more restarts, untargeted FAB); "rand" (randomised defences,
        averaged gradients); "custom" (`attacks`, 5 restarts); "fast" (a part of the jobs of
        "standard" on all images, the others on a sample of what stands; `about["fast"]` bounds what
        they would still fool, and the same call with "standard" continues its ledger).
      attacks: names to run, those of the version by default.
      overrides: changes of an attack's `steps`, `restarts`, `targets` or `eot`, by name.
      seed: of all random draws.
      batch_size: slots on all devices of a process together; see `engine.make`.
      image_ids: N different ints below 2^32; an image's draws derive from its id, so a part of a
        dataset gets the verdicts it has in the whole. Default 0..N-1.
      ledger: a file (.jsonl) of verdicts; the same call continues with it, on any number of
        processes. Each writes a file beside it, in a folder that all of them see.
      identity: a name of the network, for whoever reads the ledger. What tells it from others is
        its fingerprint: the traced programs of its logits and input gradient and all its arrays. A
        caller who has that fingerprint already passes it here.
      search_fn: the same network in lower precision, to search with; `logits_fn` decides.
      replay: ledgers of other evaluations of these images (radius, norm, seed, epoch, network),
        whose adversarial images are tried before any attack, one forward pass each.
      robust_beyond: bool[N], images that such an evaluation has found robust at a larger radius of
        the same norm: of these, only the first attack is run. None: no image.
      rule: of the verdicts of version "rand": "majority" (an image is right if more than half of
        its draws are; the default), "mean" (if the label has the largest mean of their softmax
        probabilities) or "one-draw" (if the only draw is, as auto-attack judges). The number of
        "one-draw" stands beside that of the others.
      draws: answers to an image that a rule judges by, 20 by default.
      stop: a rule that ends the evaluation once it is decided (`records.stopping.StopRule`): the
        images go through all attacks lot by lot, in an order fixed by the seed and their ids, and
        the result is of those that were met; `about["stopped"]` says what it knows of all. The same
        call without it continues the ledger to the standard result. Not with `replay`,
        `robust_beyond`, `search_fn` or version "rand", whose verdicts may still change at the end.
      users: points or functions of yours (`network.user_attacks`), tried last on what stands; with
        `attacks=()` alone. Not with `stop` or versions "rand" and "fast".
      verbose: progress and a table on stderr.
    Returns:
      `AutoAttackResult`.
    Raises:
      ValueError: settings or inputs that cannot be meant, a network whose logits are finite for
        no image, a ledger of another evaluation, or one that another process has open.

    >>> weights = np.eye(4, dtype=np.float32)
    >>> logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
    >>> images = np.float32([[0.9, 0, 0, 0], [0, 0.2, 0, 0.1]]).reshape(2, 2, 2, 1)
    >>> result = autoattack(
    ...     logits_fn, images, [0, 1], norm="linf", epsilon=0.1, attacks=("apgd-ce",), verbose=False
    ... )
    >>> result.robust.tolist(), result.accuracy_after
    ([True, False], {'apgd-ce': 0.5})
    """
    check_array("labels", labels)
    labels = np.asarray(labels)
    held: Any = _held(images)
    norm = spelling.norm(norm)
    fast = version == ensembles.FAST
    kept = "standard" if fast else version  # whose ledger it is
    settings, whole = (
        _plan(norm, own, attacks, overrides, users=users, stop=stop) for own in (version, kept)
    )
    how = _verdict(version, rule, draws)
    within = Threat(norm, check_number("epsilon", epsilon))
    if not (isinstance(seed, int | np.integer) and 0 <= seed < 2**32):
        raise ValueError(f"seed={seed!r}: pass an int from 0 to 2^32 - 1")
    seed = int(seed)
    checks.check_images(held, labels)
    held, overshot = clipped(held) if isinstance(held, np.ndarray) else (InRange(held), None)
    ids = _ids(image_ids, len(held))
    beyond = np.zeros(len(held), bool) if robust_beyond is None else np.asarray(robust_beyond)
    if beyond.shape != (len(held),) or beyond.dtype != bool:
        raise ValueError(f"robust_beyond: pass {len(held)} booleans, one per image")
    runner = engine.make(
        logits_fn,
        search_fn=search_fn,
        slots=batch_size,
        image_size=max(held.shape[1:3]),
        keyed=how is not None,
        tally=how.tally if how else "",
    )
    tell = say if verbose else lambda message: None
    first = partial(patience.of, here=verbose and jax.process_index() == 0)
    if runner.keyed and (len(replay) or search_fn is not None):
        what = (
            "draws anew what fools; leave replay" if len(replay) else "has no search_fn; leave it"
        )
        raise ValueError(f"version='rand' {what} out")
    if fast and (given := _unfit(runner, (), beyond) or "stop" * (stop is not None)):
        raise ValueError(f"version='fast' does not go with {given}; leave one of them out")
    if stop is not None and (given := _unfit(runner, replay, beyond)):
        raise ValueError(
            f"{given} may change verdicts after a look at them; leave it out, or leave stop out"
        )
    user_attacks.check(users, held, ids, within)
    known = replays.KnownVerdicts([replays.source(Path(path)) for path in replay], beyond)
    with jax.set_mesh(runner.mesh):  # also where the caller has set another one
        with first("tracing the network"):
            runner = engine.trace(runner, held.shape[1:])
        classes = runner.traces[0].classes
        checks.check_images(held, labels, classes=classes)
        whole = [ensembles.fit(setting, classes, tell) for setting in whole]
        settings = [ensembles.fit(setting, classes, lambda text: None) for setting in settings]
        labels = labels.astype(np.int32)
        if isinstance(held, np.ndarray):
            held = np.ascontiguousarray(held, np.float32)
        known_as = identity if isinstance(identity, str) else None
        with first("looking at what tells this network and these images from others"):
            own, search = _computed(runner, held, labels, None if known_as else identity)
            own["images"], hashes = image_sets.hashes(held, labels, ids)
        evaluation: dict[str, Any] = {
            "network": known_as,
            "fingerprint": own,
            **within.settings(),
            "attacks": [setting._asdict() for setting in whole],
            "seed": seed,
            "version": kept,
            "search": search,
            "image": list(held.shape[1:]),
        } | ({"verdict": how._asdict()} if how else {})
        replays.check_images(known.sources, HashedImages(ids, hashes), held.shape[1:])
        known = replays.ordered(known, evaluation)
        if stop is not None:
            stop.check(ids, labels, hashes)
            hosts.agree({"stop": stop.settings()})
        with open_ledger(ledger, evaluation, ids) as book:
            most = max([1, *(setting.targets for setting in whole)])
            with first(f"classifying {len(held)} images"):
                classified = _classified(runner, held, labels, ids, seed, most, how)
            clean, once, finite, sure, likely = classified
            reliability.check_answers(finite)  # refuses what answers nothing
            answers = np.where(clean, labels, likely[:, 0].astype(int))  # the likeliest class
            answers = np.where(finite, answers, -1)
            hosts.together(lambda: book.confirm(answers, clean, sure, hashes))
            seen = Sample(held, labels, ids, clean, likely, classes, within, seed)
            plain = not runner.keyed and len(held) > 0
            with first("checking whether the attacks can take this network"):
                flags = _check_network(runner, held, labels) if plain else {}
            interval: Any = checks.binomial_interval
            if stop is not None:
                interval = partial(stop.bounds, of=len(held))
            planned = [setting.name for setting in settings]
            meter = Decisions(len(held), interval=interval, enabled=verbose, attacks=planned)
            outcome = Outcome.of(clean, settings, flags, once if how else None)
            with meter:
                under_way = AttackContext(runner, seen, outcome, book, how)
                otherwise: Any = stop and partial(lots.run, rule=stop, verbose=verbose)
                if fast:
                    otherwise = partial(fast_version.run, whole=whole, verbose=verbose)
                result, met = ensemble.run(under_way, settings, meter, known, otherwise, users)
    ids, labels, answers = ids[met], labels[met], answers[met]
    flags |= reliability.check_answers(finite[met], result.fooled_by, result.verdicts.reached)
    result = result._replace(answers=answers, verdicts=result.verdicts._replace(hashes=hashes[met]))
    alone = not isinstance(identity, Fingerprint)  # else these may be a part of its caller's images
    flags |= label_checks.check_answers(result.answers, labels, classes, whole=alone)
    flags |= collapse.flags(result.answers, labels)
    own = fingerprint.resolved(evaluation["fingerprint"])
    flags |= reliability.check_slopes(own["probe"])
    about: ResultFacts = {
        "norm": norm,
        "epsilon": evaluation["epsilon"],
        "version": version,
        "seed": evaluation["seed"],
        "image_ids": records.ranges(ids.tolist()),
        "images_sha256": own["images"],
        "classes": classes,
        "image": held.shape[1:],
        "chosen": bool(attacks is not None or overrides),
        "arrays_sha256": own["arrays"],
    }
    if known.robust_beyond.any():
        about["robust_beyond"] = int(known.robust_beyond.sum())
    if overshot := held.overshot() if isinstance(held, InRange) else overshot:
        about["clipped"] = overshot
    about["fingerprint"] = own | ({"begun_by": book.begun_by} if book.begun_by else {})
    result = result._replace(about={**result.about, **about})
    tell(result.table())
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
    """List the attacks to run; there may be none beside those of the user."""
    if not users:
        return ensembles.plan(norm, version, attacks, overrides)
    if stop is not None or version in ("rand", ensembles.FAST):
        raise ValueError("users go with neither stop nor version 'rand' or 'fast'; leave them out")
    alone = attacks is not None and not len(attacks)
    return [] if alone else ensembles.plan(norm, version, attacks, overrides)


def _unfit(runner: engine.Engine, replay: Sequence[Any], beyond: np.ndarray) -> str:
    """Name what a stop does not go with; "" if there is none of it."""
    given = {"version='rand'": runner.keyed, "search_fn": runner.search_fn is not None}
    given |= {"replay": len(replay) > 0, "robust_beyond": bool(beyond.any())}
    return next((name for name, there in given.items() if there), "")


def _check_network(runner: engine.Engine, images: ImageSet, labels: np.ndarray) -> dict[str, str]:
    """Gather what any process saw; all look at the same images."""
    forward, each = partial(engine.forward, runner), runner.slots // runner.mesh.size
    looked_at = (forward, runner.logits_fn, images, labels)
    flags = reliability.check_network(*looked_at, batch_size=each)
    return {name: text for seen in hosts.everyone(flags) for name, text in seen.items()}


def _verdict(version: str, rule: str | None, draws: int | None) -> randomised.VerdictRule | None:
    if version == "rand":
        return randomised.verdict(rule, draws)
    if rule is not None or draws is not None:
        given = f"rule={rule!r}" if rule is not None else f"draws={draws!r}"
        raise ValueError(f"{given} judges a randomised network: pass version='rand', or leave it")
    return None


def _classified(
    runner: engine.Engine,
    images: ImageSet,
    labels: np.ndarray,
    ids: np.ndarray,
    seed: int,
    most: int,
    how: randomised.VerdictRule | None,
) -> tuple[np.ndarray, ...]:
    """Compute which images are right, by one draw too, finite, and sure, bool[N]; likely others.

    An answer is sure where rounding cannot change it, which is unknown of a randomised network's.
    The last are u[N, most], the likeliest wrong classes. All processes get the same, each computes
    its share.
    """
    mine = hosts.share(np.arange(len(images)))
    classes = runner.traces[0].classes
    clean, once, finite, sure = np.zeros((4, len(images)), bool)
    likely = np.zeros((len(images), most), np.min_scalar_type(classes))
    for start in range(0, len(mine), runner.slots):
        part = mine[start : start + runner.slots]
        rows = (images[part], labels[part], ids[part])
        if how is None:
            logits = logits_of(runner, rows[0], rows[2], seed, draw=0)
            clean[part] = once[part] = checks.is_right(logits, rows[1])
            finite[part] = checks.answered(logits)
            sure[part] = finite[part] & _sure(logits)
        else:
            clean[part], once[part], finite[part], _, logits = answers_of(
                runner, how, *rows, seed=seed, draw=0
            )
        likely[part] = ensembles.ranks(logits, rows[1], most)
    answers = (clean, once, finite, sure, likely)
    for process, shares in enumerate(hosts.everyone([array[mine] for array in answers])):
        theirs = np.arange(len(images))[process :: jax.process_count()]
        for array, share in zip(answers, shares, strict=True):
            array[theirs] = share
    return answers


def _sure(logits: np.ndarray) -> np.ndarray:
    """Mark the images whose largest logit of f[n,K] leads by more than rounding, bool[n]."""
    with np.errstate(invalid="ignore"):  # infinite ones
        second, first = np.partition(logits, (-2, -1), axis=1)[:, -2:].T
        spread = np.ptp(logits[:, unmasked(logits)], axis=1)
        return first - second > 2 * hosts.ROUNDING * spread


def _computed(
    runner: engine.Engine, images: Any, labels: np.ndarray, known: Any
) -> tuple[dict[str, Any], Any]:
    """Take the fingerprint of the network that decides, and the hashes of the one that searches."""
    how: Any = {"each": runner.slots // runner.mesh.size, "keyed": runner.keyed}
    own = known or fingerprint.of_network(runner.logits_fn, images, labels=labels, **how)
    guide = runner.search_fn
    return own._asdict(), guide and fingerprint.exact(guide, images.shape[1:], **how)


def _ids(ids: Sequence[int] | None, n: int) -> np.ndarray:
    numbers = np.arange(n) if ids is None else np.asarray(ids)
    if not n:
        return np.zeros(0, np.uint32)
    whole = numbers.shape == (n,) and np.issubdtype(numbers.dtype, np.integer)
    if not whole or len(np.unique(numbers)) < n or numbers.min() < 0 or numbers.max() >= 2**32:
        raise ValueError(f"image_ids: pass {n} different ints from 0 to 2^32 - 1, one per image")
    return numbers.astype(np.uint32)


def _held(images: Any) -> Any:
    if isinstance(images, ImageSet) and not hasattr(images, "dtype"):
        return images
    check_array("images", images)
    return np.asarray(images)
