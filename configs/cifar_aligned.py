"""Twenty architectures at 32 px, all trained alike (Tang et al. 2022, arXiv 2209.14105).

    jaxrobust train --config configs/cifar_aligned.py:cifar_vit,mode=adversarial,l1=1e-5

The arguments are a network and then, with their defaults first,

    mode=adversarial|clean|trades
    l1=0             times the sum of |w| of convolutions and linear maps is added to the loss, any
                     number; the paper prints none (a sweep of ours: 1e-6, 5e-6, 1e-5, 5e-5, 1e-4)
    selection=held-out|test
                     which images choose the epoch: the last 1,000 of training, or those that are
                     reported, as the paper does; at 224 px test only
    order=CCTT|CCTC|CTTT|CTTC|CCCC|CCCT|CTCC|CTCT
                     of cifar_coatnet: convolution or attention in each stage (Table 2)
    patch=4|2|1|8    of cifar_pvt_v2 (4, 2, 1) and cifar_vit (8, 4, 2) (Table 3)
    activation=...   of networks that have one, such as gelu, relu or silu (section 3.3: smooth ones
                     gain nothing); default: their own

A network is one of cifar_* (`jaxrobust models`), on CIFAR-10; one of cifar_*_224,
resnet50 or wide_resnet50_2 is trained on ImageNette, class folders under imagenette2/train and val
(--config.data.name=folder:PATH). What else a network has is an option, such as
--config.model.options.depths=(1,1,1,1).

Keys that are not defaults, by `jaxrobust why configs/cifar_aligned.py:cifar_vit`:

    seed                  34257: authors' code
    model.name            "cifar_vit": Table 1
    model.num_classes     10: Table 1: CIFAR-10; ImageNette has the same number
    model.image_size      32: Table 1: 32; Table 4: 224
    init.normalize        "cifar10-robustart": authors' code: their mean and std for CIFAR-10,
          ImageNet's for ImageNette
    data.name             "cifar10": Tables 1 and 4
    data.train_split      "train[:49000]": ours: the last 1,000 training images choose the epoch;
          authors' code, with selection=test: the reported images
    data.selection_split  "train[49000:]": ours: the last 1,000 training images choose the epoch;
          authors' code, with selection=test: the reported images
    data.test_split       "test": ours: the last 1,000 training images choose the epoch; authors'
          code, with selection=test: the reported images
    data.augmentation     "robustart": authors' code: AutoAugment before crop and flip
    train.epochs          100: authors' code: 100
    train.batch_size      128: authors' code: 128
    train.lr              0.00025: authors' code: 2.5e-4, released for ViT
    train.schedule        "late-cosine": authors' code: RobustART's schedulers: the peak from the
          ninth epoch on, a cosine from the eleventh to 1.1e-5 in the last
    train.warmup_epochs   8: authors' code: 8
    train.warmup_lr       0.0: authors' code: the first epoch has a rate of 0
    train.decay_mask      "all": authors' code: on all parameters
    train.b2              0.999: authors' code: AdamW's default
    train.ema_decay       0.0: authors' code: no averaging
    attack.name           "pgd": authors' code: PGD
    attack.epsilon        0.03137254901960784: Table 1: 8/255
    attack.steps          15: authors' code: 15; the paper says 10
    attack.relative_step  0.1: authors' code: 0.8/255
    attack.start          "uniform-boxed": authors' code: uniform, clipped to [0, 1]
    evaluation.attack     "pgd-20": authors' code: PGD-20
    evaluation.step_size  0.002352941176470588: authors' code
    evaluation.start      "uniform-boxed": authors' code: uniform, clipped to [0, 1]
    evaluation.weights    "raw": authors' code: no averaging
    evaluation.metric     "clean": authors' code: clean accuracy chooses the epoch

AdamW with a weight decay of 0.05 is the default, as are the running statistics that the attack
sees. The authors' code is DIG-Beihang/RobustART.

Published, in % (parameters in millions; accuracy of mode=clean; then of mode=adversarial clean,
PGD-20 at Linf 8/255, AutoAttack, PGD-20 at L2 1.5 and at L1 40, and all of these at once):

    cifar_pvt_v2          12.40  88.34    75.99  46.48  38.18  35.77  46.14  33.54
    cifar_coatnet         16.99  90.73    77.73  48.27  39.85  33.80  42.30  32.17
    cifar_vit              9.78  86.73    78.76  46.02  38.00  30.86  39.27  29.24
    cifar_cpvt             9.49  90.34    78.57  45.02  36.73  30.15  39.22  28.47
    cifar_vitae           23.18  88.24    75.42  40.53  33.22  29.67  40.02  28.13
    cifar_mixer            0.68  83.43    62.86  38.93  31.81  29.27  36.50  27.42
    cifar_poolformer      11.39  89.26    73.66  46.33  38.93  28.84  34.32  27.36
    cifar_cct              3.76  92.27    81.23  49.21  40.97  28.29  34.59  26.82
    cifar_vgg16           14.72  94.01    84.30  50.87  41.66  26.78  31.48  25.32
    cifar_swin            27.42  91.58    80.44  48.61  41.31  26.58  30.47  25.04
    cifar_levit            6.67  89.01    77.10  47.16  39.87  26.28  29.58  25.04
    cifar_mobilevit        5.00  91.47    77.52  49.51  41.50  26.96  29.35  24.41
    cifar_botnet50        18.82  94.16    80.76  51.29  42.95  25.84  27.38  23.15
    cifar_wrn_40_10       55.85  96.47    89.54  55.17  44.52  22.55  23.68  20.88
    cifar_densenet         1.12  94.42    83.23  53.06  44.02  22.55  21.87  19.48
    cifar_preactresnet50  23.50  95.86    87.96  54.85  45.81  18.60  16.46  15.11
    cifar_ceit             5.56  85.24    71.55  36.20  28.02  15.31  16.77  14.35
    cifar_resnet50        23.52  95.60    87.92  54.18  45.40  17.52  15.90  14.32
    cifar_resnext29        9.12  95.64    87.12  51.51  42.66  15.07  13.64  12.18
    cifar_cvt             19.54  87.81    73.76  41.36  33.67  12.75   9.25   8.76

Not known of the paper: its settings of TRADES (here beta 6, and the attack of mode=adversarial),
its networks at 224 px (here the standard ones), and whether weight decay and rate are the same for
all networks (here those that are released for ViT). Hardware, wall time, accuracies of ours: not
yet measured.
"""

