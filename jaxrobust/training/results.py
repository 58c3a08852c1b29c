"""What a network reaches: accuracies on a split, their records, and the table of a run."""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxrobust.data import Damage, evaluation_transform, pipeline, sources
from jaxrobust.evaluation import records
from jaxrobust.runtime import sharding
from jaxrobust.runtime.progress import say
from jaxrobust.training import build, metrics
from jaxrobust.types import Params

CLASSES = "classes.txt"  # of a run: the classes' names, one a line in the order of labels


class Weights(NamedTuple):
    """What a network is evaluated with."""

    params: Params
    stats: Params


def open_split(config, key: str) -> sources.Source:
    """A split of the config's data set, checked against its model."""
    data, model = config.data, config.model
    source = sources.open_source(
        data.name,
        data[key],
        data_dir=data.dir,
        classes=data.classes,
        num_classes=model.num_classes,
    )
    if source.channels != model.in_channels:
        raise ValueError(
            f"{data.name} has {source.channels} channels; set model.in_channels={source.channels}"
        )
    return source


def check_preprocessing(config, source: sources.Source) -> None:
    """Refuses a `data.preprocessing` that makes images of another size than the network's."""
    size, wanted = config.model.image_size, config.data.preprocessing
    transform = evaluation_transform(pipeline.preprocessing_id(source, size, wanted))
    try:
        made = transform(source[0].image).shape[:2]
    except ValueError:  # the first image is damaged; others will tell
        return
    if made != (size, size):
        raise ValueError(
            f"data.preprocessing={wanted!r} makes images of {made[0]}x{made[1]} pixels, but "
            f"model.image_size={size}; set one of them to the other"
        )


def check_classes(workdir: Path, source: sources.Source, *, renamed: bool = False) -> None:
    """`ValueError` if a run there has other classes, so that labels would mean something else.

    With `renamed`, lists without a common name tell nothing: another data set may name the same
    classes its way.
    """
    path = workdir / CLASSES
    known = path.read_text().splitlines() if path.exists() else []
    names = list(source.classes)
    if known == names or not (known and names) or (renamed and set(known).isdisjoint(names)):
        return
    missing, new = sorted(set(known) - set(names)), sorted(set(names) - set(known))
    choose = f"choose them with --classes {path}" if renamed else "give a new --workdir"
    raise ValueError(
        f"{source.where()} has other classes than {path}: {len(missing)} of its names are missing "
        f"{missing[:3]}, {len(new)} are new {new[:3]}, and labels would shift. Restore the data "
        f"set, or {choose}"
    )


def damage(config, workdir: Path, source: sources.Source) -> Damage:
    """The damaged images of a split that a run has met, also before it was interrupted.

    Each process adds to a file of its own; all start from what all have met.
    """
    rows = [r for path in sorted(workdir.glob("damaged-*.jsonl")) for r in metrics.read(path)]
    own = workdir / f"damaged-{jax.process_index()}.jsonl"

    def note(record: int) -> None:
        row = {"split": source.split, "record": record, "name": source.describe(record)}
        metrics.append(own, row)

    return Damage(
        source,
        config.data.max_damaged,
        partial(say, every_process=True),
        known=[row["record"] for row in rows if row["split"] == source.split],
        note=note,
    )


