"""Baseline adversarial training of residual networks at 32 and 64 px (Huang et al. 2022, arXiv
2212.11005, "Revisiting Residual Networks for Adversarial Robustness").

    jaxrobust train --config configs/cifar_bat.py:robustresnet_a1,objective=mart

The arguments are a network and then, with their defaults first,

    objective=trades|adversarial|mart  beta is 6; adversarial is their SAT
    data=cifar10|cifar100|tiny         tiny: Tiny-ImageNet, class folders under tiny-imagenet-200/
                                       train and val (--config.data.name=folder:PATH); 64 px
    selection=held-out|test            which images choose the epoch: the last 1,000 of training, or
                                       those that are reported, as the paper does; of tiny test only
    block=basic|bottleneck|inverted|aggregated|hierarchical, se=none|standard|conv3x3|identity|
    residual, se_reduction=64|16       of a wrn_*: the parts of the paper's study of blocks (Table 1
                                       and Figure 5d are wrn_70_16; hierarchical and residual are
                                       the RobustResBlock)
    preact=yes|no, residual=yes|no     of a wrn_*: norm and activation before each convolution or
                                       behind it, and whether blocks have a shortcut
    depths=4-4-4, widths=10-10-10      of a wrn_*: blocks and width of each stage, as `jaxrobust
                                       scaling --study depth` and width list them
    kernel_size=3, scales=8, groups=4, base_width=10
                                       of a wrn_*: its 3x3 convolutions, the parts of a hierarchical
                                       block, and the cardinality, with channels per group (the
                                       studies kernel, scales and cardinality)
    activation=...                     of the residual networks, such as silu; default: relu
    weight_decay=0.0002|0.0001|0.0005, decay=all|not-bn-named
                                       what decays, and how much (the study activation)

A network is robustresnet_a1 to _a4, wrn_a1 to _a4, wrn_28_10, wrn_34_12, wrn_46_14, wrn_70_16 or
wrn_34_r, one of the searched ones (robnet_large_v2, advrush_7_96, racl_7_104), resnet18 or
resnet50. The attack sees running statistics. A record says whether the epoch was chosen on the
images reported.

Keys that are not defaults, by `jaxrobust why configs/cifar_bat.py:robustresnet_a1`:

    model.name            "robustresnet_a1": Table 2
    model.num_classes     10: ours: as in the data set
    model.image_size      32: Table 2; authors' code for Tiny-ImageNet
    init.normalize        "none": authors' code: raw pixels
    data.name             "cifar10": Table 2; authors' code for Tiny-ImageNet
    data.train_split      "train[:49000]": ours: the last 1,000 training images choose the epoch;
          authors' code, with selection=test: the reported images
    data.selection_split  "train[49000:]": ours: the last 1,000 training images choose the epoch;
          authors' code, with selection=test: the reported images
    data.test_split       "test": ours: the last 1,000 training images choose the epoch; authors'
          code, with selection=test: the reported images
    data.augmentation     "crop|flip": authors' code: crops and flips, and rotations for CIFAR-100
    train.objective       "trades": Table 2: TRADES; authors' code: the others
    train.epochs          100: authors' code: 100
    train.batch_size      128: authors' code: 128
    train.lr              0.1: authors' code: 0.1
    train.schedule        "step": authors' code: divided by ten at two epochs
    train.warmup_epochs   0: authors' code: none
    train.lr_steps        [75, 90]: authors' code: 75 and 90
    train.optimizer       "sgd": authors' code: SGD with momentum 0.9
    train.weight_decay    0.0002: authors' code: 2e-4; the paper's study of activations: 1e-4 to
          5e-4
    train.decay_mask      "all": authors' code: on all parameters; the paper, for smooth
          activations: not on batch norms
    train.clip_norm       5.0: authors' code: 5
    train.ema_decay       0.0: authors' code: no averaging
    attack.name           "pgd": authors' code: PGD
    attack.epsilon        0.03137254901960784: authors' code: 8/255
    attack.steps          10: authors' code: 10
    attack.relative_step  0.25: authors' code: 2/255
    attack.start          "gauss": authors' code: normal noise on the image
    attack.start_std      0.001: authors' code: 0.001 for TRADES, one step for the others
    evaluation.attack     "pgd-20": authors' code: PGD-20 chooses the epoch; theirs only from the
          50th on
    evaluation.step_size  0.0031372549019607846: authors' code: 0.8/255
    evaluation.start      "uniform": authors' code: uniform noise
    evaluation.weights    "raw": authors' code: no averaging

Published with TRADES and selection=test, in % (clean, PGD-20, CW-40, AutoAttack; three runs):

                        cifar10                       cifar100
    wrn_28_10           84.62, 55.90, 53.15, 51.66    56.30, 29.91, 26.22, 25.26
    robnet_large_v2     84.57, 52.79, 48.94, 47.48    55.27, 29.23, 24.63, 23.69
    advrush_7_96        84.95, 56.99, 53.27, 52.90    56.40, 30.40, 26.16, 25.27
    racl_7_104          83.91, 55.98, 53.22, 51.37    56.09, 30.38, 26.65, 25.65
    robustresnet_a1     85.46, 58.74, 55.72, 54.42    59.34, 32.70, 27.76, 26.75
    wrn_34_12           84.93, 56.01, 53.53, 51.97    56.08, 29.87, 26.51, 25.47
    wrn_34_r            85.80, 57.35, 54.77, 53.23    58.78, 31.17, 27.33, 26.31
    robustresnet_a2     85.80, 59.72, 56.74, 55.49    59.38, 33.00, 28.71, 27.68
    wrn_46_14           85.22, 56.37, 54.19, 52.63    56.78, 30.03, 27.27, 26.28
    robustresnet_a3     86.79, 60.10, 57.29, 55.84    60.16, 33.59, 29.58, 28.48
    wrn_70_16           85.51, 56.78, 54.52, 52.80    56.93, 29.76, 27.20, 26.12
    robustresnet_a4     87.10, 60.26, 57.90, 56.29    61.66, 34.25, 30.04, 29.00

and on cifar10 with the other two (PGD-20, CW-40):

                        adversarial    mart
    wrn_28_10           52.44, 50.97   57.69, 52.88
    robustresnet_a1     57.62, 56.06   59.34, 54.42
    wrn_34_12           52.85, 51.36   57.40, 53.11
    robustresnet_a2     58.39, 56.99   60.33, 55.51
    wrn_46_14           53.67, 52.95   58.43, 54.32
    robustresnet_a3     58.81, 57.60   60.95, 56.52
    wrn_70_16           54.12, 50.52   58.15, 54.37
    robustresnet_a4     59.01, 57.85   61.88, 57.55

`jaxrobust evaluate --workdir RUN --attack cw-40 --step 0.8/255 --start uniform` is their
CW-40, `pgd-20` in its place their PGD-20, `fgsm` their FGSM. Not as there: float32 instead of mixed
precision, and batch norms see the images of a device together (theirs 64 on each of two GPUs:
--config.model.options.bn_group=64). Hardware, wall time, accuracies of ours: not yet measured.
"""

