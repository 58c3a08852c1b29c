"""TRADES with millions of generated images (Wang et al. 2023, arXiv 2302.04638).

    jaxrobust prepare generated 1m.npz --out edm_cifar10_1m
    jaxrobust train --config configs/generated_data.py:wrn_28_10,images=1m

The arguments are a network, wrn_28_10 or wrn_70_16 (DeepMind's, with SiLU), and then, with their
defaults first,

    images=1m|5m|20m|50m     shards in edm_DATA_IMAGES, made of the authors' files, of which 20m and
                             50m come in parts (all of them in one command); other shards are
                             --config.data.extra=generated:DIR
    data=cifar10|cifar100    for cifar100 the files are prepared with --classes 100
    epochs=100|200|400|800|1600|2400   default: 400, 800, 2400 and 1600, as images grow
    batch=512|1024|2048      default: 512, 1024, 2048 and 2048

Keys that are not defaults, by `jaxrobust why configs/generated_data.py:wrn_28_10,images=1m`:

    model.name                 "dm_wrn_28_10": authors' code: WRN-28-10 and WRN-70-16 with Swish
    model.num_classes          10: ours: as in the data set
    model.image_size           32: the paper: CIFAR
    model.options.bn_momentum  0.01: authors' code: 1%, after 100% in the first update
    data.name                  "cifar10": the paper: CIFAR
    data.train_split           "train[1024:]": authors' code: 1,024 training images choose the
          epoch; ours: which ones
    data.selection_split       "train[:1024]": authors' code: 1,024 training images choose the
          epoch; ours: which ones
    data.test_split            "test": authors' code: 1,024 training images choose the epoch; ours:
          which ones
    data.augmentation          "crop|flip": authors' code: crops and flips, also for generated
          images
    data.extra                 "generated:edm_cifar10_1m": the paper: images of a diffusion model
          (EDM); ours: in shards
    data.extra_share           0.7: authors' code: 0.7 for 1m; code of Bartoldson et al. 2024: 0.8
          for more
    data.epoch_images          50176: authors' code: an epoch is 50,000 rows, as many as real
          images, in whole batches
    label_smoothing            0.1: authors' code: 0.1
    train.objective            "trades": the paper: TRADES
    train.trades_beta          5.0: authors' code: 5
    train.epochs               400: authors' code: 400 for 1m; ours: the others, which their page
          does not give
    train.batch_size           512: authors' code: 512 for 1m; ours: the others, which their page
          does not give
    train.lr                   0.2: authors' code: 0.2
    train.schedule             "one-cycle": authors' code: PyTorch's OneCycleLR, per epoch: up to
          the peak over 2.5% of them, then down along a cosine
    train.warmup_lr            0.008: authors' code: a 25th of the peak
    train.final_lr             8e-07: authors' code: the first rate divided by 1e4
    train.optimizer            "sgd": authors' code: SGD with momentum 0.9
    train.weight_decay         0.0005: authors' code: 5e-4
    train.decay_mask           "not-bn-named": authors' code: not on batch norms
    train.nesterov             true: authors' code
    train.cycle_momentum       true: authors' code: OneCycleLR's default
    train.ema_decay            0.995: authors' code: 0.995
    train.ema_warmup_epochs    10: authors' code: copies for 2.5% of the epochs
    train.ema_statistics       "copied": authors' code: copied from the network
    attack.name                "pgd": authors' code: PGD
    attack.epsilon             0.03137254901960784: the paper: 8/255
    attack.steps               10: authors' code: 10
    attack.relative_step       0.25: authors' code: 2/255
    attack.start               "uniform-boxed": authors' code: uniform in the ball, clipped to [0,
          1]
    attack.statistics          "batch": authors' code: the attack uses batch statistics
    evaluation.attack          "cw-40": authors' code: the CW margin, 40 steps
    evaluation.step_size       0.00784313725490196: authors' code: 2/255
    evaluation.start           "uniform-boxed": authors' code: uniform in the ball, clipped to [0,
          1]

Published on cifar10, in % (clean, AutoAttack):

    wrn_28_10, images=20m    92.44, 67.31
    wrn_70_16, images=50m    93.25, 70.69

and on cifar100 with images=50m

    wrn_28_10                72.58, 38.83
    wrn_70_16                75.22, 42.67

What it costs by `jaxrobust estimate --on h100:8`, computed at an assumed 20% of the chips' peak
and never compared with a run: wrn_28_10 takes 8.6, 17.1, 52.3 and 34.9 chip-hours with 1m, 5m, 20m
and 50m; wrn_70_16 258 with 50m, and on eight chips 102 GiB of each (16 chips have enough, or
--config.train.microbatches=2).

Not as there: float32 instead of mixed precision; generated images are drawn without repetition
within a pass over the real ones; the 1,024 images are the first of our order, not of the archive's;
running statistics move by 1% in the first update too, where theirs take all of it.
Hardware, wall time, accuracies of ours: not yet measured.
"""

from jaxrobust.config import base, read_arguments

