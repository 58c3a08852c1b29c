"""How the light recipe came about: the ablations of Debenedetti's thesis (2022), its Tables 1 to 6.

    jaxrobust train --config configs/light_ablation.py:xcit_n12,augmentation=m,warmup=20

The arguments, with their defaults first, are

    data=imagenet100|imagenet
    augmentation=none|m|c|r|e|mc|...|mcre  any of mixup, cutmix, RandAugment and random erasing, in
                                           this order; color jitter where there is no RandAugment
    weight_decay=0.05|0|0.001|0.01|0.1|0.5|1.0
    warmup=20|0|5|10|30                    epochs in which the radius grows to 4/255
    views=1|3                              how often an image appears in its batch; 3: the first
    time
                                           without RandAugment, in batches of 576
    objective=adversarial|clean

Keys that are not defaults, by `jaxrobust why configs/light_ablation.py:xcit_n12`:

    model.name              "xcit_n12": thesis, Tables 1 to 6
    model.num_classes       100: ours: one for each class of ImageNet-100; the authors' heads had
          1,000
    model.dtype             "bfloat16": ours: bfloat16, in which TPUs multiply by default; theirs
          was nominally float32
    model.options.bn_group  64: authors' code: batch norms see the 64 images of a core
    data.classes            "imagenet100": thesis, Table 1; authors' code: which 100 classes, with
          the labels 0 to 99
    data.augmentation       "resized-crop|flip|jitter(0.4)": thesis, Table 3; authors' code for the
          ResNets
    data.preprocessing      "bicubic-1.0": authors' code: timm's settings of XCiT
    mixup.mixup             0.0: thesis, Table 3: DeiT's strengths
    mixup.cutmix            0.0: thesis, Table 3: DeiT's strengths
    erase.probability       0.0: thesis, Table 3: DeiT's
    erase.noise             "truncated": authors' code: normal noise, clipped to [0, 1]
    label_smoothing         0.1: authors' code: 0.1, which stays on without mixing
    train.epochs            110: thesis, section 4.1.9; authors' code
    train.batch_size        512: thesis: 512, which separates an image's three views; ours: 576 with
          three views, a multiple of three
    train.lr                0.0005: thesis: 5e-4 per 512 images; authors' code for the ResNets
    train.schedule          "epoch-cosine": authors' code: a cosine that is constant within an epoch
    train.warmup_lr         1e-06: authors' code: 1e-6; the thesis has 5e-6
    train.final_lr          1e-05: authors' code: 1e-5; the thesis has 5e-5
    train.cooldown_epochs   10: authors' code: at the last rate
    train.b2                0.999: authors' code: AdamW's default
    train.ema_decay         0.0: authors' code: no averaging
    train.from_random       true: authors' code: all of these runs start from random weights
    attack.name             "fgsm": authors' code: one step from a random start is FGSM, two are PGD
    attack.steps            1: thesis: one at 4/255; thesis, section 4.2: two at 8/255
    attack.warmup_epochs    20: thesis, Table 2
    attack.relative_step    1.5: authors' code: 1.5 epsilon divided by the steps; the thesis
          probably used 1.1
    attack.start            "random": authors' code: uniform in the ball
    attack.labels           "hard": authors' code: the class, without label smoothing
    attack.statistics       "batch": authors' code: on TPUs batch norms are in training mode under
          attack
    evaluation.batch_size   512: ours: what fits in memory, which changes no result
    evaluation.weights      "raw": authors' code: no averaging
    test.batch_size         512: ours: what fits in memory, which changes no result

Published, in % (clean and APGD-CE with 5 restarts at 4/255):

    Table 1  deit_s, cait_s12, xcit_s12, each with augmentation=mcre,warmup=0,views=3: 62.52, 33.32;
             70.20, 35.84; 85.06, 54.80 (objective=clean: 67.38, 80.28, 90.44)
    Table 2  xcit_n12,augmentation=mcre,warmup=0|5|10|20|30: 48.46, 30.48; 52.04, 32.86; 54.62,
             33.84; 56.10, 34.88; 56.12, 34.54
    Table 3  xcit_n12,augmentation=e 67.28, 39.22; none 66.78, 39.22; m 61.04, 38.56; me 60.46,
             38.26; mc 62.04, 38.18; r 65.34, 37.64; re 64.76, 37.62; mcre 56.64, 35.38
    Table 4  xcit_n12,weight_decay=0 66.44, 39.02; 0.001 66.40, 39.04; 0.01 66.28, 38.66; 0.05
             67.16, 39.30; 0.1 67.28, 39.92; 0.5 68.78, 42.02; 1.0 67.68, 40.88
    Table 5  with data=imagenet, under AutoAttack: deit_s,augmentation=mcre,warmup=0 66.30, 32.70;
             xcit_s12,augmentation=mcre,warmup=0 71.68, 28.70; with warmup=10 71.98, 29.36; and with
             augmentation=none 71.70, 38.78; and with weight_decay=0.5 72.34, 41.78
    Table 6  resnet50 and resnet50_gelu (data=imagenet, warmup=10; the GELU's 66.54, 35.12 are of
             the authors' README): SGD with Nesterov, learning rate 3.2, a tenth every 30 epochs
    Clean    xcit_s12, xcit_m12, xcit_l12, each with data=imagenet,augmentation=mcre,objective=clean
             for 100 epochs: 80.36, 81.71, 82.65 (section 4.1.9)

Two runs with the same settings differ by about 0.4 and 0.1.
Hardware, wall time, accuracies of ours: not yet measured.
"""

