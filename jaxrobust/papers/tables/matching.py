"""Strict matching of records with rows of a paper's tables, and the differences otherwise.

A record matches a row if its config trains like the row's line, with the same images and attack.
Whatever the record and its config do not prove counts as different.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrobust import models
from jaxrobust.attacks import registry
from jaxrobust.config import Config, of_phase, phases, plain
from jaxrobust.data import imagenet
from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.data.transforms.presets import PRESETS
from jaxrobust.papers.tables import lines, tables
from jaxrobust.papers.tables.lines import Run
from jaxrobust.papers.tables.tables import Table
from jaxrobust.results import run_records
from jaxrobust.results.run_records import RunRecord
from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.text.progress import say
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import start_run

if TYPE_CHECKING:
    from jaxrobust.evaluation.records.record import AccuracyRecord

# Hash of the names of classes in the order of labels -> the tables' name of a data set.
_CLASSES = {hashes.classes_sha256(imagenet.IMAGENETTE): "imagenette"}
# Keys of a phase that do not affect its updates, or that are compared elsewhere.
_FREE = ("changes", "microbatches", "from_random", "stem", "head", "normalize")
_FREE_OPTIONS = ("scan", "bn_group")  # of model.options; they do not affect results
_NEAR = 0.1  # tolerated relative difference of the batch size, so that devices divide it
# What a record must share with a row to be shown there in italics.
_KIND = (
    *("objective", "data.name", "data.classes", "model.image_size"),
    *("attack.name", "attack.epsilon"),
)
# Keys of AutoAttack's standard version as records list them: name, steps, restarts, targets.
_STANDARD = {
    ("apgd-ce", 100, 1, 0),
    ("apgd-t", 100, 1, 9),
    ("fab-t", 100, 1, 9),
    ("square", 5000, 1, 0),
}


def collect_checked(places: list[Path]) -> list[RunRecord]:
    """Return the records of places; refuse records that contradict themselves or their verdicts."""
    from jaxrobust.evaluation.records import checked  # which imports JAX

    collected, missing = run_records.collect(places), 0
    for run_record in collected:
        checked.if_there(run_record.record, run_record.file)
        missing += bool(checked.missing(run_record.record, run_record.file))
    if missing:
        say(
            f"WARNING: the verdicts of {counted(missing, 'evaluation')} are missing, so nothing "
            "confirms these numbers"
        )
    return collected


def differences(
    table: Table, row: dict[str, Any], key: str, run_record: RunRecord, *, of_training: bool = True
) -> list[str]:
    """List all differences between a record and one value of a table."""
    result = table.results[key]
    return [
        *_other_network(row, run_record, of_training),
        *_other_images(row, run_record.record, of_training),
        *other_attack(result, run_record.record, row.get("dataset")),
    ]


def _other_network(row: Any, run_record: RunRecord, of_training: bool) -> Iterator[str]:
    config, record = run_record.config, run_record.record
    if config is None:
        yield (
            run_records.other_config(run_record)
            or "no config next to the record proves which network it is"
        )
        return
    imported = "architecture" in config
    model = config if imported else config.get("model", {})
    size = record.image_size if record.model else model.get("image_size")
    if size != row["image_size"]:
        yield f"{size} px, not {row['image_size']}"
    if imported:
        if (weights := lines.published_weights(row)) and config.get("published_id") == weights:
            return
        if config["architecture"] != row.get("model"):
            yield f"network {config['architecture']}, not {row.get('model') or row['name']}"
        if not weights or config.get("source") != weights:
            yield "weights that are not the row's"
        return
    if row.get("origin") != "authors":
        yield f"a network that we trained, but the row's comes from {row.get('origin')}"
        return
    classes = _CLASSES.get(record.classes_sha256)  # as proved by the images of an evaluation
    data = config.get("data", {})
    if classes and not data.get("classes") and data.get("name") == record.dataset:
        config = config | {"data": data | {"name": classes}}
    yield from other_training(row, config, run_record.started, of_training=of_training)
    last = phases(run_records.whole_config(config))[-1]
    phase = str(record.weights).partition(",")[0]
    if of_training and phase != last:
        yield f"weights from the phase {phase}, not from the last"


def other_training(
    row: dict[str, Any],
    config: dict[str, Any],
    started: dict[str, Any] | None = None,
    *,
    of_training: bool = True,
) -> Iterator[str]:
    """Yield differences of network and training between a run and the line of a row.

    Args:
      started: the config of the run, or of the imported folder, that the run started from.
      of_training: False: only the network, the data, the objective and the radius are compared.
    """
    run = lines.of_row(row).run
    if run is None:
        yield "no config trains the network of the row"
        return
    weights, history = _training(json.dumps(config), json.dumps(started))
    line_weights, line_history = _line_training(run, row.get("train_dataset"))
    if of_training or "options" in row:
        yield from _other_model(history[-1], line_history[-1])
    elif history[-1]["model.name"] != line_history[-1]["model.name"]:
        yield f"network {history[-1]['model.name']}, not {line_history[-1]['model.name']}"
    if not of_training:
        yield from _unlike(history[-1], line_history[-1], _KIND)
        return
    if weights != line_weights:
        yield f"init.weights {weights}, not {line_weights}"
    if len(history) != len(line_history):
        yield f"{counted(len(history), 'phase')} of training, not {len(line_history)}"
    pairs = zip(reversed(history), reversed(line_history), strict=False)
    for number, (phase, line_phase) in enumerate(pairs):
        prefix = "in an earlier phase, " if number else ""
        omitted = ("model.options",) if number else ("model.options", "model.name")
        keys = [key for key in line_phase if key in phase and key not in omitted]
        yield from (prefix + text for text in _unlike(phase, line_phase, keys))


@functools.lru_cache(512)
def _line_training(run: Run, dataset: str | None) -> tuple[str | None, list[dict[str, Any]]]:
    config = plain(run.load())
    if config["data"]["name"].startswith("folder:"):  # any folder with these classes
        config["data"]["name"] = dataset
    start = start_run.named(config["init"]["weights"])
    return _training(json.dumps(config), json.dumps(start and plain(arguments.load_config(start))))


@functools.lru_cache(512)
def _training(config: str, started: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the initial weights of a training, and its phases, including those of earlier runs.

    A phase has each key that affects its updates, with presets resolved, except for the images
    held out to choose the epoch.
    """
    run_config, first = run_records.whole_config(json.loads(config)), json.loads(started)
    weights: str | None = run_config.init.weights
    history: list[dict[str, Any]] = []
    if first is not None and "architecture" in first:  # an imported folder
        weights = start_run.imported_from(first)
    elif first is not None:
        name = start_run.named(first["init"]["weights"])
        earlier_start = json.dumps(name and plain(arguments.load_config(name)))
        weights, history = _training(started, earlier_start)
    history = list(history)
    for number, name in enumerate(phases(run_config)):
        start = run_config[name] if number else run_config.init
        values = _phase_values(of_phase(run_config, name), name)
        values |= {key: start[key] for key in ("stem", "head", "normalize")}
        if values["normalize"] == "keep" and history:
            values["normalize"] = history[-1]["normalize"]
        history.append(values)
    return weights, history


