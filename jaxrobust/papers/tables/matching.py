"""Which record measures which row of a paper's table: strictly, and what is in the way otherwise.

A record counts for a row if nothing that the row says of network, training, images and attack
differs from what the record and the config beside it prove: what is not proved, differs.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrobust import models
from jaxrobust.config import phases
from jaxrobust.data import imagenet
from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.papers.tables import tables, training_words, twenty
from jaxrobust.papers.tables.tables import Table
from jaxrobust.results import run_records
from jaxrobust.results.run_records import RunRecord
from jaxrobust.runtime.text.progress import say
from jaxrobust.runtime.text.spelling import counted
from jaxrobust.weights.store import hashes

if TYPE_CHECKING:
    from jaxrobust.evaluation.records.record import AccuracyRecord

# Keys of AutoAttack's standard version as records list them: name, steps, restarts, targets.
_STANDARD = {
    ("apgd-ce", 100, 1, 0),
    ("apgd-t", 100, 1, 9),
    ("fab-t", 100, 1, 9),
    ("square", 5000, 1, 0),
}


def collect_checked(places: list[Path]) -> list[RunRecord]:
    """Return the records of places; refuse those that contradict themselves or their verdicts."""
    from jaxrobust.evaluation.records import checked  # which imports JAX

    collected, missing = run_records.collect(places), 0
    for ours in collected:
        checked.if_there(ours.record, ours.file)
        missing += bool(checked.missing(ours.record, ours.file))
    if missing:
        say(
            f"WARNING: the verdicts of {counted(missing, 'evaluation')} are missing, so that "
            "nothing confirms these numbers"
        )
    return collected


def differences(
    table: Table, row: dict[str, Any], key: str, run_record: RunRecord, *, of_training: bool = True
) -> list[str]:
    """List all that is in the way of a record as the measurement of one value of a table."""
    what = table.results[key]
    return [
        *_other_network(table, row, run_record, of_training),
        *_other_images(row, run_record.record, of_training),
        *other_attack(what, run_record.record, row.get("dataset")),
    ]


def _other_network(
    table: Table, row: Any, run_record: RunRecord, of_training: bool
) -> Iterator[str]:
    config = run_record.config
    if config is None:
        yield (
            run_records.other_config(run_record)
            or "no config beside the record proves which network it is"
        )
        return
    imported = "architecture" in config
    model = config if imported else config.get("model", {})
    name = model["architecture"] if imported else model.get("name")
    if "options" in row and not imported:
        yield from _other_options(str(name), model.get("options") or {}, row)
    elif name != row.get("model"):
        yield f"network {name}, not {row.get('model') or row['name']}"
    size = run_record.record.image_size if run_record.record.model else model.get("image_size")
    if size != row["image_size"]:
        yield f"{size} px, not {row['image_size']}"
    if imported:
        if not row.get("robustbench") or config.get("published_id") != row["robustbench"]:
            yield "weights that are not those of the row"
    elif row.get("origin") != "authors":
        yield f"a network of our own training, and the row's is of {row.get('origin')}"
    elif not of_training:
        yield from training_words.other_kind(table, row, _named(run_record), run_record.started)
    else:
        yield from training_words.differences(table, row, _named(run_record), run_record.started)
        of = str(run_record.record.weights).partition(",")[0]
        last = phases(run_records.whole_config(config))[-1]
        if of != last:
            yield f"weights of the phase {of}, not of the last"


def _named(run_record: RunRecord) -> dict[str, Any]:
    """Return the config of a run, its class folders by the name of the classes in them, which the
    record of an evaluation on these folders proves.
    """
    config, record = run_record.config or {}, run_record.record
    data = config.get("data", {})
    known = training_words.of_classes(record.classes_sha256)
    if not known or data.get("classes") or data.get("name") != record.dataset:
        return config
    return config | {"data": data | {"name": known}}


def _other_options(name: str, options: dict[str, Any], row: dict[str, Any]) -> Iterator[str]:
    there = models.available()
    if name not in there or row.get("model") not in there:
        yield f"network {name}, not {row['name']}"
        return
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    same = models.family(name) is models.family(row["model"])
    if not same or models.computed(name, own) != models.computed(row["model"], row["options"]):
        yield f"network {models.words(name, own)}, not {row['name']}"


def _other_images(row: Any, record: "AccuracyRecord", of_training: bool) -> Iterator[str]:
    of_files = str(record.dataset).startswith("cifar10-c:")  # of which any split is of its own
    on_list = str(row["split"]).endswith("@robustbench")
    same = record.ids_sha256 == ROBUSTBENCH_SHA256
    split = str(record.split) if of_training else str(record.split).partition("[")[0]
    name = "cifar10" if of_files else training_words.dataset(str(record.dataset), None)
    name = training_words.of_classes(record.classes_sha256) or name
    if row["dataset"] == "imagenet100":
        own = hashes.classes_sha256(imagenet.imagenet100())
        if name != "imagenet2012" or record.classes_sha256 != own:
            yield f"{record.dataset} with other classes than imagenet100"
    elif name != row["dataset"] and not (on_list and same):  # ImageNet's files lie anywhere
        yield f"{record.dataset}, not {row['dataset']}"
    if on_list and not same:
        yield f"split {record.split}, not RobustBench's list of images"
    elif not on_list and not of_files and split != row["split"]:
        yield f"split {record.split}, not {row['split']}"
    images = row["images"]
    if not of_training:
        return
    if images is None:
        yield "the paper does not say on how many images"
    elif record.image_ids != f"0..{images - 1}":
        yield f"images {record.image_ids}, not all {images}"
    if record.damaged:
        yield f"{len(record.damaged)} damaged images are left out"


def other_attack(
    what: dict[str, Any], record: "AccuracyRecord", dataset: str | None = None
) -> Iterator[str]:
    """Say what of a record's attack is not that of a result on a data set."""
    kind = what["attack"]
    if kind == "corruptions":
        yield from twenty.other_corruptions(dataset, record)
    elif kind == "clean":  # every record has it, but those of files of corruptions
        if record.clean is None:
            yield "no clean images"
    elif "members" in what:
        yield from _other_union(what["members"], record)
    else:
        yield from _other_attack(what, record)


