"""Where heavy augmentation fails in small, and where it helps: from `base` to `heavy`, by steps.

    jaxrobust train --config configs/augmentation_study.py:heavy-few,seed=0

The first argument is a step of a ladder between these two runs of `cifar_study`, each of which has
the augmentation of those before it

    base         crop and flip, 6 clean epochs before 8 adversarial ones, Linf 8/255
    randaugment  RandAugment too
    mixup        MixUp too
    cutmix       CutMix too, in half of the batches
    erasing      random erasing too
    heavy        label smoothing too

and, after a hyphen, what is different in the whole run:

    random       10 adversarial epochs from random weights, no clean ones
    radius       radius of 4/255
    rate         a third of the learning rate
    warmup       a radius that grows to 8/255 in the first 5 of the 8 adversarial epochs
    few          2,000 images, of which there are ten times as many epochs, at a third of the rate;
                 the radius grows as in warmup, since heavy fails without
    hundreds     as few, with 512 images and 39 times as many epochs

`tools/study.py --study augmentation_study` makes them and attacks them with AutoAttack. Measured,
of 1,000 test images: on 20,000 images augmentation costs 8 to 9 points of robust accuracy where it
does not collapse, on 512 it gains 4.9 and 4.2 (two seeds); docs/results/training_recipes.md has
all results.
"""

from configs import cifar_study
from jaxrobust.config import read_arguments

LADDER = ("base", "randaugment", "mixup", "cutmix", "erasing", "heavy")
ENDS = ("base", "heavy")
FEWER = {"few": 2000, "hundreds": 512}  # images, of 20,000; as many updates
RUNS = (
    *LADDER,
    *(
        f"{step}-{other}"
        for other in ("rate", "radius", "warmup", "few", "hundreds", "random")
        for step in ENDS
    ),
)
SEEDS = (0, 1)
IMAGES = 1000  # of the test split, that are attacked
ATTACK = ()  # beyond AutoAttack
AGAINST = {run: (f"base-{run.split('-')[1]}",) for run in RUNS if "-" in run}
METHOD = "autoattack standard"  # of its record
ASKED = "AutoAttack at the radius of the training, Linf 8/255 or 4/255"
# What the paper finds: robust accuracy of heavy augmentation against basic (Table 1, ConvNeXt-T +
# ConvStem, 4/255, from clean weights).
PAPER = {
    "heavy": "47.5 instead of 42.2",
    "heavy-radius": "47.5 instead of 42.2",
    "heavy-hundreds": "47.5 instead of 42.2",
}
ROWS = ("cutmix,seed=1", "heavy-few", "heavy-radius", "base-random", "heavy-warmup")
SOURCES = cifar_study.SHARED_SOURCES | {
    "label_smoothing": "Table 1: heavy augmentation",
    "attack.epsilon": "ours: that of CIFAR-10 on RobustBench; 4/255: the paper's",
    "attack.warmup_epochs": "ours: as in the light recipe, over few epochs",
    "*.lr": "ours: 1e-3, or a third of it",
}


def get_config(arguments: str = ""):
    a = read_arguments(arguments, run=RUNS, seed=SEEDS)
    step, _, other = a["run"].partition("-")
    config = cifar_study.get_config("random" if other == "random" else "base")
    config.seed = a["seed"]
    _augment(config, LADDER.index(step))
    if other == "radius":
        config.attack.epsilon = 4 / 255
    if other == "warmup" or other in FEWER:
        config.attack.warmup_epochs = 5
    if other == "rate" or other in FEWER:
        config.pretrain.lr = config.train.lr = 1e-3 / 3
    if other in FEWER:
        images = FEWER[other]
        longer = 20000 // images
        config.data.train_split = f"train[:{images}]"
        config.attack.warmup_epochs *= longer
        for phase in (config.pretrain, config.train):
            phase.epochs *= longer
            phase.warmup_epochs *= longer
    return config


def _augment(config, place: int) -> None:
    """Switch on the first `place` factors of heavy augmentation."""
    if place >= LADDER.index("randaugment"):
        config.data.augmentation += "|randaugment"
    if place >= LADDER.index("mixup"):
        config.mixup.mixup = 0.8
    if place >= LADDER.index("cutmix"):
        config.mixup.cutmix = 1.0
    if place >= LADDER.index("erasing"):
        config.erase.probability = 0.25
    if place >= LADDER.index("heavy"):
        config.label_smoothing = 0.1
