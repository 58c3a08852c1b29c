"""The study of residual networks in our words: its networks, its two recipes, its PGD and CW.

Its tables name networks by blocks and sizes, and leave the settings to the released code. Facts:
Huang et al. 2022 (arXiv 2212.11005) and zhichao-lu/robust-residual-network 8c6d2c2.
"""

from typing import Any

PAPER = "robust_resnets"
NOTE = (
    "epochs, start, augmentation, attack of training and the steps of PGD and CW are those of the "
    "authors' code, not of the paper; two of its recipes are BAT and AAT."
)
# Name of a row -> our network, where it is not that name in small letters with _ for -.
_NETWORKS = {
    "RobNet-large-v2": "robnet_large_v2",
    "AdvRush (7@96)": "advrush_7_96",
    "RACL (7@104)": "racl_7_104",
    "RobustResNet with 500 thousand more images": "robustresnet_a1",
}
# block and se of a row -> options of the network that the ablations start from.
_ABLATED = "wrn_70_16"
_RAW: dict[str, Any] = {"first_conv": "raw"}  # as the released code
_BLOCKS: dict[str, dict[str, Any]] = {
    "basic": {},
    "bottleneck": {"block": "bottleneck"} | _RAW,
    "bottleneck+aggregated": {"block": "aggregated"} | _RAW,
    "bottleneck+aggregated+hierarchical": {"block": "hierarchical"} | _RAW,
    "bottleneck+aggregated+hierarchical+residual-se": {"block": "hierarchical", "se": "residual"}
    | _RAW,
}
_SE = {"after-3x3": "conv3x3"}  # the paper's word -> ours, where they are not one
_SMOOTH = {"activation": "silu"}  # of AAT, in the command of the README
_AUGMENTATION = {"cifar10": "crop-flip", "cifar100": "crop-flip-rotate"}
_TRAINING: dict[str, Any] = {"start": "random", "train_attack": "pgd", "attack_steps": 10}
_OF_RECIPE: dict[str, dict[str, Any]] = {"BAT": {"epochs": 100}, "AAT": {"epochs": 400}}
_MORE_IMAGES = {"synthetic_share": 0.7}  # of a batch, with 500 thousand images from outside
_ATTACKS = {
    "pgd-20": {"name": "pgd", "steps": 20, "step_size": 0.8 / 255, "start": "uniform"},
    "cw-40": {"name": "cw", "steps": 40, "step_size": 0.8 / 255, "start": "uniform"},
}
# What a recipe says beyond the words of the tables; keys of the last phase, or of its attack.
RECIPES: dict[str, dict[str, Any]] = {
    "BAT": {
        **{"optimizer": "sgd", "schedule": "step", "lr": 0.1, "lr_steps": (75, 90)},
        **{"batch_size": 128, "weight_decay": 2e-4, "clip_norm": 5.0, "trades_beta": 6.0},
        **{"attack.relative_step": 0.25, "attack.start": "gauss", "attack.start_std": 0.001},
    },
    "AAT": {
        **{"optimizer": "sgd", "nesterov": True, "schedule": "one-cycle", "lr": 0.4},
        **{"batch_size": 1024, "weight_decay": 5e-4, "trades_beta": 6.0, "ema_decay": 0.995},
        **{"bn_statistics": "adversarial", "attack.relative_step": 0.25},
        **{"attack.start": "uniform-boxed", "attack.statistics": "batch"},
    },
}


def row(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its network and with what the code says of its training."""
    if "recipe" not in raw:  # the four sizes, and other figures of the text
        return raw
    own = _TRAINING | _OF_RECIPE[raw["recipe"]]
    own |= {"augmentation": _AUGMENTATION[raw["train_dataset"]], "train_size": 32}
    own |= _MORE_IMAGES if raw.get("extra_images") else {}
    return own | raw | network(raw)


def network(raw: dict[str, Any]) -> dict[str, Any]:
    """Return model and options of a row; model is None where the paper does not say which."""
    if "block" in raw:
        se = raw.get("se", "none")
        own = {} if se == "none" else {"se": _SE.get(se, se), "se_reduction": raw["se_reduction"]}
        return {"model": _ABLATED, "options": _BLOCKS[raw["block"]] | own}
    if raw.get("extra_images") == 0:
        return {"model": None}
    name = raw["name"]
    options = _SMOOTH if raw["recipe"] == "AAT" else {}
    return {"model": _NETWORKS.get(name, name.lower().replace("-", "_")), "options": options}


def results(raw: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the results of a table with the settings of PGD and CW."""
    return {key: what | _ATTACKS.get(what.get("attack", ""), {}) for key, what in raw.items()}
