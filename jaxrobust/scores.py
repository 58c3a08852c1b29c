"""What a network reaches: accuracies on a split, their records, and the table of a run."""

import contextlib
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxrobust import attacks, build, convert, metrics, models, records, sharding
from jaxrobust.checkpoint import Checkpoints, abstract_state, disk_full
from jaxrobust.data import evaluation_transform, pipeline, sources
from jaxrobust.progress import say
from jaxrobust.step import cast, eval_step
from jaxrobust.types import Attack, Params


class Weights(NamedTuple):
    """What a network is evaluated with."""

    params: Params
    stats: Params


def open_split(config, key: str) -> sources.Source:
    """A split of the config's data set, checked against its model."""
    data, model = config.data, config.model
    source = sources.open_source(data.name, data[key], data_dir=data.dir)
    if source.num_classes != model.num_classes:
        raise ValueError(
            f"model.num_classes={model.num_classes}, but {data.name} has {source.num_classes} "
            f"classes; set model.num_classes={source.num_classes}"
        )
    if source.channels != model.in_channels:
        raise ValueError(
            f"{data.name} has {source.channels} channels; set model.in_channels={source.channels}"
        )
    return source


def count(
    evaluate, weights: Weights, source, settings, config, mesh, *, preprocessing=None, bar=""
) -> dict[str, float]:
    """Clean and robust accuracy on the first `settings.images` images of a source (0: all).

    `preprocessing` is an id of `evaluation_transform`, `bar` the name of a progress bar.
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
    )
    images = min(len(source), settings.images or len(source))
    steps = -(-images // settings.batch_size)
    key = jax.random.key(config.seed)
    totals: dict[str, int] = {"count": 0, "clean": 0, "robust": 0}
    hidden = None if bar else True  # None: on a terminal only
    for b in tqdm(batches, desc=bar, total=steps, disable=hidden, leave=False, unit="batch"):
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
    images = min(len(source), config.test.images or len(source))
    identity = (which, [attack], _ids(images))
    known = ((r["weights"], r["attacks"], r["image_ids"]) for r in results(workdir))
    if first_host(identity in known):
        return
    say(f"{name}: testing step {step} with APGD-CE, {config.test.steps} steps")
    # In float32, as RobustBench does, whatever the type of training.
    evaluate = build.evaluation(config, phase.mesh, steps=config.test.steps, dtype="float32")
    scores = count(evaluate, best, source, config.test, config, phase.mesh)
    record = records.accuracy_record(
        config=plain,
        weights=which,
        params=best.params,
        stats=best.stats,
        dataset=config.data.name,
        split=config.data.test_split,
        image_ids=_ids(images),
        dtype="float32",
        preprocessing=pipeline.preprocessing_id(source, config.model.image_size),
        attacks=[attack],
        clean=scores["clean"],
        robust=scores["robust"],
        seed=config.seed,
    )
    if jax.process_index() == 0:
        metrics.append(workdir / "results.jsonl", record)


def first_host(decision: bool) -> bool:
    """What the first host decides: another one may have another, or a later, view of the files."""
    if jax.process_count() == 1:
        return decision
    return bool(multihost_utils.broadcast_one_to_all(np.array(decision)))


def _ids(images: int) -> str:
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
        n, robust = int(r["image_ids"].split("..")[1]) + 1, r["robust"]
        robust = "-" if robust is None else f"{robust:.1%}"
        lines.append(f"{r['weights']:{width}}  {r['clean']:7.1%}  {robust:>7}  {n:6d}  {_how(r)}")
    split = f"{rows[-1]['dataset']}, split {rows[-1]['split']}"
    return "\n".join(["", split, *lines, f"records: {workdir / 'results.jsonl'}"])


def _how(record: dict) -> str:
    """The attack of a record in words."""
    if not record["attacks"]:
        return "none"
    a = record["attacks"][0]
    name = record.get("method") or f"{a['name'].upper()} {a['steps']} steps"
    return f"{name}, {a['norm']} {a['epsilon']:.4g}"


class Values(dict):
    """A config as plain values; its keys read as attributes, which is how `build` reads it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def run_config(workdir: Path) -> Values:
    """The config of a run, from its workdir."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--workdir {workdir}: no run is there, config.json is missing; give the --workdir of "
            "a training, or --model NAME --weights PATH"
        )
    try:
        config = json.loads(path.read_text(), object_hook=Values)
        missing = {"model", "data", "attack", "evaluation", "test"} - config.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); give another --workdir") from error
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}: it is not a config of this version")
    return config


def model_config(name: str) -> Values:
    """What a run's config would say of a network from a file; `settle` replaces the None."""
    size = {"num_classes": None, "image_size": None, "in_channels": None}
    return Values(
        model=Values(name=models.known(name), **size, remat=False, options=Values()),
        data=Values(name=None, test_split="test", dir=None, workers=0),
        attack=Values(norm="linf", epsilon=None),
        test=Values(batch_size=128),
    )