def _phase_values(config: Config, name: str) -> dict[str, Any]:
    from jaxrobust.training import build  # which imports JAX
    from jaxrobust.training.update import objectives

    values = {key: value for key, value in plain(config[name]).items() if key not in _FREE}
    model, data = config.model, config.data
    values |= {"model.name": model.name, "model.options": model.options}
    values |= {f"model.{key}": model[key] for key in ("num_classes", "image_size", "in_channels")}
    preset = PRESETS.get(data.augmentation)
    chain = preset.chain if preset else data.augmentation
    values |= {"data.name": _dataset(data.name), "data.augmentation": chain}
    values |= {f"data.{key}": data[key] for key in ("classes", "views")}
    values["data.first_view"] = data.first_view if data.views != 1 else None
    values["data.extra_share"] = data.extra_share if data.extra else 0.0
    strengths = build.mixes_and_erases(config)
    keys = ("mixup.mixup", "mixup.cutmix", "erase.probability", "label_smoothing")
    values |= dict(zip(keys, strengths, strict=True))
    if strengths[0] or strengths[1]:
        values |= {f"mixup.{k}": config.mixup[k] for k in ("switch", "probability", "group")}
    if strengths[2]:
        values["erase.noise"] = config.erase.noise
    if objectives.named(config[name].objective).attacks:
        values |= {f"attack.{key}": value for key, value in plain(config.attack).items()}
        values["attack.steps"] = registry.steps(config.attack.name, config.attack.steps)
    return values