def _other_union(members: list[dict[str, Any]], record: "AccuracyRecord") -> Iterator[str]:
    if not record.is_union:
        yield "one attack, not the worst case of several"
        return
    wanted = {twenty.pgd(own) for own in members if own["attack"] == "pgd"}
    run = {twenty.pgd(own) for own in record.attacks if own["name"] == "pgd"}
    if wanted != run:
        yield "another PGD than the study's in one of the norms"
    others = [own for own in record.attacks if own["name"] != "pgd"]
    rest = replace(record, attacks=others, robust=0.0)
    for own in (own for own in members if own["attack"] != "pgd"):
        yield from _other_attack(own, rest)


def _other_attack(what: dict[str, Any], record: "AccuracyRecord") -> Iterator[str]:
    kind = what["attack"]
    attacks = record.attacks
    if not attacks or record.robust is None:
        yield "clean accuracy only"
        return
    for attack in attacks:
        if attack["norm"] != what.get("norm"):
            yield f"{attack['norm']}, not {what.get('norm')}"
        elif not tables.same(attack["epsilon"], what["epsilon"]):
            yield f"{attack['norm']} {attack['epsilon']:.4g}, not {what['epsilon']}"
        else:
            continue
        break
    settings = {(a["name"], a["steps"], a.get("restarts", 1), a.get("targets", 0)) for a in attacks}
    if kind == "autoattack" and record.fast:
        yield "the fast version, whose verdicts are not AutoAttack's"
    elif kind == "autoattack":
        if settings != _STANDARD:
            yield "another attack than standard AutoAttack"
    elif kind == "apgd-ce" and "restarts" in what:
        if settings != {("apgd-ce", what["steps"], what["restarts"], 0)}:
            yield f"another attack than APGD-CE, {what['steps']} steps, {what['restarts']} restarts"
    elif "name" in what:  # of fixed steps
        named = [own["name"] for own in attacks]
        if named != [what["name"]] or twenty.pgd(attacks[0]) != twenty.pgd(what):
            said = f"{what['name'].upper()}, {what['steps']} steps"
            yield f"another attack than {said} of the study's length and start"
    else:
        yield f"the paper does not say the settings of its {kind}"


def measured(what: dict[str, Any], record: "AccuracyRecord") -> float | None:
    """Return the percentage that a record has for a result of a table."""
    accuracies = {"corruptions": (record.corruptions or {}).get("mean"), "clean": record.clean}
    value = accuracies.get(what["attack"], record.robust)
    return None if value is None else 100 * value


def label(run_record: RunRecord) -> str:
    """Return the name of what a record measures, for people."""
    record, config = run_record.record, run_record.config or {}
    own = config.get("model") or {"name": config.get("architecture")}
    model: Mapping[str, Any] = record.model or own
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
