"""Robust networks of ImageNet on small data sets, adversarially, at 8/255.

    jaxrobust train --config configs/transfer.py:convnext_t_cvst,cifar10

The arguments are a network and its data: convnext_t_cvst or convnext_b_cvst with cifar10, cifar100
or flowers (Singh, Croce, Hein 2023, Table 6), xcit_s12, xcit_m12 or xcit_l12 with these or caltech
(Debenedetti et al. 2022), resnet50 with flowers or caltech (Debenedetti's thesis, Table 7); then,
with their defaults first,

    objective=adversarial|clean  clean: xcit_s12 and resnet50 on flowers and caltech (Table 7)
    start=robust|random          random: xcit_s12 on cifar10, 300 epochs (the thesis' Table 8); half
                                 of each batch is synthetic with --config.data.extra=npz:FILE
    augmentation=thesis|code     of XCiTs on CIFAR: crops of 0.8 to 1.2 of the image and erasing, as
                                 the thesis' runs had it, or the repository's later ones

The weights that they start from, robust at 8/255 on ImageNet, are not published: they are those of
`configs/larger_radius.py` and of `configs/light_recipe.py:MODEL,epsilon=8`, whose runs next to this
one's workdir are used, or made first where they are not finished. The ResNet-50 starts from that of
Salman et al. 2020, which the hub has. `--config.init.weights=FOLDER` names others.

Published, in % (clean, AutoAttack at 8/255):

                       cifar10        cifar100       flowers        caltech
    convnext_t_cvst    92.72, 55.97   72.32, 32.30   80.42, 50.89
    convnext_b_cvst    93.55, 58.17   74.83, 34.24   83.98, 54.77
    xcit_s12           90.06, 56.14   67.34, 32.19+  82.86, 47.91+  87.59, 61.74+
    xcit_m12           91.30, 57.27+  69.21, 34.21+
    xcit_l12           91.73, 57.58+  70.76, 35.08+
    and with objective=clean, whose robust accuracy is not given
    xcit_s12                                         89.08          90.42
    resnet50                                         82.30          86.97
    and in the thesis' own adversarial runs
    xcit_s12                                         85.01, 29.37   89.66, 49.66
    resnet50                                         70.61, 21.52   83.22, 33.90
    and with start=random
    xcit_s12           82.84, 39.49 (half synthetic: 80.01, 47.88)

Figures with + are of the authors' repository (the later paper's runs), the other ones of XCiT and
ResNet-50 of the thesis.

Keys that are not defaults, by `jaxrobust why configs/transfer.py:convnext_t_cvst,cifar10`:

    model.num_classes                 10: ours: as in TFDS
    model.image_size                  32: Table 6 and thesis, Table 8
    model.dtype                       "bfloat16": ours: bfloat16, in which TPUs multiply by default;
          theirs was nominally float32
    model.options.stem_strides        [1, 1]: appendix D.6 (a ConvNeXt's); authors' code (XCiT's)
    model.options.downsample_strides  [1, 2, 2]: appendix D.6
    init.weights                      "run:larger_radius:convnext_t_cvst": Table 6: networks that
          are robust at 8/255, from our runs
    init.head                         "fresh-torch": authors' code: a new linear layer, initialized
          as in PyTorch
    data.name                         "cifar10": Table 6 and thesis, Table 7
    data.train_split                  "train[:98%]": ours: images that choose the epoch are not
          among the reported ones
    data.selection_split              "train[98%:]": ours: images that choose the epoch are not
          among the reported ones
    data.test_split                   "test": ours: images that choose the epoch are not among the
          reported ones
    data.augmentation                 "crop|flip|randaugment": appendix D.6: RandAugment; thesis,
          section 4.2.1: on CIFAR no color jitter (later runs of the repository: 0.25, with crops
          and rotations) and no mention of erasing (authors' code: 0.2 at the time, 0 in later
          runs); otherwise as in the light recipe, for clean runs as in DeiT
    train.epochs                      20: appendix D.6 and thesis, section 4.2: 20; authors' code
          for XCiT: plus 2 (CIFAR) or 10
    train.lr                          0.0002: appendix D.6; authors' code for XCiT, later with
          2.83e-4 on CIFAR
    train.warmup_epochs               2: appendix D.6: 2; authors' code: 5
    train.weight_decay                0.0: appendix D.6; authors' code; thesis, Table 4
    train.ema_decay                   0.99: ours: 0.99 for the ConvNeXts, because over so few steps
          an average with 0.9999 stays at the start; authors' code for XCiT: no averaging
    attack.epsilon                    0.03137254901960784: Table 6 and thesis, section 4.2
    attack.steps                      10: appendix D.6 and thesis, section 4.2: ten on CIFAR, else
          two of APGD or one

Keys that are not defaults, by `jaxrobust why configs/transfer.py:xcit_s12,cifar10`:

    model.name                  "xcit_s12": Table 6 and thesis, Tables 7 and 8
    model.num_classes           10: ours: as in TFDS
    model.image_size            32: Table 6 and thesis, Table 8
    model.dtype                 "bfloat16": ours: bfloat16, in which TPUs multiply by default;
          theirs was nominally float32
    model.options.stem_strides  [1, 1, 2, 2]: appendix D.6 (a ConvNeXt's); authors' code (XCiT's)
    model.options.bn_group      64: authors' code: batch norms see the 64 images of a core
    model.options.drop_path     0.05: authors' code: the same at all depths
    init.weights                "run:light_recipe:xcit_s12,epsilon=8": Table 6: networks that are
          robust at 8/255, from our runs
    init.head                   "fresh-torch": authors' code: a new linear layer, initialized as in
          PyTorch
    init.normalize              "cifar10": authors' code: for CIFAR its mean and std, otherwise 0.5
    data.name                   "cifar10": Table 6 and thesis, Table 7
    data.train_split            "train[:98%]": ours: images that choose the epoch are not among the
          reported ones
    data.selection_split        "train[98%:]": ours: images that choose the epoch are not among the
          reported ones
    data.test_split             "test": ours: images that choose the epoch are not among the
          reported ones
    data.augmentation           "light-cifar-thesis": appendix D.6: RandAugment; thesis, section
          4.2.1: on CIFAR no color jitter (later runs of the repository: 0.25, with crops and
          rotations) and no mention of erasing (authors' code: 0.2 at the time, 0 in later runs);
          otherwise as in the light recipe, for clean runs as in DeiT
    train.objective             "trades": thesis, section 4.2: TRADES on CIFAR; its clean runs
    train.epochs                22: appendix D.6 and thesis, section 4.2: 20; authors' code for
          XCiT: plus 2 (CIFAR) or 10
    train.batch_size            512: appendix D.6, but ours is 32 instead of 30 (flowers); thesis,
          section 4.2, where later runs of the repository have 1,024 on CIFAR
    train.lr                    0.0002: appendix D.6; authors' code for XCiT, later with 2.83e-4 on
          CIFAR
    train.schedule              "epoch-cosine": authors' code: a cosine that is constant within an
          epoch
    train.warmup_epochs         5: appendix D.6: 2; authors' code: 5
    train.warmup_lr             1e-06: authors' code: 1e-6; the thesis has 5e-6
    train.cooldown_epochs       2: authors' code: at the last rate
    train.weight_decay          0.5: appendix D.6; authors' code; thesis, Table 4
    train.b2                    0.999: authors' code: AdamW's default
    train.ema_decay             0.0: ours: 0.99 for the ConvNeXts, because over so few steps an
          average with 0.9999 stays at the start; authors' code for XCiT: no averaging
    attack.name                 "pgd": authors' code; thesis, section 4.2: FGSM, but ten steps of
          PGD on CIFAR
    attack.epsilon              0.03137254901960784: Table 6 and thesis, section 4.2
    attack.steps                10: appendix D.6 and thesis, section 4.2: ten on CIFAR, else two of
          APGD or one
    attack.relative_step        0.15: authors' code: 1.5 divided by the steps
    attack.start                "random": authors' code: uniform in the ball
    attack.statistics           "batch": authors' code: on TPUs batch norms are in training mode
          under attack
    evaluation.weights          "raw": authors' code: no averaging

The ConvNeXts are trained with APGD, the default. The number of synthetic images of a run was not
told (15 million are public). Hardware, wall time, accuracies of ours: not yet measured.
"""

