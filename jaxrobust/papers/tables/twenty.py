"""The study of twenty architectures in our words: which networks its rows are, and which attacks.

Its paper leaves out what its repository has: steps, their length and starts of PGD, and how long
was trained. Facts: Tang et al. 2022 (arXiv 2209.14105) and DIG-Beihang/RobustART.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrobust.evaluation.records.record import AccuracyRecord

PAPER = "twenty_architectures"
NOTE = (
    "epochs, start, augmentation and attack_steps are those of the authors' repository, not of the "
    "paper; of ImageNette the usual 3,925 validation images are taken, where the paper's clean "
    "accuracies fit 3,798."
)
# Name of a row -> our network at 32 px, where it is not cifar_ and that name. That of ImageNette
# has _224 behind it, unless it is in `_LARGE`: the paper does not define those; they are standard.
_NETWORKS = {
    "MLP-Mixer": "cifar_mixer",
    "Swin Transformer": "cifar_swin",
    "PVTv2": "cifar_pvt_v2",
    "BoTNet": "cifar_botnet50",
    "VGG": "cifar_vgg16",
    "WideResNet": "cifar_wrn_40_10",
    "PreActResNet": "cifar_preactresnet50",
    "ResNet": "cifar_resnet50",
    "ResNeXt": "cifar_resnext29",
}
_LARGE = {"ResNet": "resnet50", "ResNeXt": "cifar_resnext50_224", "WideResNet": "wide_resnet50_2"}
# Keys of a row that are options of its network.
_OPTIONS = {"stages": "order", "patch": "patch"}
# Of each norm: what the repository runs, foolbox in linf and l2 and ART in l1.
_PGD = {"name": "pgd", "steps": 20, "relative_step": 1.5}
_STARTS: dict[str, dict[str, Any]] = {
    "linf": {"start": "uniform-boxed"},
    "l2": {"start": "uniform-boxed"},
    "l1": {"start": "random", "l1_rule": "art"},
}
# Of the repository's training, where a row is silent.
_TRAINING: dict[str, Any] = {"start": "random", "epochs": 100}
_STEPS = {"attack_steps": 15}
# What its scripts say of every network, beyond the words of the tables; as in `residual`.
RECIPE: dict[str, Any] = {
    **{"optimizer": "adamw", "schedule": "late-cosine", "lr": 2.5e-4, "warmup_epochs": 8},
    **{"batch_size": 128, "weight_decay": 0.05, "decay_mask": "all", "ema_decay": 0.0, "l1": 0.0},
    **{"attack.relative_step": 0.1, "attack.start": "uniform-boxed"},
}
_OF_DATA: dict[str, dict[str, Any]] = {
    "cifar10": {"augmentation": "robustart"},
    "imagenette": {"augmentation": "robustart-imagenet", "split": "val", "images": 3925},
}


def row(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its network and with what the repository says of its training."""
    from jaxrobust.training.update import objectives  # which imports JAX

    name = raw["name"].partition("-")[0] if "stages" in raw else raw["name"]
    model = _NETWORKS.get(name, f"cifar_{name.lower()}")
    if raw["image_size"] != 32:
        model = _LARGE.get(name, f"{model}_224")
    own = {option: raw[key] for key, option in _OPTIONS.items() if raw.get(key) is not None}
    more = _TRAINING | (_STEPS if objectives.named(raw["objective"]).attacks else {})
    more |= _OF_DATA[raw["train_dataset"]]
    return raw | more | {"model": model, "options": own}


def results(raw: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the results of a table with the settings of PGD, and what the worst case is of."""
    made = dict(raw)
    for key, what in raw.items():
        if what.get("attack") == "pgd":
            made[key] = what | _PGD | _STARTS[what["norm"]]
    unions = {key: what["of"] for key, what in raw.items() if "of" in what}
    return made | {k: made[k] | {"members": [made[m] for m in of]} for k, of in unions.items()}


def pgd(what: Mapping[str, Any]) -> tuple[Any, ...]:
    """Select the settings that tell one PGD from another, of a result or of a record."""
    steps, epsilon = what["steps"], float(Fraction(what["epsilon"]))
    length = what.get("step_size")
    if length is None:
        length = what["relative_step"] * epsilon / steps
    rule = what.get("l1_rule") or "sparse"
    return what["norm"], round(epsilon, 9), steps, round(length, 9), what["start"], rule


def other_corruptions(dataset: str | None, record: "AccuracyRecord") -> Iterator[str]:
    """Say what is not the mean of all 75 corruptions, of published files where there are some."""
    measured = record.corruptions
    if measured is None:
        yield "no corruptions"
        return
    count = sum(len(row) for row in measured["accuracy"].values())
    if count != 75:
        yield f"{count} corruptions, not 75"
    if dataset == "cifar10" and measured["images"] != "files":
        yield "computed corruptions, not the files of CIFAR-10-C"