def settle(origin: Values, changes: dict[str, Any]) -> tuple[Values, sources.Source]:
    """A config with `changes` (dotted key -> value; None: none) and what they imply; its data.

    Raises:
      ValueError: no data set, or one that does not belong to the network.
    """
    config = json.loads(json.dumps(origin), object_hook=Values)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if value is not None:
            config[section][name] = value
    data, model = config.data, config.model
    if data.name is None:
        raise ValueError("--model needs --dataset NAME, such as digits, cifar10 or imagenet2012")
    if data.name != origin.data.name and changes["data.test_split"] is None:
        data["test_split"] = "test"  # a part of another data set's split says nothing here
    if config.attack.norm != origin.attack.norm and changes["attack.epsilon"] is None:
        config.attack["epsilon"] = None  # nor does a radius in another norm
    source = sources.open_source(data.name, data.test_split, data_dir=data.dir)
    shape = source.image_shape
    if model.image_size is None:
        model["image_size"] = shape[0] if shape and shape[0] == shape[1] else 224
    if model.num_classes is None:
        model["num_classes"] = source.num_classes
    if model.num_classes != source.num_classes:
        raise ValueError(
            f"the network has num_classes={model.num_classes}, but {source.where()} has "
            f"{source.num_classes} classes; give the --dataset that it was trained for"
        )
    return config, source


def run_weights(config: Values, workdir: Path, phase: str | None) -> tuple[str, Weights]:
    """The best weights of a phase (default: the last one that has them), and their name."""
    if phase not in (None, "pretrain", "train"):
        raise ValueError(f"--phase={phase} is unknown; one of pretrain, train")
    phases = [phase] if phase else ["train", "pretrain"]
    done = [p for p in phases if list((workdir / p / "best").glob("[0-9]*"))]
    if not done:
        raise ValueError(
            f"{workdir} has no best checkpoint of {' or '.join(phases)}; train until it has one "
            "(the training command continues)"
        )
    shapes = Weights(*jax.eval_shape(build.network(config).init, jax.random.key(0)))
    everywhere = sharding.replicated(sharding.make_mesh())
    with contextlib.closing(Checkpoints(workdir / done[0] / "best", read_only=True)) as best:
        number = best.latest_step()
        assert number is not None
        weights = best.restore(number, abstract_state(shapes, everywhere))
    return f"{done[0]}, step {number}, {config.evaluation.weights}", weights


def file_weights(config: Values, path: Path) -> tuple[str, Weights]:
    """The weights of a file, and its name; the config learns their number of channels."""
    model = config.model
    params, stats = convert.load(
        model.name, path, num_classes=model.num_classes, image_size=model.image_size
    )
    model["in_channels"] = len(stats["normalize.mean"])
    everywhere = sharding.replicated(sharding.make_mesh())
    return path.name, Weights(*jax.device_put((params, stats), everywhere))


class Question(NamedTuple):
    """How to evaluate; norm and radius stand in the config."""

    attack: str = "autoattack"  # or clean, pgd-K, apgd-ce
    version: str = "standard"  # of AutoAttack; or plus
    images: int = 0  # the first ones of the split; 0: all
    batch: int | None = None  # images at a time, rounded up to the devices
    seed: int = 0  # of the attacks' draws
    preprocessing: str | None = None  # None: `pipeline.preprocessing_id`
    search_dtype: str = "float32"  # what AutoAttack searches in; verdicts fall in float32