from configs import light_recipe
from jaxrobust.config import ArgumentError, base, read_arguments

# classes, training, selection and test split.
_DATA = {
    "cifar10": ("cifar10", 10, "train[:98%]", "train[98%:]", "test"),
    "cifar100": ("cifar100", 100, "train[:98%]", "train[98%:]", "test"),
    "flowers": ("oxford_flowers102", 102, "train", "validation", "test"),
    "caltech": ("caltech101", 102, "train[:95%]", "train[95%:]", "test"),
}
MODELS = ("convnext_t_cvst", "convnext_b_cvst", "xcit_s12", "xcit_m12", "xcit_l12", "resnet50")
ROWS = (
    "convnext_t_cvst,data=cifar10",
    "convnext_b_cvst,data=flowers",
    "xcit_s12,data=cifar100",
    "xcit_s12,data=caltech",
    "xcit_s12,data=cifar10,start=random",
    "resnet50,data=flowers,objective=clean",
)
# Of a ConvNeXt appendix D.6 counts, of XCiT and ResNet-50 the thesis and its authors' code.
SOURCES = light_recipe.SOURCES | {
    "model.name": "Table 6 and thesis, Tables 7 and 8",
    "model.num_classes": "ours: as in TFDS",
    "model.image_size": "Table 6 and thesis, Table 8",
    "model.options.stem_strides": "appendix D.6 (a ConvNeXt's); authors' code (XCiT's)",
    "model.options.downsample_strides": "appendix D.6",
    "init.weights": "Table 6: networks that are robust at 8/255, from our runs",
    "init.head": "authors' code: a new linear layer, initialized as in PyTorch",
    "init.normalize": "authors' code: for CIFAR its mean and std, otherwise 0.5",
    "data.name": "Table 6 and thesis, Table 7",
    "data.*_split": "ours: images that choose the epoch are not among the reported ones",
    "data.augmentation": "appendix D.6: RandAugment; thesis, section 4.2.1: on CIFAR no color "
    "jitter (later runs of the repository: 0.25, with crops and rotations) and no mention of "
    "erasing (authors' code: 0.2 at the time, 0 in later runs); otherwise as in the light recipe, "
    "for clean runs as in DeiT",
    "train.objective": "thesis, section 4.2: TRADES on CIFAR; its clean runs",
    "train.epochs": "appendix D.6 and thesis, section 4.2: 20; authors' code for XCiT: plus 2 "
    "(CIFAR) or 10",
    "train.lr": "appendix D.6; authors' code for XCiT, later with 2.83e-4 on CIFAR",
    "train.batch_size": "appendix D.6, but ours is 32 instead of 30 (flowers); thesis, section "
    "4.2, where later runs of the repository have 1,024 on CIFAR",
    "train.weight_decay": "appendix D.6; authors' code; thesis, Table 4",
    "train.warmup_epochs": "appendix D.6: 2; authors' code: 5",
    "train.final_lr": "authors' code: 5e-6",
    "train.ema_decay": "ours: 0.99 for the ConvNeXts, because over so few steps an average with "
    "0.9999 stays at the start; authors' code for XCiT: no averaging",
    "train.from_random": "thesis, Table 8",
    "attack.name": "authors' code; thesis, section 4.2: FGSM, but ten steps of PGD on CIFAR",
    "attack.steps": "appendix D.6 and thesis, section 4.2: ten on CIFAR, else two of APGD or one",
    "attack.epsilon": "Table 6 and thesis, section 4.2",
    "attack.relative_step": "authors' code: 1.5 divided by the steps",
}


