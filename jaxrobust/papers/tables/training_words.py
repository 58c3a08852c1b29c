"""What a run's config says of its training in the words of the tables, and what differs."""

import functools
import json
import runpy
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from jaxrobust.attacks import registry
from jaxrobust.config import Config, ModelSection, Values, base, of_phase, phases, plain
from jaxrobust.data.imagenet import IMAGENETTE
from jaxrobust.data.transforms.presets import PRESETS, Preset
from jaxrobust.papers.tables import code_facts, residual, tables, twenty
from jaxrobust.papers.tables.tables import Table
from jaxrobust.results.run_records import whole_config
from jaxrobust.runtime.commandline.arguments import RECIPES
from jaxrobust.training.update import objectives
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained.start_run import imported_from

# The authors' clean weights, where the networks of appendix C.3 start.
INTERNIMAGE = "https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_t_1k_224.pth"
# Of the phase that trains last: where a row is silent, the paper's recipe, config.base(), counts.
_RECIPE = ("lr", "warmup_epochs", "final_lr", "weight_decay", "b2", "ema_decay", "trades_beta")
_NEUTRAL = {"scan", "bn_group"}  # of model.options: they change no result of networks without BN
_NEEDED = ("objective", "augmentation", "start", "epochs", "train_dataset", "train_size")
_STEM = ("stem_widths", "stem_strides", "stem_kernels")  # of model.options: a stem's design
# What a new stem's clean phase may have of its own: what is done to the images and labels.
_OF_IMAGES = {"data", "augmentation", "mixup", "erase", "label_smoothing"}
_ATTACKED = ("train_attack", "attack_steps", "epsilon_train")
# Which are options of it, see `matching`, or said by others: a recipe, a share of more images.
_OF_NETWORK = ("stages", "patch", "depth", "block", "se", "se_reduction", "recipe", "extra_images")
# Chains without mixing and erasing that the tables have a word for, and that are no preset of it.
_CHAINS = {
    "resized-crop|flip|randaugment": "randaugment",
    "crop|flip|randaugment": "randaugment",
    "crop|flip": "crop-flip",
    "crop|flip|rotate(20)": "crop-flip-rotate",
}
_NEAR = 0.1  # a batch of so much more or less than a paper's is its batch, which devices divide
_KNOWN = ("basic", "light", "heavy", "light-cifar-thesis", "robustart", "robustart-imagenet")
# Hash of the names of classes in the order of labels -> the tables' name of a data set.
_CLASSES = {hashes.classes_sha256(IMAGENETTE): "imagenette"}


@functools.cache
def _published() -> dict[str, Any]:
    return runpy.run_path(str(RECIPES / "revisiting_at.py"))


@functools.cache
def _recipe() -> Values:
    return json.loads(json.dumps(plain(base())), object_hook=Values)


def trained(config: dict[str, Any], started: dict[str, Any] | None = None) -> dict[str, Any]:
    """Describe the last phase of a run by its config; unknown entries are missing.

    `started`: the config of the run, or of the imported folder, whose weights it started from, if
    that is known.
    """
    whole = whole_config(config)
    *before, last = phases(whole)
    seen, own = of_phase(whole, last), whole[last]
    training = {key: own[key] for key in (*_RECIPE, "objective", "epochs", "batch_size")}
    training |= {"train_dataset": dataset(seen.data.name, seen.data.classes)}
    training |= {"train_size": seen.model.image_size, **_augmented(seen)}
    if seen.data.views != 1:
        training["repeated_augmentation"] = seen.data.views
    if seen.data.extra:
        training["synthetic_share"] = seen.data.extra_share
    if design := _design(seen.model):
        training["design"] = design
    if objectives.named(own.objective).attacks:
        attack = seen.attack
        training["train_attack"] = attack.name
        training["attack_steps"] = registry.steps(attack.name, attack.steps)
        training |= {"epsilon_train": attack.epsilon, "norm_train": attack.norm}
        training["epsilon_warmup_epochs"] = attack.get("warmup_epochs") or 0
    return training | _started(whole, before, last, started)