from jaxrobust.config import ArgumentError, base, read_arguments

MODELS = (
    *(f"{name}_a{size}" for name in ("robustresnet", "wrn") for size in (1, 2, 3, 4)),
    *("wrn_28_10", "wrn_34_12", "wrn_46_14", "wrn_70_16", "wrn_34_r"),
    *("robnet_large_v2", "advrush_7_96", "racl_7_104"),
    *("resnet18", "resnet50"),
)
# data set, classes, pixels, test split, augmentation.
_DATA = {
    "cifar10": ("cifar10", 10, 32, "test", "crop|flip"),
    "cifar100": ("cifar100", 100, 32, "test", "crop|flip|rotate(20)"),
    "tiny": (
        *("folder:tiny-imagenet-200", 200, 64, "val"),
        "resized-crop|flip|jitter(0.4, 0.4, 0.4, 0.2)",
    ),
}
SMOOTH = ("wrn_", "robustresnet_")  # networks whose activation is an option
_OF_BLOCKS = ("block", "se", "se_reduction", "activation")
_COUNTS = ("kernel_size", "scales", "groups", "base_width")
ROWS = (
    "resnet18",
    "resnet18,objective=adversarial,data=cifar100,selection=test",
    "resnet18,objective=mart,data=tiny",
    "robustresnet_a1,objective=mart",
    "wrn_70_16,block=bottleneck,se=residual,se_reduction=16,selection=test",
    "wrn_28_10,depths=2-3-4",
    "wrn_34_12,block=aggregated,activation=silu,weight_decay=0.0005,decay=not-bn-named,groups=8",
)
# Where the value of each key comes from that is not a default: `jaxrobust why` prints it.
SOURCES = {
    "model.name": "Table 2",
    "model.num_classes": "ours: as in the data set",
    "model.image_size": "Table 2; authors' code for Tiny-ImageNet",
    "model.options": "ours: ResNets for other data use the stem for 32 px",
    "init.normalize": "authors' code: raw pixels",
    "data.name": "Table 2; authors' code for Tiny-ImageNet",
    "data.*_split": "ours: the last 1,000 training images choose the epoch; authors' code, with "
    "selection=test: the reported images",
    "data.augmentation": "authors' code: crops and flips, and rotations for CIFAR-100",
    "train.objective": "Table 2: TRADES; authors' code: the others",
    "train.epochs": "authors' code: 100",
    "train.batch_size": "authors' code: 128",
    "train.lr": "authors' code: 0.1",
    "train.schedule": "authors' code: divided by ten at two epochs",
    "train.lr_steps": "authors' code: 75 and 90",
    "train.warmup_epochs": "authors' code: none",
    "train.optimizer": "authors' code: SGD with momentum 0.9",
    "train.weight_decay": "authors' code: 2e-4; the paper's study of activations: 1e-4 to 5e-4",
    "train.decay_mask": "authors' code: on all parameters; the paper, for smooth activations: not "
    "on batch norms",
    "train.clip_norm": "authors' code: 5",
    "train.ema_decay": "authors' code: no averaging",
    "attack.name": "authors' code: PGD",
    "attack.epsilon": "authors' code: 8/255",
    "attack.steps": "authors' code: 10",
    "attack.relative_step": "authors' code: 2/255",
    "attack.start": "authors' code: normal noise on the image",
    "attack.start_std": "authors' code: 0.001 for TRADES, one step for the others",
    "evaluation.attack": "authors' code: PGD-20 chooses the epoch; theirs only from the 50th on",
    "evaluation.step_size": "authors' code: 0.8/255",
    "evaluation.start": "authors' code: uniform noise",
    "evaluation.weights": "authors' code: no averaging",
}


