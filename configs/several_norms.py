"""Robust to linf, l2 and l1 at once (Croce & Hein 2022, arXiv 2105.12508, "Adversarial Robustness
against Multiple and Single lp-Threat Models via Quick Fine-Tuning of Robust Classifiers").

    jaxrobust train --config configs/several_norms.py:wrn_28_10

The arguments are a network and then, with their defaults first,

    start=linf|scratch  linf: fine-tuning of a network that is robust to linf alone. At 32 px that
                        is the run of `cifar_bat.py:MODEL,objective=adversarial` next to this one's
                        workdir, trained first where it is not finished; at 224 px the published
                        network, by its RobustBench id. scratch: random weights at 32 px, at 224 px
                        those of `convstem_pretraining.py:MODEL`, as `revisiting_at.py` starts
    mix=extreme|worst|average|alternate|msd|ramp
                        E-AT of the paper; MAX and AVG of Tramèr & Boneh 2019, which cost three
                        attacks a step (AVG three updates too); one norm a step in turn; multi
                        steepest descent of Maini, Wong, Kolter 2020, by PGD; linf and l1 paired by
                        the loss of Jiang & Singh 2024, without their gradient projection
    epochs=...          1, 3, 10, 30, 50, 80 or 100; default: 3 of fine-tuning (the paper has one on
                        ImageNet), of scratch 80 on CIFAR-10 and 50 on ImageNet, which are ours
    selection=held-out|test
                        at 32 px: which images choose the epoch, the last 1,000 of training, or
                        those that are reported

Networks: wrn_28_10 and resnet18 on CIFAR-10, convnext_t_cvst, vit_s_cvst and convnext_b_cvst on
ImageNet. The epoch is chosen by the union: an image counts when it withstands all three norms; so
does the test, whose record has the accuracy after each norm.

Keys that are not defaults, by `jaxrobust why configs/several_norms.py:wrn_28_10`:

    model.name            "wrn_28_10": the paper: WRN-28-10; ours: the others
    model.num_classes     10: ours: as in the data set
    model.image_size      32: ours: as in the data set
    init.weights          "run:cifar_bat:wrn_28_10,objective=adversarial": the paper: a network that
          is robust to one norm; ours: which one
    init.normalize        "none": ours: as for the network that is fine-tuned, or as in
          revisiting_at.py
    data.name             "cifar10": the paper: CIFAR-10 and ImageNet
    data.train_split      "train[:49000]": ours: the last 1,000 training images choose the epoch;
          with selection=test the reported ones
    data.selection_split  "train[49000:]": ours: the last 1,000 training images choose the epoch;
          with selection=test the reported ones
    data.test_split       "test": ours: the last 1,000 training images choose the epoch; with
          selection=test the reported ones
    data.augmentation     "crop|flip": ours: crops and flips; heavy for ImageNet, as its networks
          had it
    train.epochs          3: the paper: three for fine-tuning on CIFAR-10; ours: the others
    train.batch_size      128: authors' code: 128; ours: for ImageNet as in revisiting_at.py
    train.lr              0.01: authors' code: 0.01 for fine-tuning; ours: 0.05 from scratch, 1e-4
          on ImageNet
    train.schedule        "step": authors' code: divided by ten at two epochs
    train.warmup_epochs   0: authors' code: none; ours: one on ImageNet
    train.lr_steps        [0.3333333333333333, 0.6666666666666666]: authors' code: a third and two
          thirds when fine-tuning, otherwise a half and 3/4
    train.optimizer       "sgd": authors' code: SGD with momentum 0.9
    train.weight_decay    0.0005: authors' code: 5e-4
    train.decay_mask      "all": authors' code: on all parameters where it fine-tunes
    train.ema_decay       0.0: authors' code: no averaging
    attack.norm           ["linf", "l2", "l1"]: the paper: linf and l1 are trained; l2 lies between,
          and counts in the union
    attack.epsilon        [0.03137254901960784, 0.5, 12.0]: authors' code: 8/255, 0.5 and 12 for
          CIFAR-10; the paper: 4/255, 2 and 255 for ImageNet
    attack.mix            "extreme": the paper: E-AT; ours: the others, worst and average as in
          Tramèr & Boneh 2019, msd as in Maini et al. 2020, pair as in Jiang & Singh 2024
    attack.steps          10: ours: ten steps of APGD at 32 px, two at 224 px
    evaluation.weights    "raw": authors' code: no averaging

`jaxrobust evaluate --workdir RUN` attacks each norm by AutoAttack, and counts the union.
The paper reports that three epochs turn any network robust to one norm into one robust to all, and
more than 51% of CIFAR-10's test images in the union. Hardware, wall time, accuracies of ours: not
yet measured.
"""

from typing import Any

from configs import cifar_bat, larger_radius, revisiting_at
from jaxrobust.config import ArgumentError, read_arguments

