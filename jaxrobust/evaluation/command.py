"""The accuracy of a network as the command line asks for it: checked, computed, recorded, told."""

import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import attacks
from jaxrobust.data import Prepared, evaluation_transform, pipeline, sources
from jaxrobust.evaluation import accuracy, autoattack, flags, records, verdicts
from jaxrobust.evaluation import subject as subjects
from jaxrobust.evaluation.cascade import Cost
from jaxrobust.evaluation.flags import Given
from jaxrobust.evaluation.subject import Subject
from jaxrobust.evaluation.verdicts import Verdicts
from jaxrobust.models.inputs import cast
from jaxrobust.runtime import compilation, hardware, hosts, sharding
from jaxrobust.runtime.progress import say
from jaxrobust.types import Attack, Weights
from jaxrobust.weights import hashes
from jaxrobust.weights.checkpoint import disk_full


class Question(NamedTuple):
    """How to evaluate; norm and radius stand in the subject."""

    attack: str = "autoattack"  # or clean, pgd-K, apgd-ce
    version: str = "standard"  # of AutoAttack; or plus
    images: int = 0  # the first ones of the split; 0: all
    batch: int | None = None  # images at a time, rounded up to the devices; AutoAttack: per process
    seed: int = 0  # of the attacks' draws
    preprocessing: str | None = None  # None: `pipeline.preprocessing_id`
    search_dtype: str = "float32"  # what AutoAttack searches in; verdicts fall in float32


_PGD = re.compile(r"pgd-([1-9]\d{0,6})")
_AUTOATTACK = {"apgd-ce": ("apgd-ce",), "autoattack": None}  # None: those of the version


def answer(given: Given) -> tuple[str, bool]:
    """Return the answer for people, and whether this process is the one that prints it.

    Raises:
      ValueError: flags that contradict each other or the weights, before anything compiles.
    """
    given = flags.placed(given)
    flags.check(given)
    run, out = (Path(place) if place else None for place in (given.workdir, given.out))
    compilation.use_persistent_cache((run or out or Path("runs/evaluation")).parent)
    origin = flags.origin(given)
    asked, source = subjects.settled(
        origin,
        network={"num_classes": given.num_classes, "image_size": given.image_size},
        dataset=given.dataset,
        split=given.split,
        classes=given.classes,
        data_dir=given.data_dir,
        norm=given.norm,
        epsilon=given.epsilon,
    )
    size = _known(asked.network.image_size)
    which, asked, weights = flags.weights(given, asked, source)
    question = Question(
        attack=given.attack,
        version=given.version,
        images=given.n,
        batch=given.batch,
        seed=given.seed,
        preprocessing=subjects.preprocessing(origin, size, source, given.preprocessing),
        search_dtype=given.search_dtype,
    )
    name = re.sub(r"[^\w.-]+", "-", asked.network.name)
    default = run / "evaluation" if run else Path("runs") / f"evaluation-{name}"
    said = evaluate(asked, source, which, weights, question, out=out or default)
    return said, jax.process_index() == 0