def _design(model: ModelSection) -> str | None:
    made = tuple(tuple(model.options.get(key, ())) for key in _STEM)
    stems = _published()["STEMS"].items()
    return next((name for (net, name), stem in stems if (net, stem) == (model.name, made)), None)


def _augmented(seen: Config) -> dict[str, Any]:
    preset = PRESETS.get(seen.data.augmentation, Preset(seen.data.augmentation))
    strengths = [seen.mixup.mixup, seen.mixup.cutmix, seen.erase.probability]
    given = [u if s is None else s for s, u in zip(strengths, _strengths(preset), strict=True)]
    smoothing = preset.label_smoothing if seen.label_smoothing is None else seen.label_smoothing
    entries: dict[str, Any] = {"label_smoothing": smoothing}
    known = [(name, PRESETS[name]) for name in _KNOWN]
    known += [(name, Preset(chain)) for chain, name in _CHAINS.items()]
    names = [n for n, p in known if [p.chain, *_strengths(p)] == [preset.chain, *given]]
    if names:  # all of DeiT's is heavy but for the noise that fills what is erased
        erased = names[0] == "heavy" and seen.erase.noise == "truncated"
        entries["augmentation"] = "deit" if erased else names[0]
    drawn = preset.chain == PRESETS["heavy"].chain
    on = [g > 0 for g in given]
    whole = [u * bool(g) for g, u in zip(given, _strengths(PRESETS["heavy"]), strict=True)] == given
    if whole and (drawn or preset.chain == PRESETS["light"].chain):
        entries |= dict(zip(("mixup", "cutmix", "random_erasing"), on, strict=True))
        entries["randaugment"] = drawn
    return entries


def _strengths(preset: Preset) -> list[float]:
    return [preset.mixup, preset.cutmix, preset.erase]


def _started(
    whole: Values, before: list[str], last: str, started: dict[str, Any] | None
) -> dict[str, Any]:
    init = whole.init
    if (whole[last].start, whole[last].stem, whole[last].head) != (None, "keep", "keep"):
        return {}
    if started is not None and "architecture" not in started:
        return _by_run(whole, started) if not before and init.stem == "keep" else {}
    if not init.weights:
        return {} if before else {"start": "random"}
    named = init.weights if started is None else imported_from(started)
    if named is None:
        return {}
    (published,) = tables.tables("revisiting_at", "table_2")
    for row in published.rows:
        if row.get("robustbench") == named and not before and init.stem == init.head:
            return {"start": "robust-4/255", "start_epochs": row["epochs"]}
    return _from_clean(whole, before, named) if init.head == "keep" else {}


def _from_clean(whole: Values, before: list[str], named: str) -> dict[str, Any]:
    """Describe a start from clean weights that the papers name, perhaps with a new stem."""
    init, networks = whole.init, _published()["NETWORKS"]
    if whole.model.name in networks and named == networks[whole.model.name].large:
        return {} if before else {"start": "clean-21k"}
    if named not in clean_weights(whole.model.name):
        return {}
    if not before:
        return {"start": "clean" if init.stem == "keep" else "fresh-stem"}
    first = whole[before[0]]
    if len(before) > 1 or objectives.named(first.objective).attacks or init.stem != "fresh":
        return {}
    own = {**first.changes, **first.changes.get("data", {})}
    if own.keys() - _OF_IMAGES:
        return {}
    start = _clean_start(_augmented(of_phase(whole, before[0])))
    return {"start": start, "pretrain_epochs": first.epochs}


