"""Which record measures which row of a paper's table: strictly, and what is in the way otherwise.

A record counts for a row if nothing that the row says of network, training, images and attack
differs from what the record and the config beside it prove: what nobody proves, differs.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.config import Values, base, completed, of_phase, phase, phases, plain
from jaxrobust.data import imagenet
from jaxrobust.data.presets import PRESETS, Preset
from jaxrobust.data.subsets import ROBUSTBENCH_SHA256
from jaxrobust.runtime import jsonl
from jaxrobust.weights import hashes
from tools.papers import tables
from tools.papers.tables import Table

# Keys of AutoAttack's standard version as records list them: name, steps, restarts, targets.
_STANDARD = {
    ("apgd-ce", 100, 1, 0),
    ("apgd-t", 100, 1, 9),
    ("fab-t", 100, 1, 9),
    ("square", 5000, 1, 0),
}
# Of the phase that trains last: where a row is silent, the paper's recipe, config.base(), counts.
_RECIPE = ("lr", "warmup_epochs", "final_lr", "weight_decay", "b2", "ema_decay", "trades_beta")
_NEUTRAL = {"scan", "bn_group"}  # of model.options: they change no result of networks without BN
_NEEDED = ("objective", "augmentation", "start", "epochs", "train_dataset", "train_size")
_ATTACKED = ("train_attack", "attack_steps", "epsilon_train")


class Ours(NamedTuple):
    """A record, the file that holds it, and the config of its network, if that is beside it."""

    record: dict[str, Any]
    file: Path
    config: dict[str, Any] | None  # of a run, or of an imported folder


def collect(places: list[Path]) -> list[Ours]:
    """Return the records of runs, of folders of evaluations, and of files of records.

    A config belongs to a record whose `config_sha256` it has.
    Raises:
      ValueError: a place without records, with what may be named.
    """
    configs: dict[str, dict[str, Any]] = {}
    found: list[tuple[dict[str, Any], Path]] = []
    for place in places:
        configs |= dict(_configs(place))
        files = [p for p in _files(place) if p.is_file()]
        if not files and not _configs_only(place):
            raise ValueError(
                f"{place} has no records; name a run, a folder that holds results.jsonl, such a "
                "file, or an imported folder of weights"
            )
        found += [(record, file) for file in files for record in jsonl.read(file)]
    for record, file in found:
        if not {"clean", "attacks", "config_sha256", "dataset"} <= record.keys():
            raise ValueError(f"{file} holds lines that are no records of jaxrobust.evaluate")
    return [Ours(r, file, configs.get(str(r["config_sha256"]))) for r, file in found]


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        return [place / "results.jsonl", place / "evaluation" / "results.jsonl"]
    return [place]


def _configs_only(place: Path) -> bool:
    return (place / "config.json").is_file()


def _configs(place: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield configs under the hashes that records may have of them: as they lie there, completed
    with younger keys, and as each phase sees them.
    """
    for folder in (place, place.parent, place.parent.parent):
        path = folder / "config.json"
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text())
            found = {key: value for key, value in config.items() if key != "version"}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); get it again") from error
        if "architecture" in found:  # of an imported folder
            yield hashes.config_sha256(found), found
            continue
        whole = _whole(found)
        for seen in (found, whole, *(of_phase(whole, name) for name in whole.phases)):
            yield hashes.config_sha256(seen), whole


def _whole(config: dict[str, Any]) -> Values:
    return json.loads(json.dumps(completed(config)), object_hook=Values)


# --- What a record says, in the words of the tables ---