def get_config(arguments: str = ""):
    words = arguments.split(",")
    if len(words) > 1 and "=" not in words[1]:  # the data set needs no name either
        words[1] = f"data={words[1]}"
    a = read_arguments(
        ",".join(words),
        model=MODELS,
        data=(None, *_DATA),
        objective=("adversarial", "clean"),
        start=("robust", "random"),
        augmentation=(None, "thesis", "code"),
    )
    _check(**a)
    config = base()
    name, classes, train, selection, test = _DATA[a["data"]]
    config.model.update(name=a["model"], dtype="bfloat16", num_classes=classes)
    config.data.update(name=name, train_split=train, selection_split=selection, test_split=test)
    config.attack.epsilon = 8 / 255
    config.train.epochs = 20
    config.init.head = "fresh-torch"
    small = a["data"].startswith("cifar")
    if small:
        config.model.image_size = 32
    if a["model"].startswith("convnext"):
        _convnext(config, a["data"], small=small)
    else:
        _light(config, a["data"], small=small)
    if a["augmentation"] == "code":
        config.data.augmentation = "light-cifar"
    if a["objective"] == "clean":
        config.data.augmentation = "heavy"
        config.erase.noise = "truncated"
        config.train.update(objective="clean", weight_decay=0.05)
    if a["start"] == "random":
        config.init.update(weights=None, head="keep")
        config.train.update(epochs=300, cooldown_epochs=0, from_random=True)
    return config