def evaluate(
    subject: Subject,
    source: sources.Source,
    which: str | None,
    weights: Weights,
    asked: Question,
    *,
    out: Path,
) -> str:
    """Return the answer for people, from its record in `out`, which is computed unless it is there.

    The processes of a pod share the images; all get the answer, the first one writes the record.

    Args:
      subject, source: settled.
      which: the weights in words; None: they have no name.
      weights: f32, on all devices.
      asked: how to evaluate.
      out: holds the records, and the ledgers that interrupted evaluations continue from; of a pod,
        a folder that all hosts see.
    Raises:
      ValueError: values that cannot work, before anything compiles.
    """
    _check(asked, subject, source)
    if asked.images > len(source):
        say(f"{source.where()} has {len(source)} images, not {asked.images}: taking all")
    network, ball = subject.network, [subject.norm, subject.epsilon]
    size = _known(network.image_size)
    asked = asked._replace(
        images=min(len(source), asked.images or len(source)),
        preprocessing=pipeline.preprocessing_id(source, size, asked.preprocessing),
    )
    _claim(out)
    method = f"autoattack {asked.version}" if asked.attack == "autoattack" else asked.attack
    function = subject.origin()
    sha256 = subject.arrays_sha256 or hashes.weights_sha256(*weights)
    made = [function["sha256"]] if function else []
    own = subject.classes or source.name.startswith("folder:")
    replaced = source.name.startswith(("npz:", "hf:"))  # by other data under the same name
    chosen = [source.ids_sha256, hashes.classes_sha256(source.classes) if own else None]
    chosen += [source.files_sha256] if replaced else []
    chosen = [value for value in chosen if value]
    identity = {
        "network": [network.name, size, dict(network.options), sha256, *made],
        "data": [source.name, source.split, asked.images, asked.preprocessing, *chosen],
        "attack": [method, *([] if method == "clean" else [*ball, asked.seed, asked.search_dtype])],
    }
    hosts.agree(identity)
    number = records.number_of(identity)
    known = [r for r in records.read(out) if r.get("evaluation") == number]
    if hosts.first(bool(known)):
        if not known:  # a host that does not see the first one's records
            return ""
        say(f"done before, {known[-1]['time']}; nothing is computed (to do it again: --out DIR)")
        return records.answer(known[-1], out)
    said = f" ({which})" if which else ""
    say(
        f"{network.name}{said} on {source.where()}: {method} on {asked.images} images, "
        f"{hardware.devices()}"
    )
    if idle := hardware.left_idle():
        say(f"WARNING: {idle}")
    if asked.attack in _AUTOATTACK:
        name = " ".join([network.name, sha256, *map(str, made), "float32"])
        ledger = out / f"ledger-{number}.jsonl"
        found = _searched(subject, source, weights, asked, name, ledger)
    else:
        found = _counted(subject, source, weights, asked)
    after, each, costs = (found.pop(key) for key in ("accuracy_after", "verdicts", "costs"))
    file = verdicts.file_of(number)
    if jax.process_index() == 0:
        verdicts.write(out / file, number, each)
    top5 = {key: found.pop(key) for key in ("clean_top5",) if key in found}
    record = records.accuracy_record(
        config=subject.config,
        weights=which,
        params=None if subject.net else weights.params,
        stats=None if subject.net else weights.stats,
        dataset=source.name,
        split=source.split,
        image_ids=records.ids_of(asked.images),
        preprocessing=asked.preprocessing or "",
        dtype=None if subject.net else "float32",
        seed=asked.seed,
        ids_sha256=source.ids_sha256,
        classes=source.classes,
        n=asked.images,
        known={
            "verdicts": file,
            "costs": costs,
            "size": records.size(
                subject.create("float32"), weights, size, _known(network.in_channels)
            ),
            "training": _training(subject, which),
        },
        **found,
        more={
            "evaluation": number,
            "model": asdict(network),
            "method": method,
            "search_dtype": asked.search_dtype,
            "accuracy_after": after,
        }
        | top5
        | ({"function": function} if function else {}),
    )
    if jax.process_index() == 0:
        records.append(out / "results.jsonl", record)
    return records.answer(record, out)


def _training(subject: Subject, which: str | None) -> dict[str, Any] | None:
    """Return what is known of how the weights were trained, if they are a run's."""
    if not (which and isinstance(subject.config, dict) and "phases" in subject.config):
        return None
    return records.training(subject.config, which.partition(",")[0])


def _check(asked: Question, subject: Subject, source: sources.Source) -> None:
    """Refuse what cannot work, in the words of the command line."""
    attack, searches = asked.attack, asked.attack in _AUTOATTACK
    norm, epsilon = subject.norm, subject.epsilon
    if not (searches or attack == "clean" or _PGD.fullmatch(attack)):
        raise ValueError(
            f"--attack={attack} is unknown; one of clean, pgd-K (K steps), apgd-ce, autoattack"
        )
    if attack != "clean":
        radius = 0.0 if epsilon is None else epsilon
        attacks.pgd(norm=norm, epsilon=radius, steps=1)  # refuses what is no norm or radius
        if epsilon is None:
            raise ValueError("give --epsilon, in units of the [0, 1] pixel range, such as 4/255")
    for flag, value, known, searching in (
        ("version", asked.version, ("standard", "plus"), attack == "autoattack"),
        ("search_dtype", asked.search_dtype, ("float32", "bfloat16"), searches),
    ):
        if value not in known:
            raise ValueError(f"--{flag}={value} is unknown; one of {', '.join(known)}")
        if value != known[0] and not searching:
            raise ValueError(f"--{flag}={value} has no effect on --attack={attack}; leave it out")
    for flag, number, low in (
        ("n", asked.images, 0),
        ("batch", asked.batch, 1),
        ("seed", asked.seed, 0),
    ):
        if number is not None and number < low:
            raise ValueError(f"--{flag}={number} must be at least {low}")
    if asked.seed >= 2**32:  # of which JAX makes keys; the rest would be cut off
        raise ValueError(f"--seed={asked.seed} must be below 2^32")
    channels, size = subject.network.in_channels, _known(subject.network.image_size)
    if source.channels != channels:
        raise ValueError(
            f"the network takes {channels} channels, but {source.where()} has {source.channels}; "
            "give the --dataset that it was trained for"
        )
    evaluation_transform(pipeline.preprocessing_id(source, size, asked.preprocessing))  # refuses