def _by_run(whole: Values, started: dict[str, Any]) -> dict[str, Any]:
    """Describe a start from the weights of another run, by what is known of that one."""
    first = trained(started)
    if whole_config(started).model.name != whole.model.name:
        return {}
    if first.get("train_dataset") != "imagenet2012":
        return {}
    if objectives.named(first["objective"]).attacks:
        radius = Fraction(first["epsilon_train"] * 255).limit_denominator(1000)
        if first["norm_train"] != "linf" or first["objective"] != "adversarial":
            return {}
        start = {"start": f"robust-{radius}/255", "start_epochs": first["epochs"]}
        return start | {"start_origin": "authors"}
    if first.get("start") != "fresh-stem":
        return {}
    return {"start": _clean_start(first), "pretrain_epochs": first["epochs"]}


def _clean_start(of_images: dict[str, Any]) -> str:
    """Return the tables' word for a new stem's clean epochs (A.1), or what they had instead."""
    usual = {"augmentation": "heavy", "label_smoothing": PRESETS["heavy"].label_smoothing}
    other = [k for k, value in usual.items() if not tables.same(of_images.get(k), value)]
    if not other:
        return "clean+stem"
    return f"clean+stem after {', '.join(f'{k} {tables.shown(of_images.get(k))}' for k in other)}"


def clean_weights(model: str) -> list[str]:
    """Return the names of the weights of Table 18, or of C.3, where the paper's networks start."""
    if model.removesuffix("_ps") == "internimage_t":
        return [INTERNIMAGE]
    (names,) = tables.tables("revisiting_at", "table_18")
    own = [row for row in names.rows if row["model"] == model.removesuffix("_cvst")]
    timm = [row["timm"] for row in own if "timm" in row]
    meta = "https://dl.fbaipublicfiles.com/convnext/{}.pth"
    usual = [f"{name}.fb_in1k" for name in timm if "." not in name]  # timm's own default
    return [*timm, *usual, *(meta.format(row["meta"]) for row in own if "meta" in row)]


def of_classes(classes_sha256: str | None) -> str | None:
    """Return the tables' name of the data set that has these classes, of class folders anywhere."""
    return _CLASSES.get(classes_sha256)


def dataset(name: Any, classes: Any) -> str | None:
    """Return the tables' name of a data set, or of some of its classes; None: it has none."""
    plain = str(name).removeprefix("tfds:").partition(":")[0]
    if plain == "imagenet2012" and classes:
        return "imagenet100" if classes == "imagenet100" else None
    return None if classes else plain


def differences(
    table: Table, row: dict[str, Any], config: dict[str, Any], started: dict[str, Any] | None = None
) -> Iterator[str]:
    """Say what of a run's training is not that of a row; `started`: see `trained`."""
    ours, wanted = trained(config, started), tables.settings(table, row)
    objective = wanted.get("objective")
    attacked = objective is None or objectives.named(objective).attacks
    needed = (*_NEEDED, *_ATTACKED) if attacked else _NEEDED
    more = [key for key in ("repeated_augmentation", "synthetic_share", "design") if key in ours]
    yield from (f"{key} {tables.shown(ours[key])}" for key in more if key not in wanted)
    for key in dict.fromkeys((*needed, *wanted)):
        if key in _OF_NETWORK:
            continue
        if key not in wanted:
            yield f"the paper does not say its {key}"
        elif wanted[key] is None and key == "augmentation":  # told one by one: mixup, cutmix, ...
            continue
        else:
            yield from _unlike(key, ours, wanted)
    known, how = _normalisations(table, row, wanted), whole_config(config).init.normalize
    if how not in known:
        yield f"init.normalize {how}, not {known[0]}"
    if ours.get("norm_train", "linf") != "linf":
        yield f"trained in {ours['norm_train']}, not linf"
    if table.paper == "revisiting_at":
        yield from _other_recipe(ours, wanted, config, row.get("options", {}))
    yield from _other_settings(_recipe_of(table, wanted, attacked), whole_config(config))