import math

from jaxrobust import models
from jaxrobust.config import ArgumentError, base, read_arguments

AT_224 = ("resnet50", "wide_resnet50_2")
MODELS = (*(name for name in models.available() if name.startswith("cifar_")), *AT_224)
ORDERS = ("CCTT", "CCTC", "CTTT", "CTTC", "CCCC", "CCCT", "CTCC", "CTCT")
ROWS = (
    "cifar_vgg16",
    "cifar_vit,mode=clean,l1=1e-5",
    "cifar_resnext29,mode=trades,selection=test",
    "cifar_resnet50,mode=clean",
    "cifar_densenet,l1=1e-5",
    "cifar_resnext50_224,mode=adversarial",
    "cifar_coatnet,order=CTTC,selection=test",
)
# Where the value of each key comes from that is not a default: `jaxrobust why` prints it.
SOURCES = {
    "seed": "authors' code",
    "model.name": "Table 1",
    "model.options": "Tables 2 and 3: orders of stages, patches; the paper: activations",
    "model.num_classes": "Table 1: CIFAR-10; ImageNette has the same number",
    "model.image_size": "Table 1: 32; Table 4: 224",
    "init.normalize": "authors' code: their mean and std for CIFAR-10, ImageNet's for ImageNette",
    "data.name": "Tables 1 and 4",
    "data.*_split": "ours: the last 1,000 training images choose the epoch; authors' code, with "
    "selection=test: the reported images",
    "data.augmentation": "authors' code: AutoAugment before crop and flip",
    "data.preprocessing": "authors' code: resized to 256, cropped to 224",
    "train.objective": "Tables 1 and 4; the paper: TRADES",
    "train.l1": "the paper gives no value; ours",
    "train.epochs": "authors' code: 100",
    "train.batch_size": "authors' code: 128",
    "train.lr": "authors' code: 2.5e-4, released for ViT",
    "train.schedule": "authors' code: RobustART's schedulers: the peak from the ninth epoch on, a "
    "cosine from the eleventh to 1.1e-5 in the last",
    "train.warmup_epochs": "authors' code: 8",
    "train.warmup_lr": "authors' code: the first epoch has a rate of 0",
    "train.decay_mask": "authors' code: on all parameters",
    "train.b2": "authors' code: AdamW's default",
    "train.ema_decay": "authors' code: no averaging",
    "attack.name": "authors' code: PGD",
    "attack.epsilon": "Table 1: 8/255",
    "attack.steps": "authors' code: 15; the paper says 10",
    "attack.relative_step": "authors' code: 0.8/255",
    "attack.start": "authors' code: uniform, clipped to [0, 1]",
    "evaluation.attack": "authors' code: PGD-20",
    "evaluation.step_size": "authors' code",
    "evaluation.start": "authors' code: uniform, clipped to [0, 1]",
    "evaluation.weights": "authors' code: no averaging",
    "evaluation.metric": "authors' code: clean accuracy chooses the epoch",
}