def get_config(arguments: str = ""):
    a = read_arguments(
        arguments,
        model=MODELS,
        objective=("trades", "adversarial", "mart"),
        data=tuple(_DATA),
        selection=(None, "held-out", "test"),
        block=(None, "basic", "bottleneck", "inverted", "aggregated", "hierarchical"),
        se=(None, "none", "standard", "conv3x3", "identity", "residual"),
        se_reduction=(None, 64, 16),
        preact=(None, "yes", "no"),
        residual=(None, "yes", "no"),
        depths=(None, str),
        widths=(None, str),
        activation=(None, str),
        weight_decay=(2e-4, 1e-4, 5e-4),
        decay=("all", "not-bn-named"),
        **{name: (None, str) for name in _COUNTS},
    )
    name, classes, size, test, augmentation = _DATA[a["data"]]
    if a["data"] == "tiny" and a["selection"] == "held-out":
        raise ArgumentError(
            "selection=held-out is only for cifar10 and cifar100, as a part of class folders holds "
            "whole classes; leave it out"
        )
    config = base()
    config.model.update(name=a["model"], num_classes=classes, image_size=size)
    if a["model"].startswith("resnet"):
        config.model.options = {"small_stem": True}
    config.model.options = dict(config.model.options) | _options(a)
    config.init.normalize = "none"
    config.data.update(name=name, train_split="train", selection_split=test, test_split=test)
    if a["data"] != "tiny" and a["selection"] != "test":
        config.data.update(train_split="train[:49000]", selection_split="train[49000:]")
    config.data.augmentation = augmentation
    config.train.update(objective=a["objective"], epochs=100, batch_size=128)
    config.train.update(optimizer="sgd", weight_decay=a["weight_decay"], clip_norm=5.0)
    config.train.decay_mask = a["decay"]
    config.train.update(schedule="step", lr=0.1, lr_steps=(75, 90), warmup_epochs=0)
    config.train.ema_decay = 0.0
    config.attack.update(name="pgd", epsilon=8 / 255, steps=10, relative_step=0.25, start="gauss")
    if a["objective"] == "trades":
        config.attack.start_std = 0.001
    config.evaluation.update(attack="pgd-20", step_size=0.8 / 255, start="uniform", weights="raw")
    return config


def _options(a) -> dict:
    """Read a network's options from the arguments; `ArgumentError` if it has no such part."""
    given = {key: a[key] for key in _OF_BLOCKS if a[key] is not None}
    given |= {key: _numbers(key, a[key]) for key in ("depths", "widths") if a[key] is not None}
    given |= {key: _number(key, a[key]) for key in _COUNTS if a[key] is not None}
    given |= {key: a[key] == "yes" for key in ("preact", "residual") if a[key] is not None}
    if given.keys() - {"activation"} and not a["model"].startswith("wrn_"):
        raise ArgumentError(f"{min(given)} is for wrn_*, not for {a['model']}; leave it out")
    if "activation" in given and not a["model"].startswith(SMOOTH):
        raise ArgumentError(f"activation is not for {a['model']}; leave it out")
    if given.get("block", "basic") != "basic" and given.get("preact", True):
        given["first_conv"] = "raw"  # as the released code, from which the paper's numbers came
    return given


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise ArgumentError(f"{name}={text} is not a whole number; write {name}=4")
    return int(text)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    numbers = text.split("-")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        raise ArgumentError(f"{name}={text} is not a number for each of three stages; write 4-4-4")
    return tuple(map(int, numbers))