def trained(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's config says of its last phase; what cannot be told is missing."""
    whole = _whole(config)
    *before, last = phases(whole)
    seen, own = of_phase(whole, last), whole[last]
    said: dict[str, Any] = {key: own[key] for key in _RECIPE}
    said |= {key: own[key] for key in ("objective", "epochs", "batch_size")}
    said["train_dataset"] = _dataset(seen.data.name, seen.data.classes)
    said["train_size"] = seen.model.image_size
    said |= _augmented(seen)
    if own.objective != "clean":
        attack = seen.attack
        made = 1 if attack.name == "fgsm" else attack.steps
        said |= {"train_attack": attack.name, "attack_steps": made}
        said |= {"epsilon_train": attack.epsilon, "norm_train": attack.norm}
        said["epsilon_warmup_epochs"] = attack.get("warmup_epochs") or 0
    return said | _started(whole, before, last)


def _augmented(seen: Values) -> dict[str, Any]:
    """Return the augmentation in the words of the tables: a name, or what is mixed and erased."""
    preset = PRESETS.get(seen.data.augmentation, Preset(seen.data.augmentation))
    strengths = [seen.mixup.mixup, seen.mixup.cutmix, seen.erase.probability]
    usual = [preset.mixup, preset.cutmix, preset.erase]
    given = [u if s is None else s for s, u in zip(strengths, usual, strict=True)]
    smoothing = preset.label_smoothing if seen.label_smoothing is None else seen.label_smoothing
    said: dict[str, Any] = {"label_smoothing": smoothing}
    names = [
        name
        for name in ("basic", "light", "heavy")
        if [PRESETS[name].chain, *_strengths(PRESETS[name])] == [preset.chain, *given]
    ]
    if names:  # all of DeiT's is heavy but for the noise that fills what is erased
        erased = names[0] == "heavy" and seen.erase.noise == "truncated"
        said["augmentation"] = "deit" if erased else names[0]
    drawn = preset.chain == PRESETS["heavy"].chain
    on = [g > 0 for g in given]
    whole = [u * bool(g) for g, u in zip(given, _strengths(PRESETS["heavy"]), strict=True)] == given
    if whole and (drawn or preset.chain == PRESETS["light"].chain):
        said |= dict(zip(("mixup", "cutmix", "random_erasing"), on, strict=True))
        said["randaugment"] = drawn
    return said


def _strengths(preset: Preset) -> list[float]:
    return [preset.mixup, preset.cutmix, preset.erase]


def _started(whole: Values, before: list[str], last: str) -> dict[str, Any]:
    """Return `start` and `pretrain_epochs`, where they are one of the tables'."""
    init = whole.init
    if (whole[last].start, whole[last].stem, whole[last].head) != (None, "keep", "keep"):
        return {}
    if not init.weights:
        return {} if before else {"start": "random"}
    (published,) = tables.tables("revisiting_at", "table_2")
    for row in published.rows:
        if row.get("robustbench") == init.weights and not before and init.stem == init.head:
            return {"start": "robust-4/255", "start_epochs": row["epochs"]}
    if init.weights not in _clean(whole.model.name) or init.head != "keep":
        return {}
    if not before:
        return {"start": "clean" if init.stem == "keep" else "fresh-stem"}
    first = whole[before[0]]
    if len(before) > 1 or first.objective != "clean" or first.changes or init.stem != "fresh":
        return {}
    return {"start": "clean+stem", "pretrain_epochs": first.epochs}


def _clean(model: str) -> list[str]:
    """Return the names of the weights of Table 18, where the main paper's networks start."""
    (names,) = tables.tables("revisiting_at", "table_18")
    own = [row for row in names.rows if row["model"] == model.removesuffix("_cvst")]
    timm = [row["timm"] for row in own if "timm" in row]
    meta = "https://dl.fbaipublicfiles.com/convnext/{}.pth"
    return [
        *timm,
        *(f"{name}.fb_in1k" for name in timm if "." not in name),  # timm's own default
        *(meta.format(row["meta"]) for row in own if "meta" in row),
    ]


def _dataset(name: Any, classes: Any) -> str | None:
    plain = str(name).removeprefix("tfds:").partition(":")[0]
    if plain == "imagenet2012" and classes:
        return "imagenet100" if classes == "imagenet100" else None
    return None if classes else plain


# --- What differs ---


def differences(table: Table, row: dict[str, Any], key: str, ours: Ours) -> list[str]:
    """Return all that is in the way of a record as the measurement of one value of a table.

    Empty: it is that measurement.
    """
    what = table.results[key]
    return [
        *_other_network(table, row, ours),
        *_other_images(row, ours.record),
        *other_attack(what, ours.record),
    ]


def _other_network(table: Table, row: dict[str, Any], ours: Ours) -> Iterator[str]:
    config = ours.config
    if config is None:
        yield "no config beside the record proves which network it is"
        return
    imported = "architecture" in config
    model = config if imported else config.get("model", {})
    name = model["architecture"] if imported else model.get("name")
    if name != row.get("model"):
        yield f"network {name}, not {row.get('model') or row['name']}"
    size = (ours.record.get("model") or model).get("image_size")
    if size != row["image_size"]:
        yield f"{size} px, not {row['image_size']}"
    if imported:
        if not row.get("robustbench") or config.get("published_id") != row["robustbench"]:
            yield "weights that are not those of the row"
    elif row.get("origin") != "authors":
        yield f"a network of our own training, and the row's is of {row.get('origin')}"
    else:
        yield from other_training(table, row, config)
        of, last = str(ours.record.get("weights")).partition(",")[0], phases(_whole(config))[-1]
        if of != last:
            yield f"weights of the phase {of}, not of the last"


def other_training(table: Table, row: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """Say what of a run's training is not that of a row."""
    said, wanted = trained(config), tables.settings(table, row)
    needed = _NEEDED + (() if wanted.get("objective") == "clean" else _ATTACKED)
    for key in dict.fromkeys((*needed, *wanted)):
        if key not in wanted:
            yield f"the paper does not say its {key}"
        elif wanted[key] is None and key == "augmentation":  # told one by one: mixup, cutmix, ...
            continue
        elif not _equal(said.get(key), wanted[key]):
            yield f"{key} {_shown(said.get(key))}, not {_shown(wanted[key])}"
    if said.get("norm_train", "linf") != "linf":
        yield f"trained in {said['norm_train']}, not linf"
    if table.paper == "revisiting_at":
        yield from _other_recipe(said, wanted, config)


def _other_recipe(
    said: dict[str, Any], wanted: dict[str, Any], config: dict[str, Any]
) -> Iterator[str]:
    """Say where a run leaves the main paper's recipe in what its tables do not repeat."""
    recipe = plain(phase()) | {"label_smoothing": 0.0}
    if preset := PRESETS.get(str(wanted.get("augmentation"))):
        recipe["label_smoothing"] = preset.label_smoothing
    if wanted.get("epochs") in (250, 300):
        recipe["warmup_epochs"] = 20
    for key in (*_RECIPE, "label_smoothing"):
        if key not in wanted and not _equal(said.get(key), recipe[key]):
            yield f"{key} {_shown(said.get(key))}, not {_shown(recipe[key])}"
    whole = _whole(config)
    seen, usual = of_phase(whole, phases(whole)[-1]), base()
    if own := sorted(seen.model.options.keys() - _NEUTRAL):
        yield f"model.options.{own[0]} is set"
    if said["objective"] != "clean":
        for key in ("relative_step", "step_size", "start", "labels", "statistics"):
            if seen.attack[key] != usual.attack[key]:
                yield f"attack.{key} {_shown(seen.attack[key])}, not {_shown(usual.attack[key])}"


def _other_images(row: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    on_list = str(row["split"]).endswith("@robustbench")
    same = record.get("ids_sha256") == ROBUSTBENCH_SHA256
    name = _dataset(record["dataset"], None)
    listed = on_list and same  # a list of ImageNet's files, wherever they lie
    if row["dataset"] == "imagenet100":
        own = hashes.classes_sha256(imagenet.imagenet100())
        if name != "imagenet2012" or record.get("classes_sha256") != own:
            yield f"{record['dataset']} with other classes than imagenet100"
    elif not (name == row["dataset"] or listed):
        yield f"{record['dataset']}, not {row['dataset']}"
    if on_list and not same:
        yield f"split {record['split']}, not RobustBench's list of images"
    elif not on_list and record["split"] != row["split"]:
        yield f"split {record['split']}, not {row['split']}"
    images = row["images"]
    if images is None:
        yield "the paper does not say on how many images"
    elif record["image_ids"] != f"0..{images - 1}":
        yield f"images {record['image_ids']}, not all {images}"
    if record.get("damaged"):
        yield f"{len(record['damaged'])} damaged images are left out"


def other_attack(what: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    """Say what of a record's attack is not that of a result."""
    kind = what["attack"]
    if kind == "clean":  # every record has it
        return
    attacks = record["attacks"]
    if not attacks or record["robust"] is None:
        yield "clean accuracy only"
        return
    for attack in attacks:
        if attack["norm"] != what.get("norm"):
            yield f"{attack['norm']}, not {what.get('norm')}"
        elif not _equal(attack["epsilon"], what["epsilon"]):
            yield f"{attack['norm']} {attack['epsilon']:.4g}, not {what['epsilon']}"
        else:
            continue
        break
    settings = {(a["name"], a["steps"], a.get("restarts", 1), a.get("targets", 0)) for a in attacks}
    if kind == "autoattack":
        if settings != _STANDARD:
            yield "another attack than standard AutoAttack"
    elif kind == "apgd-ce" and "restarts" in what:
        if settings != {("apgd-ce", what["steps"], what["restarts"], 0)}:
            yield f"another attack than APGD-CE, {what['steps']} steps, {what['restarts']} restarts"
    else:
        yield f"the paper does not say the settings of its {kind}"


def _equal(one: Any, other: Any) -> bool:
    try:
        numbers = [float(tables.radius(x) if isinstance(x, str) else x) for x in (one, other)]
        return math.isclose(*numbers, rel_tol=1e-9)
    except (TypeError, ValueError):
        return one == other and one is not None


def _shown(value: Any) -> str:
    return (
        "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"
    )


def measured(what: dict[str, Any], record: dict[str, Any]) -> float | None:
    """Return the percentage that a record has for a result of a table."""
    value = record["clean"] if what["attack"] == "clean" else record["robust"]
    return None if value is None else 100 * value


def label(ours: Ours) -> str:
    """Return the name of what a record measures, for people."""
    record, config = ours.record, ours.config or {}
    model = record.get("model") or config.get("model") or {"name": config.get("architecture")}
    weights = re.sub(r", (ema|raw)$", "", str(record.get("weights")))
    return f"{model['name'] or 'a network'} ({weights})"


def sizes(ours: Ours) -> dict[str, float]:
    """Return the parameters and multiply-adds of a record's network, in the tables' units."""
    config, record = ours.config or {}, ours.record
    model = record.get("model") or config.get("model") or config
    name = model.get("name") or model.get("architecture")
    classes, size = model.get("num_classes"), model.get("image_size")
    if record.get("function") or not (name and classes and size):
        return {}
    import jax

    from jaxrobust.config import Network
    from jaxrobust.models.table import multiply_adds

    channels = model.get("in_channels") or 3
    net = Network(name, classes, size, channels, model["options"] or {}).create(dtype="float32")
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    adds = multiply_adds(net, params, stats, image_size=size, in_channels=channels)
    return {"params_m": sum(a.size for a in params.values()) / 1e6, "macs_g": adds / 1e9}