def _check(
    model: str, data: str | None, objective: str, start: str, augmentation: str | None
) -> None:
    """Raise `ArgumentError` where the papers have no such run."""
    if data is None:
        raise ArgumentError(f"add the data after the model; choose one of {', '.join(_DATA)}")
    if model.startswith("convnext") and data == "caltech":
        raise ArgumentError("data=caltech is not for the ConvNeXts; use cifar10, cifar100, flowers")
    large = data in ("flowers", "caltech")
    if model == "resnet50" and not large:
        raise ArgumentError(f"data={data} is not for resnet50; use flowers or caltech")
    if objective == "clean" and not (large and model in ("xcit_s12", "resnet50")):
        of = "xcit_s12 and resnet50 on flowers and caltech"
        raise ArgumentError(f"objective=clean is only for {of}; leave it out")
    if start == "random" and (model, data) != ("xcit_s12", "cifar10"):
        raise ArgumentError("start=random is only for xcit_s12 on cifar10; leave it out")
    if augmentation and not (model.startswith("xcit") and data.startswith("cifar")):
        raise ArgumentError(f"augmentation={augmentation} is only for XCiTs on CIFAR; leave it out")


def _convnext(config, data: str, *, small: bool) -> None:
    """Set what Singh, Croce, Hein 2023 say of their fine-tuning, and of the rest what they do."""
    config.init.weights = f"run:larger_radius:{config.model.name}"
    config.data.augmentation = "crop|flip|randaugment" if small else "resized-crop|flip|randaugment"
    config.attack.steps = 10 if small else 2
    # Of 940, 3,820 and 620 steps in all, an average with their 0.9999 would be 91, 68 and 94% the
    # start.
    config.train.update(warmup_epochs=2, ema_decay=0.99)
    own = {
        "cifar10": {"lr": 2e-4, "weight_decay": 0.0, "batch_size": 1024},
        "cifar100": {"lr": 2e-4, "weight_decay": 5e-3, "batch_size": 256},
        "flowers": {"lr": 4e-3, "weight_decay": 5e-3, "batch_size": 32},
    }
    config.train.update(own[data])
    if small:
        stem = (1, 1) if config.model.name == "convnext_t_cvst" else (1, 1, 1)
        config.model.options = {"stem_strides": stem, "downsample_strides": (1, 2, 2)}


def _light(config, data: str, *, small: bool) -> None:
    """Set what the light recipe's code has for small data sets."""
    config.init.weights = f"run:light_recipe:{config.model.name},epsilon=8"
    config.model.options = {"drop_path": 0.05, "bn_group": 64}
    if config.model.name == "resnet50":
        config.init.weights = "hf://madrylab/robust-imagenet-models/resnet50_linf_eps8.0.ckpt"
        config.model.options = {"bn_group": 64}
    config.train.update(weight_decay=0.5, b2=0.999, ema_decay=0.0, batch_size=512)
    config.train.update(schedule="epoch-cosine", warmup_epochs=5, warmup_lr=1e-6, final_lr=5e-6)
    config.evaluation.weights = "raw"
    config.attack.update(start="random", statistics="batch")
    if small:
        config.model.options = {"stem_strides": (1, 1, 2, 2)} | dict(config.model.options)
        config.init.normalize = data
        config.data.augmentation = "light-cifar-thesis"
        config.train.update(objective="trades", trades_beta=6.0, lr=2e-4, epochs=22)
        config.train.cooldown_epochs = 2
        config.attack.update(name="pgd", steps=10, relative_step=0.15)
    else:
        config.init.normalize = "half"
        config.data.update(augmentation="light", preprocessing="bicubic-1.0")
        config.label_smoothing = 0.1
        config.train.update(lr=5e-5, epochs=30, cooldown_epochs=10)
        config.attack.update(name="fgsm", relative_step=1.5, labels="hard")