def _unlike(
    phase: dict[str, Any], line_phase: dict[str, Any], keys: Iterable[str]
) -> Iterator[str]:
    for key in keys:
        value: Any = phase.get(key)
        wanted: Any = line_phase.get(key)
        near = key == "batch_size" and abs(value / wanted - 1) < _NEAR
        if value != wanted and not near and not tables.same(value, wanted):
            shown = [f"{x:.4g}" if isinstance(x, float) else f"{x}" for x in (value, wanted)]
            yield f"{key} {shown[0]}, not {shown[1]}"


def _other_model(phase: dict[str, Any], line_phase: dict[str, Any]) -> Iterator[str]:
    name, wanted = phase["model.name"], line_phase["model.name"]
    if name not in models.available():
        yield f"network {name}, not {wanted}"
        return
    options, wanted_options = (_options(values["model.options"]) for values in (phase, line_phase))
    fields = [
        models.variant(name, **options)._asdict(),
        models.variant(wanted, **wanted_options)._asdict(),
    ]
    if models.family(name) is models.family(wanted) and fields[0] == fields[1]:
        return
    words = [models.words(name, options), models.words(wanted, wanted_options)]
    if words[0] != words[1]:
        yield f"network {words[0]}, not {words[1]}"
    else:  # which only affects the training, such as drop_path
        yield f"model.options {options}, not {wanted_options}"