_PGD = re.compile(r"pgd-([1-9]\d*)")
_AUTOATTACK = {"apgd-ce": ("apgd-ce",), "autoattack": None}  # None: those of the version


def evaluate(
    config: Values,
    source: sources.Source,
    which: str,
    weights: Weights,
    asked: Question,
    *,
    origin: dict[str, Any],
    out: Path,
) -> str:
    """The answer for people, from its record in `out`, which is computed unless it is there.

    Args:
      config, source: settled.
      which: the weights in words.
      weights: f32, on all devices.
      asked: how to evaluate.
      origin: the config that the network was trained with.
      out: holds the records, and the ledgers that interrupted evaluations continue from.
    Raises:
      ValueError: values that cannot work, before anything compiles.
    """
    _check(asked, config, source)
    if asked.images > len(source):
        say(f"{source.where()} has {len(source)} images, not {asked.images}: taking all")
    model, ball = config.model, [config.attack.norm, config.attack.epsilon]
    asked = asked._replace(
        images=min(len(source), asked.images or len(source)),
        preprocessing=asked.preprocessing or pipeline.preprocessing_id(source, model.image_size),
    )
    _claim(out)
    method = f"autoattack {asked.version}" if asked.attack == "autoattack" else asked.attack
    sha256 = records.weights_sha256(*weights)
    identity = {
        "network": [model.name, model.image_size, model.options, sha256],
        "data": [source.name, source.split, asked.images, asked.preprocessing],
        "attack": [method, *([] if method == "clean" else [*ball, asked.seed, asked.search_dtype])],
    }
    number = records.config_sha256(identity)[:12]
    if known := [r for r in results(out) if r.get("evaluation") == number]:
        say(f"done before, {known[-1]['time']}; nothing is computed (to do it again: --out DIR)")
        return _answer(known[-1], out)
    say(
        f"{model.name} ({which}) on {source.where()}: {method} on {asked.images} images, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    if asked.attack in _AUTOATTACK:
        name, ledger = f"{model.name} {sha256} float32", out / f"ledger-{number}.jsonl"
        found = _searched(config, source, weights, asked, name, ledger)
    else:
        found = _counted(config, source, weights, asked)
    after = found.pop("accuracy_after")
    record = records.accuracy_record(
        config=origin,
        weights=which,
        params=weights.params,
        stats=weights.stats,
        dataset=source.name,
        split=source.split,
        image_ids=_ids(asked.images),
        preprocessing=asked.preprocessing or "",
        dtype="float32",
        robust=[*after.values()][-1] if after else None,
        seed=asked.seed,
        **found,
        more={
            "evaluation": number,
            "model": {k: v for k, v in model.items() if k not in ("dtype", "remat")},
            "method": method,
            "search_dtype": asked.search_dtype,
            "accuracy_after": after,
        },
    )
    metrics.append(out / "results.jsonl", record)
    return _answer(record, out)


def _check(asked: Question, config: Values, source: sources.Source) -> None:
    """Refuses what cannot work, in the words of the command line."""
    attack, searches = asked.attack, asked.attack in _AUTOATTACK
    norm, epsilon, channels = config.attack.norm, config.attack.epsilon, config.model.in_channels
    if not (searches or attack == "clean" or _PGD.fullmatch(attack)):
        raise ValueError(
            f"--attack={attack} is unknown; one of clean, pgd-K (K steps), apgd-ce, autoattack"
        )
    if attack != "clean":
        if epsilon is None:
            raise ValueError("give --epsilon, in units of the [0, 1] pixel range, such as 4/255")
        attacks.pgd(norm=norm, epsilon=epsilon, steps=1)  # refuses what is no norm or radius
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
    if source.channels != channels:
        raise ValueError(
            f"the network takes {channels} channels, but {source.where()} has {source.channels}; "
            "give the --dataset that it was trained for"
        )
    evaluation_transform(asked.preprocessing or "none")  # refuses an unknown one


def _claim(out: Path) -> None:
    """Makes the folder; refuses one that cannot be written, before hours go into it."""
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


def _counted(config, source, weights, asked: Question) -> dict[str, Any]:
    """Accuracy on clean images and, with "pgd-K", on its last iterates."""
    settings: list[dict[str, Any]] = []
    attack: Attack = lambda logits_fn, key, images, labels: images  # noqa: E731
    if match := _PGD.fullmatch(asked.attack):
        ball = {"norm": config.attack.norm, "epsilon": config.attack.epsilon}
        settings = [{"name": "pgd", **ball, "steps": int(match[1]), "start": "random"}]
        attack = attacks.pgd(**ball, steps=int(match[1]), random_start=True)
    mesh = sharding.make_mesh()
    whole, split = sharding.replicated(mesh), sharding.by_image(mesh)
    net = build.network(config, dtype="float32")
    judge = jax.jit(
        partial(eval_step, net=net, attack=attack, dtype=jnp.dtype("float32")),
        in_shardings=(whole, whole, split, split, split, split, whole),
        out_shardings=whole,
    )
    batch = min(asked.batch or config.test.batch_size, asked.images)
    how = Values(images=asked.images, batch_size=-(-batch // mesh.size) * mesh.size)
    shown = {"preprocessing": asked.preprocessing, "bar": asked.attack}
    seeded = Values(config | {"seed": asked.seed})
    reached = count(judge, weights, source, how, seeded, mesh, **shown)
    after = {asked.attack: reached["robust"]} if settings else {}
    return {"attacks": settings, "clean": reached["clean"], "accuracy_after": after}


def _searched(config, source, weights, asked: Question, name: str, ledger: Path) -> dict[str, Any]:
    """Accuracy before and after AutoAttack, or one attack of it; prints how it goes."""
    from jaxrobust.evaluation import autoattack

    def logits_fn(dtype: str):
        net = build.network(config, dtype=dtype)
        params = cast(weights.params, jnp.dtype(dtype))
        return jax.tree_util.Partial(lambda *p: net.apply(*p)[0], params, weights.stats)

    batch = _load(source, config, asked)
    ball = {"norm": config.attack.norm, "epsilon": config.attack.epsilon}
    result = autoattack(
        logits_fn("float32"),
        batch.images,
        batch.labels,
        **ball,
        version=asked.version,
        attacks=_AUTOATTACK[asked.attack],
        seed=asked.seed,
        batch_size=asked.batch,
        image_ids=batch.ids.tolist(),
        ledger=ledger,
        identity=name,
        search_fn=None if asked.search_dtype == "float32" else logits_fn(asked.search_dtype),
    )
    return {
        "attacks": [ball | settings for settings in result.attacks],
        "clean": float(result.clean.mean()),
        "accuracy_after": {name: float(value) for name, value in result.accuracy_after.items()},
        "flags": dict(result.flags),
    }


def _load(source, config, asked: Question) -> pipeline.EvaluationBatch:
    """The first images of a source as one batch, f32 in [0, 1]."""
    parts = pipeline.evaluation_batches(
        source,
        batch_size=min(asked.images, 256),
        image_size=config.model.image_size,
        preprocessing=asked.preprocessing,
        limit=asked.images,
        workers=config.data.workers,
    )
    with contextlib.closing(parts):
        fields = [np.concatenate(f)[: asked.images] for f in zip(*parts, strict=True)]
    batch = pipeline.EvaluationBatch(*fields)
    return batch._replace(images=batch.images.astype(np.float32) / np.float32(255))


def _answer(record: dict, out: Path) -> str:
    """A record for people."""
    rows = {"clean": record["clean"]}
    rows |= {f"after {name}": value for name, value in record["accuracy_after"].items()}
    lines = [
        f"\n{record['model']['name']} ({record['weights']}), {record['dtype']}",
        f"{record['dataset']}, split {record['split']}, images {record['image_ids']}",
        f"attack: {_how(record)}",
        *(f"{name:16} {value:7.1%}" for name, value in rows.items()),
        *(f"flag {name}: {text}" for name, text in record["flags"].items()),
        f"record {record['evaluation']} in {out / 'results.jsonl'}",
    ]
    return "\n".join(lines)
