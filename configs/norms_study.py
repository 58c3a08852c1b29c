"""From robust to Linf alone to robust to three norms in three epochs (E-AT), in small.

    jaxrobust train --config configs/norms_study.py:e-at,seed=0

The first argument is a run:

    linf       `base` of `cifar_study`: a small ConvNeXt, 6 clean epochs before 8 adversarial ones
               on 20,000 images of CIFAR-10 at Linf 8/255
    e-at       three epochs more, from its weights, each step in Linf 8/255 or L1 12, whichever the
               network withstands less (Croce & Hein 2022), five steps of APGD; of 48,000 images,
               which are all that do not choose weights, as the paper's are of all
    linf-more  the same three epochs, each step in Linf 8/255

`tools/study.py --study norms_study` makes them with two seeds and attacks 500 test images with
APGD-CE and APGD-T in Linf 8/255, L2 0.5 and L1 12. Measured:
docs/results/objectives_and_data.md.
"""

from configs import cifar_study, several_norms
from jaxrobust.config import read_arguments

RUNS = ("linf", "linf-more", "e-at")
AGAINST = {"linf-more": ("linf",), "e-at": ("linf", "linf-more")}
SEEDS = (0, 1)
IMAGES = 500  # of the test split, that are attacked
THREATS = ("linf:8/255", "l2:0.5", "l1:12")
UNION = True  # of the threats is the last column
STARTS = dict.fromkeys(RUNS[1:], "linf")  # run -> the run of its seed that it continues from
# FAB and Square fooled none that these had left of the twelve networks of `cifar_study`.
ATTACK = ("--attack=apgd-ce,apgd-t",)
METHOD = "apgd-ce + apgd-t"  # of its record
ASKED = "APGD-CE and APGD-T as in AutoAttack, in each norm; the union withstands all three"
# What the paper finds on CIFAR-10: a WRN-28-10 that is robust to Linf, fine-tuned for three epochs.
PAPER = {"linf-more": "no such run", "e-at": "more than 51 in the union"}
ROWS = ("linf", "linf-more", "e-at,seed=1")
SOURCES = cifar_study.SHARED_SOURCES | {
    key: several_norms.SOURCES[key]
    for key in ("init.weights", "train.epochs", "attack.norm", "attack.epsilon", "attack.mix")
}
SOURCES["data.train_split"] = (
    "the paper: fine-tuning on all images; ours: except those that choose weights"
)
SOURCES["attack.steps"] = "ours: five, for E-AT; two for the network that it starts from"


def get_config(arguments: str = ""):
    a = read_arguments(arguments, run=RUNS, seed=SEEDS)
    config = cifar_study.get_config("base")
    config.seed = a["seed"]
    if a["run"] == "linf":
        return config
    config.init.weights = f"run:norms_study:linf,seed={a['seed']}"
    config.data.train_split = "train[:48000]"
    config.pretrain.epochs = 0
    config.train.update(epochs=3, warmup_epochs=0)
    config.attack.steps = 5
    if a["run"] == "e-at":
        config.attack.update(norm=several_norms.NORMS, epsilon=several_norms.RADII[32])
        config.attack.mix = "extreme"
    return config