def _options(options: dict[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in options.items() if key not in _FREE_OPTIONS}
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def _dataset(name: str | None) -> str:
    return str(name).removeprefix("tfds:").partition(":")[0]


def _other_images(row: Any, record: "AccuracyRecord", of_training: bool) -> Iterator[str]:
    of_files = str(record.dataset).startswith("cifar10-c:")  # every split of which is separate
    on_list = str(row["split"]).endswith("@robustbench")
    is_on_list = record.ids_sha256 == ROBUSTBENCH_SHA256
    split = str(record.split) if of_training else str(record.split).partition("[")[0]
    name = "cifar10" if of_files else _dataset(record.dataset)
    name = _CLASSES.get(record.classes_sha256, name)
    if row["dataset"] == "imagenet100":
        expected_hash = hashes.classes_sha256(imagenet.imagenet100())
        if name != "imagenet2012" or record.classes_sha256 != expected_hash:
            yield f"{record.dataset} with classes other than imagenet100"
    elif name != row["dataset"] and not (on_list and is_on_list):  # ImageNet's files lie anywhere
        yield f"{record.dataset}, not {row['dataset']}"
    if on_list and not is_on_list:
        yield f"split {record.split}, not RobustBench's list of images"
    elif not on_list and not of_files and split != row["split"]:
        yield f"split {record.split}, not {row['split']}"
    images = row["images"]
    if not of_training:
        return
    if images is None:
        yield "the paper does not state the number of images"
    elif record.image_ids != f"0..{images - 1}":
        yield f"images {record.image_ids}, not all {images}"
    if record.damaged:
        yield f"{len(record.damaged)} damaged images are left out"


def other_attack(
    result: dict[str, Any], record: "AccuracyRecord", dataset: str | None = None
) -> Iterator[str]:
    """Yield differences between a record's attack and that of a result on a data set."""
    kind = result["attack"]
    if kind == "corruptions":
        yield from _other_corruptions(dataset, record)
    elif kind == "clean":  # every record has it, except those of corruption files
        if record.clean is None:
            yield "no clean images"
    elif "members" in result:
        yield from _other_union(result["members"], record)
    else:
        yield from _other_attack(result, record)


def _other_corruptions(dataset: str | None, record: "AccuracyRecord") -> Iterator[str]:
    measured = record.corruptions
    if measured is None:
        yield "no corruptions"
        return
    count = sum(len(row) for row in measured["accuracy"].values())
    if count != 75:
        yield f"{count} corruptions, not 75"
    if dataset == "cifar10" and measured["images"] != "files":
        yield "computed corruptions, not the files of CIFAR-10-C"


def _pgd(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Select the settings that identify a PGD, from a result of a table or a record."""
    steps, epsilon = settings["steps"], float(Fraction(settings["epsilon"]))
    length = settings.get("step_size")
    if length is None:
        length = settings["relative_step"] * epsilon / steps
    rule = settings.get("l1_rule") or "sparse"
    return settings["norm"], round(epsilon, 9), steps, round(length, 9), settings["start"], rule


def _other_union(members: list[dict[str, Any]], record: "AccuracyRecord") -> Iterator[str]:
    if not record.is_union:
        yield "one attack, not the worst case of several"
        return
    pgd = {_pgd(attack) for attack in record.attacks if attack["name"] == "pgd"}
    if pgd != {_pgd(member) for member in members if member["attack"] == "pgd"}:
        yield "a different PGD than the study's in one of the norms"
    others = [attack for attack in record.attacks if attack["name"] != "pgd"]
    for member in members:
        if member["attack"] != "pgd":
            yield from _other_attack(member, replace(record, attacks=others, robust=0.0))


def _other_attack(result: dict[str, Any], record: "AccuracyRecord") -> Iterator[str]:
    kind = result["attack"]
    attacks = record.attacks
    if not attacks or record.robust is None:
        yield "clean accuracy only"
        return
    for attack in attacks:
        if attack["norm"] != result.get("norm"):
            yield f"{attack['norm']}, not {result.get('norm')}"
        elif not tables.same(attack["epsilon"], result["epsilon"]):
            yield f"{attack['norm']} {attack['epsilon']:.4g}, not {result['epsilon']}"
        else:
            continue
        break
    settings = {(a["name"], a["steps"], a.get("restarts", 1), a.get("targets", 0)) for a in attacks}
    if kind == "autoattack" and record.fast:
        yield "the fast version, whose verdicts are not AutoAttack's"
    elif kind == "autoattack":
        if settings != _STANDARD:
            yield "a different attack than standard AutoAttack"
    elif kind == "apgd-ce" and "restarts" in result:
        if settings != {("apgd-ce", result["steps"], result["restarts"], 0)}:
            name = f"APGD-CE, {result['steps']} steps, {result['restarts']} restarts"
            yield f"a different attack than {name}"
    elif "name" in result:  # with fixed steps
        names = [attack["name"] for attack in attacks]
        if names != [result["name"]] or _pgd(attacks[0]) != _pgd(result):
            name = f"{result['name'].upper()}, {result['steps']} steps"
            yield f"a different attack than {name} with the study's length and start"
    else:
        yield f"the paper does not state the settings of its {kind}"


def measured(result: dict[str, Any], record: "AccuracyRecord") -> float | None:
    """Return a record's percentage for a result of a table."""
    accuracies = {"corruptions": (record.corruptions or {}).get("mean"), "clean": record.clean}
    value = accuracies.get(result["attack"], record.robust)
    return None if value is None else 100 * value


def label(run_record: RunRecord) -> str:
    """Return a readable name for a record's network."""
    record, config = run_record.record, run_record.config or {}
    config_model = config.get("model") or {"name": config.get("architecture")}
    model: Mapping[str, Any] = record.model or config_model
    weights = re.sub(r", (ema|raw)$", "", str(record.weights))
    return f"{model['name'] or 'a network'} ({weights})"


def sizes(run_record: RunRecord) -> dict[str, float]:
    """Return the parameters and multiply-adds of a record's network, in the tables' units."""
    config, record = run_record.config or {}, run_record.record
    model: Mapping[str, Any] = record.model or config.get("model") or config
    name = model.get("name") or model.get("architecture")
    classes, size = model.get("num_classes"), model.get("image_size")
    if record.function or not (name and classes and size):
        return {}
    import jax

    from jaxrobust.config import NetworkSpec
    from jaxrobust.models.table import multiply_adds

    channels = model.get("in_channels") or 3
    net = NetworkSpec(name, classes, size, channels, model["options"] or {}).create(dtype="float32")
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    adds = multiply_adds(net, params, stats, image_size=size, in_channels=channels)
    return {"params_m": sum(a.size for a in params.values()) / 1e6, "macs_g": adds / 1e9}
