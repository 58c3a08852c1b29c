"""Advanced adversarial training of residual networks (Huang et al. 2022, arXiv 2212.11005).

    jaxrobust train --config configs/cifar_aat.py:robustresnet_a1,extra=500k

The arguments are a network, as in `configs/cifar_bat.py`, and then, with their defaults first,

    data=cifar10|cifar100
    extra=none|500k  70% of each batch from ti_500K_pseudo_labeled.npz, made of the 500,000 images
                     with pseudo-labels of Carmon et al. 2019 (arXiv 1905.13736) by `jaxrobust
                     prepare pseudo-labelled ti_500K_pseudo_labeled.pickle`; generated images as
                     .npz are --config.data.extra=npz:FILE
    activation=silu|relu  silu is of the residual networks wrn_* and robustresnet_*

Keys that are not defaults, by `jaxrobust why configs/cifar_aat.py:robustresnet_a1,extra=500k`:

    model.name                "robustresnet_a1": Table 2
    model.num_classes         10: ours: as in the data set
    model.image_size          32: Table 2; authors' code for Tiny-ImageNet
    model.options.activation  "silu": authors' code: SiLU; ours: ResNets for other data use the stem
          for 32 px
    init.normalize            "cifar10": authors' code: the data set's mean and std
    data.name                 "cifar10": Table 2; authors' code for Tiny-ImageNet
    data.train_split          "train[1024:]": authors' code: 1,024 training images choose the epoch;
          ours: which ones
    data.selection_split      "train[:1024]": authors' code: 1,024 training images choose the epoch;
          ours: which ones
    data.test_split           "test": authors' code: 1,024 training images choose the epoch; ours:
          which ones
    data.augmentation         "crop|flip": authors' code: crops and flips, and rotations for
          CIFAR-100
    data.extra                "npz:ti_500K_pseudo_labeled.npz": the paper: 500,000 images with
          pseudo-labels of Carmon et al. 2019
    data.extra_share          0.7: authors' code: 0.7 of a batch
    data.epoch_images         50176: authors' code: 49 steps per epoch
    label_smoothing           0.1: authors' code
    train.objective           "trades": Table 2: TRADES; authors' code: the others
    train.epochs              400: authors' code: 400
    train.lr                  0.4: authors' code: 0.4
    train.schedule            "one-cycle": authors' code: PyTorch's OneCycleLR, per epoch: up to the
          peak, then down along a cosine
    train.warmup_lr           0.016: authors' code: a 25th of the peak
    train.final_lr            1.6e-06: authors' code: the first rate divided by 1e4
    train.optimizer           "sgd": authors' code: SGD with momentum 0.9
    train.weight_decay        0.0005: authors' code: 5e-4
    train.decay_mask          "not-bn-named": authors' code: not on parameters named bn
    train.nesterov            true: authors' code
    train.cycle_momentum      true: authors' code: OneCycleLR's default, from 0.95 to 0.85 and back
    train.ema_decay           0.995: authors' code: grows to 0.995
    train.ema_warmup_epochs   10: authors' code: copies for 10 epochs
    train.ema_statistics      "copied": authors' code: copied from the network
    train.bn_statistics       "adversarial": authors' code: running statistics of adversarial images
          only
    train.bn_momentum         [1.0, 0.01]: authors' code: 100% in the first update, then 1%
    attack.name               "pgd": authors' code: PGD
    attack.epsilon            0.03137254901960784: authors' code: 8/255
    attack.steps              10: authors' code: 10
    attack.relative_step      0.25: authors' code: 2/255
    attack.start              "uniform-boxed": authors' code: uniform in the ball, clipped to [0, 1]
    attack.statistics         "batch": authors' code: the attack uses batch statistics
    evaluation.attack         "cw-40": authors' code: the CW margin with a lower limit, 40 steps
    evaluation.step_size      0.00784313725490196: authors' code: 2/255
    evaluation.start          "uniform-boxed": authors' code: uniform in the ball, clipped to [0, 1]

The beta of TRADES, 6, the batch, 1,024, and the 10 epochs in which the rate rises are defaults.

Published on cifar10 (clean, AutoAttack):

    robustresnet_a1, extra=500k   -, 63.70
    wrn_a4, extra=500k            91.58, 65.79
    wrn_34_r, extra=500k          -, 62.54

With 500k, AutoAttack of others with WRN-28-10: RST 59.53, AWP 60.04, HAT 62.50, Gowal et al. 62.80.

Not as there: float32 instead of mixed precision; the 1,024 images are the first of our order, not
of the archive's; batch norms see the images of a device together (theirs 128 on each of 8 GPUs:
--config.model.options.bn_group=128); the average counts 49 updates an epoch, where their counter
moves by 537, so that it reaches 0.995 in epoch 47 and theirs in epoch 15. How the 61.1% without
extra images was trained is not published. Hardware, wall time, accuracies of ours: not yet
measured.
"""