import itertools

from configs import light_recipe
from configs.light_recipe import recipe
from jaxrobust.config import ArgumentError, read_arguments

_OPTIONS = {
    "xcit_n12": {"bn_group": 64},
    "xcit_s12": {"drop_path": 0.05, "bn_group": 64},
    "xcit_m12": {"drop_path": 0.05, "bn_group": 64},
    "xcit_l12": {"drop_path": 0.05, "bn_group": 64},
    "cait_s12": {"drop_path": 0.05},
    "deit_s": {"drop_path": 0.05},
    "resnet50": {"bn_group": 64},
    "resnet50_gelu": {"bn_group": 64},
}
_COMBINATIONS = tuple(
    "".join(letters) for n in range(1, 5) for letters in itertools.combinations("mcre", n)
)
ROWS = (
    "xcit_n12",
    "xcit_n12,augmentation=mcre,warmup=0",
    "xcit_n12,augmentation=re,objective=clean",
    "deit_s,data=imagenet,augmentation=mcre,warmup=0",
    "cait_s12,augmentation=mcre,warmup=0,views=3",
    "resnet50_gelu,data=imagenet,warmup=10",
)
SOURCES = light_recipe.SOURCES | {
    "model.name": "thesis, Tables 1 to 6",
    "model.num_classes": "ours: one for each class of ImageNet-100; the authors' heads had 1,000",
    "data.classes": "thesis, Table 1; authors' code: which 100 classes, with the labels 0 to 99",
    "data.augmentation": "thesis, Table 3; authors' code for the ResNets",
    "mixup.*": "thesis, Table 3: DeiT's strengths",
    "erase.probability": "thesis, Table 3: DeiT's",
    "data.views": "thesis, section 4.1.1: an image appears three times in a batch",
    "data.first_view": "authors' code: the first view without RandAugment",
    "train.batch_size": "thesis: 512, which separates an image's three views; ours: 576 with "
    "three views, a multiple of three",
    "train.warmup_epochs": "authors' code: the ResNets have none",
    "train.lr": "thesis: 5e-4 per 512 images; authors' code for the ResNets",
    "train.objective": "thesis, section 4.1.9: the clean networks",
    "train.epochs": "thesis, section 4.1.9; authors' code",
    "train.from_random": "authors' code: all of these runs start from random weights",
    "train.weight_decay": "thesis, Table 4; authors' code for the ResNets",
    "attack.warmup_epochs": "thesis, Table 2",
    "init.normalize": "authors' code: the ResNets' mean and std are 0.5",
    "train.optimizer": "authors' code: the ResNets'",
    "train.nesterov": "authors' code: the ResNets'",
    "train.lr_steps": "authors' code: the ResNets'",
}


def get_config(arguments: str = ""):
    a = read_arguments(
        arguments,
        model=tuple(_OPTIONS),
        data=("imagenet100", "imagenet"),
        augmentation=("none", *_COMBINATIONS),
        weight_decay=(0.05, 0, 0.001, 0.01, 0.1, 0.5, 1.0),
        warmup=(20, 0, 5, 10, 30),
        objective=("adversarial", "clean"),
        views=(1, 3),
    )
    config = recipe(a["model"], 4, 1)
    config.model.options = _OPTIONS[a["model"]]
    if a["data"] == "imagenet100":
        config.data.classes, config.model.num_classes = "imagenet100", 100
    letters = a["augmentation"].replace("none", "")
    colours = "randaugment" if "r" in letters else "jitter(0.4)"
    config.data.augmentation = f"resized-crop|flip|{colours}"
    config.mixup.update(mixup=0.8 * ("m" in letters), cutmix=1.0 * ("c" in letters))
    config.erase.probability = 0.25 * ("e" in letters)
    config.attack.warmup_epochs = a["warmup"]
    config.train.update(weight_decay=float(a["weight_decay"]), objective=a["objective"])
    config.train.from_random = True  # as all of these runs
    if a["data"] == "imagenet" and a["objective"] == "clean":
        config.train.update(epochs=100, cooldown_epochs=0)
    if a["views"] == 3:
        config.data.update(views=3, first_view="resized-crop|flip")
        config.train.update(batch_size=576, lr=5e-4 * 576 / 512)
    if a["model"].startswith("resnet"):
        _steps_of_sgd(config, letters)
    return config


def _steps_of_sgd(config, letters: str) -> None:
    """Set what the ResNets of the code have of their own."""
    if letters:
        raise ArgumentError("the ResNets have augmentation=none; leave it out")
    config.data.augmentation = "resized-crop-flip"
    config.init.normalize = "half"
    config.train.update(optimizer="sgd", nesterov=True, lr=3.2, weight_decay=1e-4, epochs=100)
    config.train.update(schedule="step", lr_steps=(30, 60, 90), warmup_epochs=0, cooldown_epochs=0)
    config.train.update(warmup_lr=None, final_lr=0.0)
