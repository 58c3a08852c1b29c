"""The accuracy of stored weights: which weights, on what, how evaluated, and its record."""

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

from jaxrobust import attacks, models
from jaxrobust.data import (
    EvaluationBatch,
    evaluation_transform,
    pipeline,
    resolve,
    same_preprocessing,
    sources,
)
from jaxrobust.evaluation import autoattack, records
from jaxrobust.runtime import hosts, sharding
from jaxrobust.runtime.progress import say
from jaxrobust.training import build, metrics, results
from jaxrobust.training.step import cast, eval_step
from jaxrobust.types import Attack
from jaxrobust.weights import certificates, convert
from jaxrobust.weights import folder as weights_folder
from jaxrobust.weights.checkpoint import Checkpoints, abstract_state, disk_full, steps


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


def options(
    name: str, given: dict[str, Any] | None, said: tuple[str, dict[str, Any]] | None, path: Path
) -> dict[str, Any]:
    """The options of stored weights of `name`: what is `said` of the file, else what is given.

    Raises:
      ValueError: they are those of another network, or there is no such option.
    """
    model, theirs = said or (name, given or {})
    ours = (theirs if model == name else {}) if given is None else given
    if models.computed(name, ours) != models.computed(model, theirs):
        raise ValueError(
            f"{path} holds the weights of {models.words(model, theirs)}, as is written in or "
            f"beside it, not of {models.words(name, ours)}; leave out the flag that says otherwise"
        )
    return models.essential(name, ours)


def model_config(name: str, path: Path, given: dict[str, Any] | None = None) -> Values:
    """What a run's config would say of a network from a file; `settle` replaces the None.

    Raises:
      ValueError: see `options`.
    """
    size = {"num_classes": None, "image_size": None, "in_channels": None}
    own = Values(options(models.known(name), given, certificates.network(path), path))
    return Values(
        model=Values(name=name, **size, remat=False, options=own),
        data=Values(name=None, test_split="test", dir=None, classes=None, workers=0),
        attack=Values(norm="linf", epsilon=None),
        test=Values(batch_size=128),
    )


def folder_config(folder: Path, name: str | None, given: dict[str, Any] | None) -> Values:
    """The same for weights that were imported, from the config.json beside them.

    Raises:
      ValueError: there are none, or they are not those of `name` (None: any).
    """
    about = weights_folder.about(folder)
    if about is None:
        raise ValueError(
            f"--weights {folder} is no folder that tools/import_torch.py wrote; give a file"
        )
    own = about["architecture"]
    if models.computed(name or own, {}) != models.computed(own, {}):
        raise ValueError(f"{folder} holds a {own}; leave --model={name} out")
    config = model_config(own, folder, given)
    config.model.update({k: about[k] for k in ("num_classes", "image_size", "in_channels")})
    config.attack.update(norm=about["norm"] or "linf", epsilon=about["epsilon"])
    config["preprocessing"] = about["preprocessing"]
    return config


def preprocessing(
    origin: Values, config: Values, source: sources.Source, given: str | None = None
) -> str | None:
    """The flag's, else what a run tested with or imported weights expect; None: nothing is known.

    Imported weights expect it of photographs, not of images that all have one size. At another
    image size only a crop percentage means the same, and what is dropped is said.
    Raises:
      ValueError: the flag contradicts imported weights.
    """
    size = config.model.image_size
    tested = origin.data.get("preprocessing")
    expected = origin.get("preprocessing") if source.image_shape is None else None
    own = tested or expected
    if own and size != origin.model.image_size and resolve(own, size) == own:
        if not given:
            instead = pipeline.preprocessing_id(source, size)
            say(f"{own} is for another image size: at {size} px, {instead}; or --preprocessing ID")
        own = expected = None
    if given and expected and not same_preprocessing(given, expected, size):
        raise ValueError(
            f"--preprocessing={given}, but these weights expect {expected}; leave the flag out (or "
            f"give the file, --weights FOLDER/{weights_folder.WEIGHTS} with --model)"
        )
    return given or own