AT_32 = ("wrn_28_10", "resnet18")
MODELS = (*AT_32, *larger_radius.PUBLISHED)
NORMS = ("linf", "l2", "l1")
RADII = {32: (8 / 255, 0.5, 12.0), 224: (4 / 255, 2.0, 255.0)}
SCRATCH_EPOCHS = {32: 80, 224: 50}
ROWS = (
    "wrn_28_10",
    "resnet18,start=scratch,mix=worst,selection=test",
    "convnext_t_cvst",
    "vit_s_cvst,start=scratch,mix=alternate",
    "wrn_28_10,mix=ramp",
    "resnet18,mix=msd,selection=test",
)
# Where the value of each key comes from that is not a default: `jaxrobust why` prints it.
SOURCES = {
    "model.name": "the paper: WRN-28-10; ours: the others",
    "model.dtype": "ours: what TPUs multiply",
    "model.num_classes": "ours: as in the data set",
    "model.image_size": "ours: as in the data set",
    "model.options": "ours: ResNets for other data use the stem for 32 px",
    "init.weights": "the paper: a network that is robust to one norm; ours: which one",
    "init.normalize": "ours: as for the network that is fine-tuned, or as in revisiting_at.py",
    "data.name": "the paper: CIFAR-10 and ImageNet",
    "data.*_split": "ours: the last 1,000 training images choose the epoch; with selection=test "
    "the reported ones",
    "data.augmentation": "ours: crops and flips; heavy for ImageNet, as its networks had it",
    "pretrain.batch_size": "ours: as in revisiting_at.py",
    "train.epochs": "the paper: three for fine-tuning on CIFAR-10; ours: the others",
    "train.batch_size": "authors' code: 128; ours: for ImageNet as in revisiting_at.py",
    "train.lr": "authors' code: 0.01 for fine-tuning; ours: 0.05 from scratch, 1e-4 on ImageNet",
    "train.schedule": "authors' code: divided by ten at two epochs",
    "train.lr_steps": "authors' code: a third and two thirds when fine-tuning, otherwise a half "
    "and 3/4",
    "train.warmup_epochs": "authors' code: none; ours: one on ImageNet",
    "train.optimizer": "authors' code: SGD with momentum 0.9",
    "train.weight_decay": "authors' code: 5e-4",
    "train.decay_mask": "authors' code: on all parameters where it fine-tunes",
    "train.ema_decay": "authors' code: no averaging",
    "attack.norm": "the paper: linf and l1 are trained; l2 lies between, and counts in the union",
    "attack.epsilon": "authors' code: 8/255, 0.5 and 12 for CIFAR-10; the paper: 4/255, 2 and 255 "
    "for ImageNet",
    "attack.mix": "the paper: E-AT; ours: the others, worst and average as in Tramèr & Boneh "
    "2019, msd as in Maini et al. 2020, pair as in Jiang & Singh 2024",
    "train.objective": "ours: with mix=ramp that of Jiang & Singh 2024",
    "train.ramp_lambda": "authors' code of RAMP: 5 from scratch on CIFAR-10, 1.5 for fine-tuning",
    "attack.name": "ours: apgd; for msd pgd, whose every step chooses among the norms",
    "attack.steps": "ours: ten steps of APGD at 32 px, two at 224 px",
    "evaluation.weights": "authors' code: no averaging",
    "evaluation.steps": "ours: as in revisiting_at.py",
    "evaluation.batch_size": "ours: what fits in memory, which changes no result",
    "test.batch_size": "ours: what fits in memory, which changes no result",
}


def get_config(arguments: str = ""):
    a = read_arguments(
        arguments,
        model=MODELS,
        start=("linf", "scratch"),
        mix=("extreme", "worst", "average", "alternate", "msd", "ramp"),
        epochs=(None, 1, 3, 10, 30, 50, 80, 100),
        selection=(None, "held-out", "test"),
    )
    side = 32 if a["model"] in AT_32 else 224
    if side == 224 and a["selection"]:
        raise ArgumentError("selection is only for 32 px; leave it out")
    config = (_at_32 if side == 32 else _at_224)(a)
    config.train.epochs = a["epochs"] or (3 if a["start"] == "linf" else SCRATCH_EPOCHS[side])
    if config.train.warmup_epochs >= config.train.epochs:
        config.train.warmup_epochs = config.train.epochs - 1
    config.attack.update(norm=NORMS, epsilon=RADII[side], mix=a["mix"])
    if a["mix"] == "ramp":
        config.attack.mix, config.train.objective = "pair", "ramp"
        if side == 32 and a["start"] == "scratch":
            config.train.ramp_lambda = 5.0
    if a["mix"] == "msd":
        config.attack.update(name="pgd", start="image")
    return config


def _at_32(a: dict[str, Any]) -> Any:
    """Take CIFAR-10 and the network as `cifar_bat.py` has them."""
    how = f"{a['model']},objective=adversarial"
    if a["selection"]:
        how += f",selection={a['selection']}"
    config = cifar_bat.get_config(how)
    fine = a["start"] == "linf"
    if fine:
        config.init.weights = f"run:cifar_bat:{how}"
    config.train.update(lr=0.01 if fine else 0.05, weight_decay=5e-4, clip_norm=None)
    config.train.lr_steps = (1 / 3, 2 / 3) if fine else (0.5, 0.75)
    config.attack.update(name="apgd", relative_step=None, start="image")
    config.evaluation.update(attack="apgd-ce", step_size=None, start=None)
    return config


def _at_224(a: dict[str, Any]) -> Any:
    """Take ImageNet and the network as `larger_radius.py` or `revisiting_at.py` has them."""
    if a["start"] == "scratch":
        return revisiting_at.get_config(a["model"])
    config = larger_radius.get_config(f"{a['model']},start=published")
    config.train.update(warmup_epochs=1, ema_decay=0.0)
    return config