def get_config(arguments: str = ""):
    a = read_arguments(
        arguments,
        model=MODELS,
        mode=("adversarial", "clean", "trades"),
        l1=(0.0, float),
        selection=(None, "held-out", "test"),
        order=(None, *ORDERS),
        patch=(None, 4, 2, 1, 8),
        activation=(None, str),
    )
    if not 0 <= a["l1"] < math.inf:
        raise ArgumentError(f"l1={a['l1']:g} must be a number of at least 0; leave it out")
    large = a["model"].endswith("_224") or a["model"] in AT_224
    if large and a["selection"] == "held-out":
        raise ArgumentError(
            "selection=held-out is only for 32 px, as a part of class folders holds whole classes; "
            "leave it out"
        )
    config = base()
    config.seed = 34257
    config.model.update(name=a["model"], num_classes=10, image_size=224 if large else 32)
    config.model.options = _options(a)
    if large:
        config.init.normalize = "imagenet"
        config.data.update(name="folder:imagenette2", train_split="train", test_split="val")
        config.data.update(selection_split="val", preprocessing="Res256Crop224")
        config.data.augmentation = "robustart-imagenet"
    else:
        config.init.normalize = "cifar10-robustart"
        config.data.update(name="cifar10", train_split="train", test_split="test")
        config.data.update(selection_split="test", augmentation="robustart")
        if a["selection"] != "test":
            config.data.update(train_split="train[:49000]", selection_split="train[49000:]")
    config.train.update(objective=a["mode"], l1=a["l1"], epochs=100, batch_size=128)
    config.train.update(optimizer="adamw", b2=0.999, weight_decay=0.05, decay_mask="all")
    config.train.update(schedule="late-cosine", lr=2.5e-4, warmup_epochs=8, warmup_lr=0.0)
    config.train.update(final_lr=5e-6, ema_decay=0.0)
    config.attack.update(name="pgd", epsilon=8 / 255, steps=15, relative_step=0.1)
    config.attack.start = "uniform-boxed"
    config.evaluation.update(attack="pgd-20", step_size=0.6 / 255, start="uniform-boxed")
    config.evaluation.update(weights="raw", metric="clean")
    return config


def _options(a) -> dict:
    """Read a network's options from the arguments; `ArgumentError` if it has no such part."""
    given = {key: a[key] for key in ("order", "patch", "activation") if a[key] is not None}
    missing = given.keys() - set(models.variant(a["model"])._fields)
    if missing:
        raise ArgumentError(f"{a['model']} has no {min(missing)}; leave it out")
    return given