_IMAGENET = re.compile(r"(tfds:)?imagenet2012\b")


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
        # A part of another data set's split says nothing here.
        data["test_split"] = "validation@robustbench" if _IMAGENET.match(data.name) else "test"
    if config.attack.norm != origin.attack.norm and changes["attack.epsilon"] is None:
        config.attack["epsilon"] = None  # nor does a radius in another norm
    source = sources.open_source(
        data.name,
        data.test_split,
        data_dir=data.dir,
        classes=data.get("classes"),
        num_classes=model.num_classes,
    )
    shape = source.image_shape
    if model.image_size is None:
        model["image_size"] = shape[0] if shape and shape[0] == shape[1] else 224
    if model.num_classes is None:
        model["num_classes"] = source.num_classes
    return config, source


def run_weights(config: Values, workdir: Path, phase: str | None) -> tuple[str, results.Weights]:
    """The best weights of a phase (default: the last one that has them), and their name.

    Where the config has another image size than the run, positions are resized as conversion does.
    """
    if phase not in (None, "pretrain", "train"):
        raise ValueError(f"--phase={phase} is unknown; one of pretrain, train")
    phases = [phase] if phase else ["train", "pretrain"]
    done = [p for p in phases if steps(workdir / p / "best")]
    if not done:
        raise ValueError(
            f"{workdir} has no best checkpoint of {' or '.join(phases)}; train until it has one "
            "(the training command continues)"
        )
    own = run_config(workdir)
    shapes = results.Weights(*jax.eval_shape(build.network(own).init, jax.random.key(0)))
    everywhere = sharding.replicated(sharding.make_mesh())
    with contextlib.closing(Checkpoints(workdir / done[0] / "best", read_only=True)) as best:
        number = best.latest_step()
        assert number is not None
        weights = best.restore(number, abstract_state(shapes, everywhere))
    if config.model.image_size != own.model.image_size:
        weights = results.Weights(*jax.device_put(_resized(config, weights), everywhere))
    return f"{done[0]}, step {number}, {config.evaluation.weights}", weights


def _resized(config: Values, weights: results.Weights) -> list[dict[str, np.ndarray]]:
    """Params and stats of the same network at another image size, as those of the config's."""
    model, arrays = config.model, jax.device_get(weights.params | weights.stats)
    wanted = results.Weights(*jax.eval_shape(build.network(config).init, jax.random.key(0)))
    shapes = {name: array.shape for name, array in (wanted.params | wanted.stats).items()}
    try:
        filled = convert.rename(convert.names(model.name, arrays).rows, arrays, shapes)
    except ValueError as error:
        raise ValueError(f"--image_size={model.image_size}: {error}") from error
    return [{name: filled[name] for name in part} for part in wanted]


def file_weights(config: Values, path: Path) -> tuple[str, results.Weights]:
    """The weights of a file, and its name; the config learns their number of channels."""
    model = config.model
    if line := certificates.said(path):
        say(line)
    path = path / weights_folder.WEIGHTS if path.is_dir() else path
    sizes = {"num_classes": model.num_classes, "image_size": model.image_size}
    params, stats = convert.load(model.name, path, **sizes, **model.options)
    model["in_channels"] = len(stats["normalize.mean"])
    everywhere = sharding.replicated(sharding.make_mesh())
    return path.name, results.Weights(*jax.device_put((params, stats), everywhere))


class Question(NamedTuple):
    """How to evaluate; norm and radius stand in the config."""

    attack: str = "autoattack"  # or clean, pgd-K, apgd-ce
    version: str = "standard"  # of AutoAttack; or plus
    images: int = 0  # the first ones of the split; 0: all
    batch: int | None = None  # images at a time, rounded up to the devices; AutoAttack: per process
    seed: int = 0  # of the attacks' draws
    preprocessing: str | None = None  # None: `pipeline.preprocessing_id`
    search_dtype: str = "float32"  # what AutoAttack searches in; verdicts fall in float32


_PGD = re.compile(r"pgd-([1-9]\d{0,6})")
_AUTOATTACK = {"apgd-ce": ("apgd-ce",), "autoattack": None}  # None: those of the version


