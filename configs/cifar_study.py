"""Five questions of the main paper in small: a ConvNeXt at 32 px on CIFAR-10, Linf 8/255.

    jaxrobust train --config configs/cifar_study.py:base,seed=0

The first argument is a run, each with one answer other than `base`, and each for the same budget:
30 units, where a unit is a pass over the images in training (of K attack steps: K + 1), at half the
resolution a quarter of one.

    base      ConvStem, 6 clean epochs before 8 adversarial ones of 2 steps, random crops and flips
    patch     PatchStem instead of ConvStem
    random    10 adversarial epochs from random weights, no clean ones
    heavy     heavy augmentation (RandAugment, mixing, erasing, label smoothing) in all epochs
    one-step  12 adversarial epochs of 1 step
    low-first 8 adversarial epochs at 16 px before 6 at 32

and, as a control that is in no comparison, `clean`: 30 clean epochs.

`tools/study.py` makes all of them with two seeds on 20,000 images, attacks them with AutoAttack and
compares. Measured: docs/results/training_recipes.md.
"""

from jaxrobust.config import base, phase, read_arguments

RUNS = ("base", "patch", "random", "heavy", "one-step", "low-first")
CONTROL = "clean"
SEEDS = (0, 1)
IMAGES = 1000  # of the test split, that are attacked
ATTACK = ()  # beyond AutoAttack
METHOD = "autoattack standard"  # of its record
ASKED = "AutoAttack, Linf 8/255"
# What the paper finds of each: robust accuracy against base (ConvNeXt-T at 4/255, Tables 1 and 11).
PAPER = {
    "patch": "41.6 instead of 42.2",
    "random": "37.6 instead of 42.2",
    "heavy": "47.5 instead of 42.2",
    "one-step": "46.4 instead of 47.5 (heavy), at two thirds of the cost",
    "low-first": "no such run",
}
ROWS = ("base", "low-first,seed=1", "clean")
# Where the value of each key comes from that is not a default: `jaxrobust why` prints it.
SHARED_SOURCES = {
    "seed": "ours: two seeds",
    "model.*": "ours: a small ConvNeXt for two cores",
    "data.*": "ours: CIFAR-10, 20,000 images for training, 500 for selection, 1,000 reported",
    "data.augmentation": "ours: crop and flip are basic at 32 px; Table 1: heavy",
    "mixup.*": "Table 1: heavy augmentation",
    "erase.probability": "Table 1: heavy augmentation",
    "label_smoothing": "Table 1: heavy augmentation",
    "phases": "ours: low-first is not a run of the paper",
    "*.epochs": "ours: runs of equal cost",
    "*.batch_size": "ours: more updates on few images",
    "*.warmup_epochs": "ours: one of the few epochs",
    "*.ema_decay": "ours: for few updates",
    "train.from_random": "Table 1: from random weights",
    "train.objective": "ours: the control",
    "attack.epsilon": "ours: that of CIFAR-10 on RobustBench",
    "attack.steps": "Table 11: one step or two",
    "evaluation.*": "ours: only at the end",
    "test.*": "ours: a quick look before AutoAttack",
}
SOURCES = SHARED_SOURCES | {"low.*": "ours: low-first is not a run of the paper"}

_EPOCHS = {"random": 10, "one-step": 12, "low-first": 6, CONTROL: 30}


def get_config(arguments: str = ""):
    a = read_arguments(arguments, run=(*RUNS, CONTROL), seed=SEEDS)
    run = a["run"]
    config = base()
    config.seed = a["seed"]
    config.model.name = "convnext_n" if run == "patch" else "convnext_n_cvst"
    config.model.update(num_classes=10, image_size=32)
    config.model.options = {"depths": (1, 1, 1), "dims": (32, 64, 128)}
    if run != "patch":
        config.model.options.stem_widths = (16, 32)
    config.data.update(name="cifar10", train_split="train[:20000]", test_split="test")
    config.data.selection_split = "train[48000:48500]"
    config.data.augmentation = "crop|flip"
    if run == "heavy":
        config.data.augmentation += "|randaugment"
        config.label_smoothing = 0.1
        config.mixup.update(mixup=0.8, cutmix=1.0)
        config.erase.probability = 0.25
    config.attack.update(epsilon=8 / 255, steps=1 if run == "one-step" else 2)
    short = {"batch_size": 128, "lr": 1e-3, "warmup_epochs": 1, "ema_decay": 0.99}
    config.pretrain.update(short, epochs=0 if run in ("random", CONTROL) else 6)
    config.train.update(short, epochs=_EPOCHS.get(run, 8))
    config.train.from_random = run == "random"
    if run == CONTROL:
        config.train.objective = "clean"
    if run == "low-first":
        with config.unlocked():
            config.phases = ("pretrain", "low", "train")
            config.low = phase(epochs=8, **short)
            config.low.changes = {"model": {"image_size": 16}}
            config.low.changes.data = {"augmentation": "resized-crop(0.5, 1)|flip"}
    config.evaluation.update(every_epochs=100, batch_size=250, steps=10)
    config.test.update(images=IMAGES, batch_size=250, steps=10)
    return config