def _claim(out: Path) -> None:
    """Make the folder; refuse one that cannot be written, before hours go into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(None, "Permission denied")
    except OSError as error:
        if disk_full(error):
            raise
        raise ValueError(
            f"cannot write to --out {out} ({error.strerror}); name a folder that can be written"
        ) from error


def _counted(
    subject: Subject, source: sources.Source, weights: Weights, asked: Question
) -> dict[str, Any]:
    """Measure accuracy on clean images and, with "pgd-K", on its last iterates."""
    settings: list[dict[str, Any]] = []
    attack: Attack = lambda logits_fn, key, images, labels: images  # noqa: E731
    if match := _PGD.fullmatch(asked.attack):
        ball: dict[str, Any] = {"norm": subject.norm, "epsilon": subject.epsilon}
        steps = int(match[1])
        settings = [{"name": "pgd", **ball, "steps": steps, "start": "random"}]
        settings[0]["step_size"] = 2.5 * ball["epsilon"] / steps
        attack = attacks.pgd(**ball, steps=steps, random_start=True)
    mesh = sharding.make_mesh()
    net = subject.create("float32")
    batch = min(asked.batch or subject.batch_size, asked.images)
    images = accuracy.Images(
        source,
        image_size=_known(subject.network.image_size),
        batch_size=-(-batch // mesh.size) * mesh.size,
        limit=asked.images,
        seed=asked.seed,
        preprocessing=asked.preprocessing,
        workers=subject.workers,
    )
    start = time.perf_counter()
    counter = accuracy.counter(
        net, attack, mesh=mesh, dtype="float32", top5=True, each=subject.norm
    )
    reached = accuracy.each(counter, weights, images, mesh, bar=asked.attack)
    steps = settings[0]["steps"] if settings else 0
    found = _told(reached, asked.attack)
    n = len(found.clean)
    cost = Cost(
        attack=asked.attack,
        fooled=int((found.clean & ~found.robust).sum()),
        forward=n * (steps + 2 if steps else 1),
        backward=n * steps,
        idle=0,
        seconds=time.perf_counter() - start,  # with what compiles
        compile_seconds=0.0,
    )
    robust = float(found.robust.mean())
    return {
        "attacks": settings,
        "clean": float(found.clean.mean()),
        "robust": robust if settings else None,
        "accuracy_after": {asked.attack: robust} if settings else {},
        "verdicts": found,
        "costs": [cost._asdict()],
    } | {key: float(reached[key].mean()) for key in ("clean_top5",) if key in reached}


def _told(reached: dict[str, np.ndarray], attack: str) -> Verdicts:
    """Return the verdicts of an attack on all images of a split's beginning."""
    clean, robust = reached["clean"], reached["robust"]
    return Verdicts(
        image_ids=np.arange(len(clean), dtype=np.uint32),
        labels=reached["labels"],
        clean=clean,
        fooled_by=np.where(clean, np.where(robust, "", attack), "clean"),
        norms=np.where(clean & ~robust, reached["norms"].astype(np.float64), 0.0),
    )


def _known(size: int | None) -> int:
    assert size is not None, "settled"
    return size


def _searched(
    subject: Subject,
    source: sources.Source,
    weights: Weights,
    asked: Question,
    name: str,
    ledger: Path,
) -> dict[str, Any]:
    """Measure accuracy before and after AutoAttack, or one attack of it; print how it goes."""

    def logits_fn(dtype: str):
        net = subject.create(dtype)
        params = cast(weights.params, jnp.dtype(dtype))
        return jax.tree_util.Partial(lambda *p: net.apply(*p)[0], params, weights.stats)

    images = Prepared(
        source,
        image_size=_known(subject.network.image_size),
        preprocessing=str(asked.preprocessing),
        images=asked.images,
    )
    ball: dict[str, Any] = {"norm": subject.norm, "epsilon": subject.epsilon}
    result = autoattack(
        logits_fn("float32"),
        images,
        images.labels(),
        **ball,
        version=asked.version,
        attacks=_AUTOATTACK[asked.attack],
        seed=asked.seed,
        batch_size=asked.batch,
        ledger=ledger,
        identity=name,
        search_fn=None if asked.search_dtype == "float32" else logits_fn(asked.search_dtype),
    )
    return {
        "attacks": [ball | settings for settings in result.attacks],
        "clean": float(result.clean.mean()),
        "robust": float(result.robust.mean()),
        "accuracy_after": dict(result.accuracy_after),
        "flags": dict(result.flags),
        "verdicts": result.verdicts,
        "costs": [cost._asdict() for cost in result.costs],
    }