def evaluate(
    config: Values,
    source: sources.Source,
    which: str,
    weights: results.Weights,
    asked: Question,
    *,
    origin: dict[str, Any],
    out: Path,
) -> str:
    """The answer for people, from its record in `out`, which is computed unless it is there.

    The processes of a pod share the images; all get the answer, the first one writes the record.

    Args:
      config, source: settled.
      which: the weights in words.
      weights: f32, on all devices.
      asked: how to evaluate.
      origin: the config that the network was trained with.
      out: holds the records, and the ledgers that interrupted evaluations continue from; of a pod,
        a folder that all hosts see.
    Raises:
      ValueError: values that cannot work, before anything compiles.
    """
    _check(asked, config, source)
    if asked.images > len(source):
        say(f"{source.where()} has {len(source)} images, not {asked.images}: taking all")
    model, ball = config.model, [config.attack.norm, config.attack.epsilon]
    asked = asked._replace(
        images=min(len(source), asked.images or len(source)),
        preprocessing=pipeline.preprocessing_id(source, model.image_size, asked.preprocessing),
    )
    _claim(out)
    method = f"autoattack {asked.version}" if asked.attack == "autoattack" else asked.attack
    sha256 = records.weights_sha256(*weights)
    own = config.data.get("classes") or source.name.startswith("folder:")
    chosen = [source.ids_sha256, records.classes_sha256(source.classes) if own else None]
    chosen = [value for value in chosen if value]
    identity = {
        "network": [model.name, model.image_size, model.options, sha256],
        "data": [source.name, source.split, asked.images, asked.preprocessing, *chosen],
        "attack": [method, *([] if method == "clean" else [*ball, asked.seed, asked.search_dtype])],
    }
    hosts.agree(identity)
    number = records.config_sha256(identity)[:12]
    known = [r for r in results.results(out) if r.get("evaluation") == number]
    if results.first_host(bool(known)):
        if not known:  # a host that does not see the first one's records
            return ""
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
        image_ids=results.ids_of(asked.images),
        preprocessing=asked.preprocessing or "",
        dtype="float32",
        seed=asked.seed,
        ids_sha256=source.ids_sha256,
        classes=source.classes,
        **found,
        more={
            "evaluation": number,
            "model": {k: v for k, v in model.items() if k not in ("dtype", "remat")},
            "method": method,
            "search_dtype": asked.search_dtype,
            "accuracy_after": after,
        },
    )
    if jax.process_index() == 0:
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
    if source.channels != channels:
        raise ValueError(
            f"the network takes {channels} channels, but {source.where()} has {source.channels}; "
            "give the --dataset that it was trained for"
        )
    size = config.model.image_size
    evaluation_transform(pipeline.preprocessing_id(source, size, asked.preprocessing))  # refuses


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
    reached = results.count(
        judge,
        weights,
        source,
        how,
        Values(config | {"seed": asked.seed}),
        mesh,
        preprocessing=asked.preprocessing,
        bar=asked.attack,
    )
    after = {asked.attack: reached["robust"]} if settings else {}
    robust = reached["robust"] if settings else None
    return {
        "attacks": settings,
        "clean": reached["clean"],
        "robust": robust,
        "accuracy_after": after,
    }


def _searched(config, source, weights, asked: Question, name: str, ledger: Path) -> dict[str, Any]:
    """Accuracy before and after AutoAttack, or one attack of it; prints how it goes."""

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
        "robust": float(result.robust.mean()),
        "accuracy_after": dict(result.accuracy_after),
        "flags": dict(result.flags),
    }


def _load(source, config, asked: Question) -> EvaluationBatch:
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
    batch = EvaluationBatch(*fields)
    return batch._replace(images=batch.images.astype(np.float32) / np.float32(255))


def _answer(record: dict, out: Path) -> str:
    """A record for people."""
    rows = {"clean": record["clean"]}
    rows |= {f"after {name}": value for name, value in record["accuracy_after"].items()}
    lines = [
        f"\n{record['model']['name']} ({record['weights']}), {record['dtype']}",
        f"{record['dataset']}, split {record['split']}, images {record['image_ids']}",
        f"attack: {results.how(record)}",
        *(f"{name:16} {value:7.1%}" for name, value in rows.items()),
        *(f"flag {name}: {text}" for name, text in record["flags"].items()),
        f"record {record['evaluation']} in {out / 'results.jsonl'}",
    ]
    return "\n".join(lines)
