"""DKL and AWP compared with TRADES at equal passes, in small.

    jaxrobust train --config configs/objectives_study.py:dkl,seed=0

The first argument is the objective of the adversarial phase of a small ConvNeXt (`base` of
`cifar_study` on 8,000 images of CIFAR-10, Linf 8/255, two steps of APGD, after 6 clean epochs):

    trades  TRADES with beta 6 (Zhang et al. 2019), 6 epochs of four passes: two of the attack, the
            clean and the attacked images
    dkl     the improved Kullback-Leibler divergence (Cui et al. 2023), 6 epochs of as many
    awp     TRADES with adversarial weight perturbation (Wu et al. 2020), 4 epochs of six passes,
            as the perturbation takes two more

`tools/study.py --study objectives_study` makes them with two seeds and attacks 500 test images with
APGD-CE and APGD-T. Measured: docs/results/objectives_and_data.md.
"""

from configs import cifar_study
from jaxrobust.config import read_arguments

RUNS = ("trades", "dkl", "awp")
SEEDS = (0, 1)
IMAGES = 500  # of the test split, that are attacked
# FAB and Square fooled none that these had left of the twelve networks of `cifar_study`.
ATTACK = ("--attack=apgd-ce,apgd-t",)
METHOD = "apgd-ce + apgd-t"  # of its record
ASKED = "APGD-CE and APGD-T as in AutoAttack, Linf 8/255"
# AutoAttack of WRN-34-10 on RobustBench, of each and of TRADES.
PAPER = {"dkl": "57.09 instead of 53.08", "awp": "56.17 instead of 53.08"}
ROWS = ("trades", "dkl", "awp,seed=1")
SOURCES = cifar_study.SHARED_SOURCES | {
    "data.*": "ours: CIFAR-10, 8,000 images for training, 500 for selection, 500 reported",
    "attack.start": "ours: as in AutoAttack's APGD; TRADES has no gradient at the image",
    "train.objective": "ours: the question of the study",
}
_OBJECTIVES = {"trades": ("trades", 6), "dkl": ("dkl", 6), "awp": ("trades-awp", 4)}


def get_config(arguments: str = ""):
    a = read_arguments(arguments, run=RUNS, seed=SEEDS)
    config = cifar_study.get_config("base")
    config.seed = a["seed"]
    config.data.train_split = "train[:8000]"
    config.train.objective, config.train.epochs = _OBJECTIVES[a["run"]]
    config.attack.start = "random"
    config.test.images = IMAGES
    return config
