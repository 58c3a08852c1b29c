"""What images beyond the training set are worth under attack, in small.

    jaxrobust train --config configs/extra_data_study.py:extra,seed=0

A small ConvNeXt (`base` of `cifar_study`) is trained with TRADES, Linf 8/255, two steps of APGD,
after a clean phase, each for 60,000 images of 4,000 of CIFAR-10. The first argument is a run:

    real       those images alone, fifteen times each in either phase
    extra      70% of each batch from 20,000 other training images, which stand for the generated
               ones of `generated_data.py`, and 30% of the 4,000: as many updates
    real-few   1,000 images, 66 times each: as many updates
    extra-few  as extra with these 1,000

Real images with true labels are more than a generator gives, so that this is an upper bound.
`tools/study.py --study extra_data_study` makes them with two seeds and attacks 500 test images with
APGD-CE and APGD-T. Measured: docs/results/objectives_and_data.md.
"""

from configs import cifar_study
from jaxrobust.config import read_arguments

RUNS = ("real", "extra", "real-few", "extra-few")
AGAINST = {"extra": ("real",), "extra-few": ("real-few",)}
SEEDS = (0, 1)
IMAGES = 500  # of the test split, that are attacked
# FAB and Square fooled none that these had left of the twelve networks of `cifar_study`.
ATTACK = ("--attack=apgd-ce,apgd-t",)
METHOD = "apgd-ce + apgd-t"  # of its record
ASKED = "APGD-CE and APGD-T as in AutoAttack, Linf 8/255"
# RobustBench, AutoAttack: Wang et al. 2023.
PAPER = {
    "extra": "67.31, a WRN-28-10 with 20 million generated images",
    "real-few": "no such run",
    "extra-few": "no such run",
}
ROWS = ("real", "extra,seed=1", "extra-few")
SOURCES = cifar_study.SHARED_SOURCES | {
    "data.*": "ours: CIFAR-10, 4,000 or 1,000 images for training, 500 for selection, 500 reported",
    "data.extra": "ours: real images in place of generated ones",
    "data.extra_split": "ours: 20,000 images that are in no other split",
    "data.extra_share": "authors' code: 0.7 for 1m",
    "data.epoch_images": "ours: as many updates as without",
    "attack.start": "ours: as in AutoAttack's APGD; TRADES has no gradient at the image",
    "train.objective": "the paper: TRADES",
    "train.trades_beta": "authors' code: 5",
}


def get_config(arguments: str = ""):
    a = read_arguments(arguments, run=RUNS, seed=SEEDS)
    config = cifar_study.get_config("base")
    config.seed = a["seed"]
    images, epochs = (1000, 66) if a["run"].endswith("few") else (4000, 15)
    config.data.train_split = f"train[:{images}]"
    if a["run"].startswith("extra"):
        config.data.update(extra="cifar10", extra_split="train[20000:40000]", extra_share=0.7)
        config.data.epoch_images = images
    config.pretrain.epochs = epochs
    config.train.update(objective="trades", trades_beta=5.0, epochs=epochs)
    config.attack.start = "random"
    config.test.images = IMAGES
    return config