MODELS = ("wrn_28_10", "wrn_70_16")
ROWS = ("wrn_28_10,images=1m", "wrn_28_10,images=20m", "wrn_70_16,images=50m,data=cifar100")
# images -> share of a batch, epochs, images of a batch.
SETS = {
    "1m": (0.7, 400, 512),
    "5m": (0.8, 800, 1024),
    "20m": (0.8, 2400, 2048),
    "50m": (0.8, 1600, 2048),
}
REAL = 50_000
SOURCES = {
    "model.name": "authors' code: WRN-28-10 and WRN-70-16 with Swish",
    "model.options.bn_momentum": "authors' code: 1%, after 100% in the first update",
    "model.num_classes": "ours: as in the data set",
    "model.image_size": "the paper: CIFAR",
    "data.name": "the paper: CIFAR",
    "data.*_split": "authors' code: 1,024 training images choose the epoch; ours: which ones",
    "data.augmentation": "authors' code: crops and flips, also for generated images",
    "data.extra": "the paper: images of a diffusion model (EDM); ours: in shards",
    "data.extra_share": "authors' code: 0.7 for 1m; code of Bartoldson et al. 2024: 0.8 for more",
    "data.epoch_images": "authors' code: an epoch is 50,000 rows, as many as real images, in "
    "whole batches",
    "label_smoothing": "authors' code: 0.1",
    "train.objective": "the paper: TRADES",
    "train.trades_beta": "authors' code: 5",
    "train.epochs": "authors' code: 400 for 1m; ours: the others, which their page does not give",
    "train.batch_size": "authors' code: 512 for 1m; ours: the others, which their page does not "
    "give",
    "train.lr": "authors' code: 0.2",
    "train.schedule": "authors' code: PyTorch's OneCycleLR, per epoch: up to the peak over 2.5% "
    "of them, then down along a cosine",
    "train.warmup_epochs": "authors' code: 2.5% of the epochs",
    "train.warmup_lr": "authors' code: a 25th of the peak",
    "train.final_lr": "authors' code: the first rate divided by 1e4",
    "train.optimizer": "authors' code: SGD with momentum 0.9",
    "train.weight_decay": "authors' code: 5e-4",
    "train.decay_mask": "authors' code: not on batch norms",
    "train.nesterov": "authors' code",
    "train.cycle_momentum": "authors' code: OneCycleLR's default",
    "train.ema_decay": "authors' code: 0.995",
    "train.ema_warmup_epochs": "authors' code: copies for 2.5% of the epochs",
    "train.ema_statistics": "authors' code: copied from the network",
    "attack.name": "authors' code: PGD",
    "attack.epsilon": "the paper: 8/255",
    "attack.steps": "authors' code: 10",
    "attack.relative_step": "authors' code: 2/255",
    "attack.start": "authors' code: uniform in the ball, clipped to [0, 1]",
    "attack.statistics": "authors' code: the attack uses batch statistics",
    "evaluation.attack": "authors' code: the CW margin, 40 steps",
    "evaluation.step_size": "authors' code: 2/255",
    "evaluation.start": "authors' code: uniform in the ball, clipped to [0, 1]",
}


def get_config(arguments: str = ""):
    a = read_arguments(
        arguments,
        model=MODELS,
        images=tuple(SETS),
        data=("cifar10", "cifar100"),
        epochs=(None, 100, 200, 400, 800, 1600, 2400),
        batch=(None, 512, 1024, 2048),
    )
    share, epochs, batch = SETS[a["images"]]
    epochs, batch = a["epochs"] or epochs, a["batch"] or batch
    config = base()
    classes = 10 if a["data"] == "cifar10" else 100
    config.model.update(name=f"dm_{a['model']}", num_classes=classes, image_size=32)
    config.model.options = {"bn_momentum": 0.01}
    config.data.update(name=a["data"], train_split="train[1024:]", selection_split="train[:1024]")
    config.data.update(test_split="test", augmentation="crop|flip")
    config.data.update(extra=f"generated:edm_{a['data']}_{a['images']}", extra_share=share)
    config.data.epoch_images = -(-REAL // batch) * batch
    config.label_smoothing = 0.1
    config.train.update(objective="trades", trades_beta=5.0)
    config.train.update(epochs=epochs, batch_size=batch, optimizer="sgd", nesterov=True)
    warmup = round(0.025 * epochs)
    config.train.update(schedule="one-cycle", cycle_momentum=True, warmup_epochs=warmup, lr=0.2)
    config.train.update(warmup_lr=0.2 / 25, final_lr=0.2 / 25 / 1e4)
    config.train.update(weight_decay=5e-4, decay_mask="not-bn-named")
    config.train.update(ema_decay=0.995, ema_warmup_epochs=warmup, ema_statistics="copied")
    config.attack.update(name="pgd", epsilon=8 / 255, steps=10, relative_step=0.25)
    config.attack.update(start="uniform-boxed", statistics="batch")
    config.evaluation.update(attack="cw-40", step_size=2 / 255, start="uniform-boxed")
    return config