def count(
    evaluate,
    weights: Weights,
    source,
    settings,
    config,
    mesh,
    *,
    preprocessing=None,
    bar="",
    meets: Damage | None = None,
) -> dict[str, float]:
    """Clean and robust accuracy on the first `settings.images` images of a source (0: all).

    `preprocessing` is an id of `evaluation_transform`, `bar` the name of a progress bar. `meets`
    is told of images that are damaged, which are left out; without it they are errors.
    """
    batches = pipeline.evaluation_batches(
        source,
        batch_size=settings.batch_size,
        image_size=config.model.image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        preprocessing=preprocessing,
        limit=settings.images or None,
        workers=config.data.workers,
        strict=meets is None,
    )
    images = min(len(source), settings.images or len(source))
    steps = -(-images // settings.batch_size)
    key = jax.random.key(config.seed)
    totals: dict[str, int] = {"count": 0, "clean": 0, "robust": 0}
    hidden = None if bar else True  # None: on a terminal only
    shown = tqdm(batches, desc=bar, total=steps, disable=hidden, leave=False, unit="batch")
    with contextlib.closing(batches):
        for b in shown:
            if meets is not None:
                meets.meet(b.damaged)
            arrays = sharding.global_arrays(mesh, (b.images, b.labels, b.mask, b.ids))
            for name, value in jax.device_get(evaluate(*weights, *arrays, key)).items():
                totals[name] += int(value)
    return {k: totals[k] / max(totals["count"], 1) for k in ("clean", "robust")} | {
        "images": totals["count"]
    }


def test(config, workdir, plain, name, phase, step: int, best: Weights) -> None:
    """Appends the record of a phase's best weights on the test split, unless it is there."""
    source = open_split(config, "test_split")
    which = f"{name}, step {step}, {config.evaluation.weights}"
    attack = {
        "name": "apgd-ce",
        "norm": config.attack.norm,
        "epsilon": config.attack.epsilon,
        "steps": config.test.steps,
        "restarts": 1,
        "start": "random",
    }
    started = workdir / "init.json"
    meets = None if config.data.strict else damage(config, workdir, source)
    wanted = config.data.preprocessing
    images = min(len(source), config.test.images or len(source))
    identity = (which, [attack], ids_of(images))
    known = ((r["weights"], r["attacks"], r["image_ids"]) for r in results(workdir))
    if first_host(identity in known):
        return
    say(f"{name}: testing step {step} with APGD-CE, {config.test.steps} steps")
    # In float32, as RobustBench does, whatever the type of training.
    evaluate = build.evaluation(config, phase.mesh, steps=config.test.steps, dtype="float32")
    scores = count(
        evaluate, best, source, config.test, config, phase.mesh, preprocessing=wanted, meets=meets
    )
    more = {"init": json.loads(started.read_text())} if started.exists() else {}
    if meets is not None and meets.met:
        more["damaged"] = [source.describe(index) for index in sorted(meets.met)]
    record = records.accuracy_record(
        config=plain,
        weights=which,
        params=best.params,
        stats=best.stats,
        dataset=config.data.name,
        split=config.data.test_split,
        image_ids=ids_of(images),
        dtype="float32",
        preprocessing=pipeline.preprocessing_id(source, config.model.image_size, wanted),
        attacks=[attack],
        clean=scores["clean"],
        robust=scores["robust"],
        seed=config.seed,
        ids_sha256=source.ids_sha256,
        classes=source.classes,
        more=more,
    )
    if jax.process_index() == 0:
        metrics.append(workdir / "results.jsonl", record)


def first_host(value: int) -> int:
    """What the first host says: another one may have another, or a later, view of the files."""
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.array(value)))


def over_hosts(count: int) -> int:
    """The sum of what each host counted."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.array(count)).sum())


def most_of_hosts(value: int) -> int:
    """The largest that a host has."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.array(value)).max())


def ids_of(images: int) -> str:
    """The first images of a split, as records name them."""
    return f"0..{images - 1}"


def results(workdir: Path) -> list[dict]:
    """The records of a workdir, oldest first."""
    return metrics.read(workdir / "results.jsonl")


def table(workdir: Path) -> str:
    """The records as a table for people."""
    rows = results(workdir)
    width = max(len(r["weights"]) for r in rows)
    lines = [f"{'weights':{width}}  {'clean':>7}  {'robust':>7}  images  attack"]
    for r in rows:
        n = int(r["image_ids"].split("..")[1]) + 1 - len(r.get("damaged", ()))
        robust = r["robust"]
        robust = "-" if robust is None else f"{robust:.1%}"
        lines.append(f"{r['weights']:{width}}  {r['clean']:7.1%}  {robust:>7}  {n:6d}  {how(r)}")
    split = f"{rows[-1]['dataset']}, split {rows[-1]['split']}"
    return "\n".join(["", split, *lines, f"records: {workdir / 'results.jsonl'}"])


def how(record: dict) -> str:
    """The attack of a record in words."""
    if not record["attacks"]:
        return "none"
    a = record["attacks"][0]
    name = record.get("method") or f"{a['name'].upper()} {a['steps']} steps"
    return f"{name}, {a['norm']} {a['epsilon']:.4g}"