from configs import cifar_bat
from configs.cifar_bat import MODELS, SMOOTH
from jaxrobust.config import ArgumentError, base, read_arguments

ROWS = ("resnet18,data=cifar100,activation=relu", "resnet18,extra=500k,activation=relu")
SOURCES = cifar_bat.SOURCES | {
    "model.options": "authors' code: SiLU; ours: ResNets for other data use the stem for 32 px",
    "init.normalize": "authors' code: the data set's mean and std",
    "data.*_split": "authors' code: 1,024 training images choose the epoch; ours: which ones",
    "data.extra": "the paper: 500,000 images with pseudo-labels of Carmon et al. 2019",
    "data.extra_share": "authors' code: 0.7 of a batch",
    "data.epoch_images": "authors' code: 49 steps per epoch",
    "label_smoothing": "authors' code",
    "train.epochs": "authors' code: 400",
    "train.batch_size": "authors' code: 1024",
    "train.lr": "authors' code: 0.4",
    "train.schedule": "authors' code: PyTorch's OneCycleLR, per epoch: up to the peak, then down "
    "along a cosine",
    "train.warmup_lr": "authors' code: a 25th of the peak",
    "train.final_lr": "authors' code: the first rate divided by 1e4",
    "train.weight_decay": "authors' code: 5e-4",
    "train.decay_mask": "authors' code: not on parameters named bn",
    "train.nesterov": "authors' code",
    "train.cycle_momentum": "authors' code: OneCycleLR's default, from 0.95 to 0.85 and back",
    "train.ema_decay": "authors' code: grows to 0.995",
    "train.ema_warmup_epochs": "authors' code: copies for 10 epochs",
    "train.ema_statistics": "authors' code: copied from the network",
    "train.bn_statistics": "authors' code: running statistics of adversarial images only",
    "train.bn_momentum": "authors' code: 100% in the first update, then 1%",
    "attack.start": "authors' code: uniform in the ball, clipped to [0, 1]",
    "attack.statistics": "authors' code: the attack uses batch statistics",
    "evaluation.attack": "authors' code: the CW margin with a lower limit, 40 steps",
    "evaluation.step_size": "authors' code: 2/255",
    "evaluation.start": "authors' code: uniform in the ball, clipped to [0, 1]",
}


def get_config(arguments: str = ""):
    a = read_arguments(
        arguments,
        model=MODELS,
        data=("cifar10", "cifar100"),
        extra=("none", "500k"),
        activation=("silu", "relu"),
    )
    if (a["data"], a["extra"]) == ("cifar100", "500k"):
        raise ArgumentError("extra=500k has the classes of cifar10; leave it out")
    smooth = a["model"].startswith(SMOOTH)
    if not smooth and a["activation"] != "relu":
        raise ArgumentError(f"{a['model']} has no silu; add activation=relu")
    config = base()
    classes = 10 if a["data"] == "cifar10" else 100
    config.model.update(name=a["model"], num_classes=classes, image_size=32)
    config.model.options = {"activation": a["activation"]} if smooth else {}
    if a["model"].startswith("resnet"):
        config.model.options = {"small_stem": True}
    config.init.normalize = a["data"]
    config.data.update(name=a["data"], train_split="train[1024:]", selection_split="train[:1024]")
    config.data.update(test_split="test", augmentation="crop|flip")
    if a["extra"] == "500k":
        config.data.update(extra="npz:ti_500K_pseudo_labeled.npz", extra_share=0.7)
        config.data.epoch_images = 49 * 1024
    config.label_smoothing = 0.1
    config.train.update(objective="trades", bn_statistics="adversarial", bn_momentum=(1.0, 0.01))
    config.train.update(epochs=400, batch_size=1024, optimizer="sgd", nesterov=True)
    config.train.update(schedule="one-cycle", cycle_momentum=True, warmup_epochs=10, lr=0.4)
    config.train.update(warmup_lr=0.4 / 25, final_lr=0.4 / 25 / 1e4)
    config.train.update(weight_decay=5e-4, decay_mask="not-bn-named")
    config.train.update(ema_decay=0.995, ema_warmup_epochs=10, ema_statistics="copied")
    config.attack.update(name="pgd", epsilon=8 / 255, steps=10, relative_step=0.25)
    config.attack.update(start="uniform-boxed", statistics="batch")
    config.evaluation.update(attack="cw-40", step_size=2 / 255, start="uniform-boxed")
    return config