def _recipe_of(table: Table, wanted: dict[str, Any], attacked: bool) -> Mapping[str, Any]:
    """Return keys of the last phase, or of its attack, as the code of a study sets them."""
    known = {twenty.PAPER: twenty.RECIPE, "xcit_light_recipe": code_facts.LIGHT}
    known |= {residual.PAPER: residual.RECIPES.get(str(wanted.get("recipe")), {})}
    recipe = known.get(table.paper, {})  # of the main paper see `_other_recipe`
    return {k: value for k, value in recipe.items() if attacked or not k.startswith("attack.")}


def _other_settings(recipe: Mapping[str, Any], whole: Values) -> Iterator[str]:
    last = whole[phases(whole)[-1]]
    for key, value in recipe.items():
        ours = (whole.attack if key.startswith("attack.") else last)[key.removeprefix("attack.")]
        value = list(value) if isinstance(value, tuple) else value
        if ours != value and not tables.same(ours, value):
            yield f"{key} {tables.shown(ours)}, not {tables.shown(value)}"


def _unlike(key: str, ours: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    if key == "batch_size" and abs(ours[key] / wanted[key] - 1) < _NEAR:
        return
    if not tables.same(ours.get(key), wanted[key]):
        yield f"{key} {tables.shown(ours.get(key))}, not {tables.shown(wanted[key])}"


_RAW = ("keep", "none")  # of weights that hold no mean and std, as networks of [0, 1] images do


def _normalisations(table: Table, row: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, ...]:
    """Return the values of `init.normalize` with which a network is that of a row.

    The main paper does not say whether its PatchStems normalise as the clean weights do.
    """
    data, model = str(wanted.get("train_dataset")), str(row.get("model"))
    if table.paper == "revisiting_at":
        if model in _published()["NORMALISED"]:
            kept = str(wanted.get("start")).startswith("robust-")  # with the weights' own
            return ("imagenet", "keep") if kept else ("imagenet",)
        return _RAW if model.endswith("_cvst") else (*_RAW, "imagenet")
    if table.paper == "robust_resnets":
        return (data,) if wanted.get("recipe") == "AAT" else _RAW
    if table.paper == twenty.PAPER:
        return ("cifar10-robustart",) if data.startswith("cifar") else ("imagenet",)
    if data.startswith("cifar"):
        return (data,)
    fine_tuned = data in ("caltech101", "oxford_flowers102")
    return ("half",) if fine_tuned or model.startswith("resnet") else _RAW


_KIND = ("objective", "train_dataset", "train_size", "train_attack", "epsilon_train")


def other_kind(
    table: Table, row: dict[str, Any], config: dict[str, Any], started: dict[str, Any] | None = None
) -> Iterator[str]:
    """Say where a run is of another objective, radius, data set or size than a row."""
    ours, wanted = trained(config, started), tables.settings(table, row)
    for key in _KIND:
        if key in wanted:
            yield from _unlike(key, ours, wanted)


def _other_recipe(
    ours: Any, wanted: Any, config: dict[str, Any], options: Mapping[str, Any]
) -> Iterator[str]:
    recipe = _recipe().train | {"label_smoothing": 0.0}
    if preset := PRESETS.get(str(wanted.get("augmentation"))):
        recipe["label_smoothing"] = preset.label_smoothing
    if wanted.get("epochs") in (250, 300):
        recipe["warmup_epochs"] = 20
    for key in (*_RECIPE, "label_smoothing"):
        if key not in wanted:
            yield from _unlike(key, ours, recipe)
    whole = whole_config(config)
    seen, usual = of_phase(whole, phases(whole)[-1]), _recipe()
    stem = set(_STEM) if "design" in ours else set()
    if own := sorted(seen.model.options.keys() - _NEUTRAL - stem - options.keys()):
        yield f"model.options.{own[0]} is set"
    if objectives.named(ours["objective"]).attacks:
        for key in ("relative_step", "step_size", "start", "labels", "statistics"):
            one, other = seen.attack[key], usual.attack[key]
            if one != other:
                yield f"attack.{key} {tables.shown(one)}, not {tables.shown(other)}"
