"""Every key that a config has, with the defaults of "Revisiting Adversarial Training for ImageNet".

Plain values only. A config file starts from `base()` and changes what differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxrobust import models
from jaxrobust.types import Classifier

Config = Any  # ml_collections.ConfigDict, or anything that reads like one

PHASES = ("pretrain", "train")
VERSION = 1  # of the keys, in a run's config.json; it grows where old values would mean others


def phase(**changes: Any) -> ConfigDict:
    """Return the values of one run of the optimiser: the paper's AdamW and curve."""
    values = {
        "objective": "adversarial",  # clean | adversarial | trades
        "trades_beta": 6.0,
        "epochs": 50,  # 0: this phase does not happen
        "batch_size": 1024,  # global
        "microbatches": 1,  # parts of a device's images, one after another where memory is short
        "lr": 1e-3,  # the peak; never scaled with the batch size
        "schedule": "chord-cosine",  # a row of jaxrobust/training/schedules.py
        "warmup_epochs": 10,  # linear, to lr
        "warmup_lr": config_dict.placeholder(float),  # where it starts; default: 1e-4 lr
        "final_lr": 5e-6,
        "cooldown_epochs": 0,  # the last of the epochs, at final_lr
        "lr_steps": (),  # of schedule=step: epochs, or below 1 fractions of them all
        "lr_factor": 0.1,  # times which lr is at each
        "optimizer": "adamw",  # adamw | sgd, with the decay in the gradient, as PyTorch's
        "weight_decay": 0.05,
        "decay_mask": config_dict.placeholder(str),  # of what; default: as the network's reference
        "b2": 0.95,  # of AdamW's second moment; b1 is 0.9
        "momentum": 0.9,  # of SGD
        "nesterov": False,
        "ema_decay": 0.9999,
    }
    return ConfigDict(values | changes)


def base() -> ConfigDict:
    """Return the defaults; locked, so that a mistyped key is an error."""
    config = ConfigDict()
    config.seed = 0
    config.model = ConfigDict(
        {
            "name": "convnext_t_cvst",  # or a function of yours, such as my_nets.py:make
            "num_classes": 1000,
            "image_size": 224,
            "in_channels": 3,
            "dtype": "float32",  # compute type; parameters and update stay float32
            "remat": False,
            "options": ConfigDict(),  # further fields of the family's row, or of the function
        }
    )
    # So many devices share one copy of parameters and optimiser state; 0: all, 1: none does.
    config.mesh = ConfigDict({"fsdp": 1})
    # What the first phase starts from, of the same network; positions are resized.
    config.init = ConfigDict(
        {
            # File, imported folder, run, URL, hf://ORG/REPO, RobustBench or timm id; None: random.
            "weights": config_dict.placeholder(str),
            "stem": "keep",  # keep | fresh, such as a ConvStem on the body of a PatchStem's weights
            "head": "keep",  # keep | fresh, for other classes | fresh-torch, nn.Linear's default
            # Mean and std inside the network: keep (those of the weights) | none | half | imagenet
            # | cifar10 | cifar100.
            "normalize": "keep",
        }
    )
    config.data = ConfigDict(
        {
            "name": "imagenet2012",
            "dir": config_dict.placeholder(str),  # default: $TFDS_DATA_DIR
            "train_split": "train",
            # validation@selection: 4,000 images that are not among the 5,000 of RobustBench.
            "selection_split": "validation@selection",  # chooses the best checkpoint
            "test_split": "validation@robustbench",  # the reported numbers
            "classes": config_dict.placeholder(str),  # only these: imagenet100, or a file of names
            "augmentation": "basic",  # a preset of jaxrobust/data/presets.py, or a chain of ops
            # Of evaluation; default: bicubic-0.875, or nothing where all images have the size.
            "preprocessing": config_dict.placeholder(str),
            "workers": 0,  # processes that decode; 0: threads of this one
            "strict": False,  # whether a damaged image stops the run
            "max_damaged": 50,  # so many are replaced by another image each, and named
        }
    )
    # On the device; None: as the preset data.augmentation says.
    config.mixup = ConfigDict(
        {
            "mixup": config_dict.placeholder(float),  # weights from Beta(mixup, mixup); 0: none
            "cutmix": config_dict.placeholder(float),  # the same for boxes; 0: none
            "switch": 0.5,  # probability of boxes where both are on
            "probability": 1.0,  # of mixing at all
            "group": 2,  # consecutive images that mix among themselves, with one weight
        }
    )
    config.erase = ConfigDict(
        {
            "probability": config_dict.placeholder(float),
            "noise": "normal",  # normal (leaves [0, 1], as the main paper's) | truncated (XCiT's)
        }
    )
    config.label_smoothing = config_dict.placeholder(float)
    # Clean training first, from the same seed; the attack phase starts from its best weights.
    config.pretrain = phase(objective="clean", epochs=0)
    config.train = phase()
    config.attack = ConfigDict(
        {
            "name": "apgd",  # apgd | pgd | fgsm
            "norm": "linf",
            "epsilon": 4 / 255,  # in units of the [0, 1] pixel range
            "steps": 2,
            # The radius grows by epsilon / warmup_epochs after each epoch, from 0 in the first.
            "warmup_epochs": 0,
            # Of pgd and fgsm, as a multiple of epsilon, or in pixels; default: the attack's own.
            "relative_step": config_dict.placeholder(float),
            "step_size": config_dict.placeholder(float),
            "start": "image",  # image | random
            "labels": "soft",  # soft: as mixed and smoothed | hard: the likeliest class
            # The attack sees the network as it evaluates (running statistics of batch norms) | as
            # it trains (batch: those of a device's images, and stochastic depth).
            "statistics": "running",
        }
    )
    # Steps in a row that may find no finite gradient (they update nothing); after more, back to
    # the last checkpoint with `lr` times the learning rate, so many times, then the run stops.
    config.trouble = ConfigDict({"skips": 10, "rollbacks": 0, "lr": 0.5})
    # Every so many steps (0: never) a stronger attack and the input gradient's signs are looked at
    # on so many images; warns of catastrophic overfitting and gradient masking.
    config.alarm = ConfigDict({"every_steps": 1000, "images": 64})
    # While training: accuracy on the selection split, clean and under APGD-CE of the same radius.
    config.evaluation = ConfigDict(
        {"every_epochs": 1, "images": 0, "batch_size": 256, "steps": 10, "weights": "ema"}
    )
    # At the end: both phases' best weights on the test split; images=0 means all of them.
    config.test = ConfigDict({"images": 0, "batch_size": 256, "steps": 40})
    config.checkpoint = ConfigDict({"every_epochs": 1})
    config.log = ConfigDict({"every_steps": 50, "tensorboard": False})
    return config.lock()


class Values(dict):
    """A config as plain values; its keys read as attributes, which is how `build` reads it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass(frozen=True)
class Network:
    """What a network is made from; what is None nobody has said yet."""

    name: str
    num_classes: int | None = None
    image_size: int | None = None
    in_channels: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of its row

    @classmethod
    def of_config(cls, config: Config) -> "Network":
        """Return the network that a config describes."""
        model = config.model
        sizes = (model.num_classes, model.image_size, model.in_channels)
        return cls(model.name, *sizes, options=dict(model.options.items()))

    def create(self, *, dtype: str, remat: bool = False) -> Classifier:
        """Return the network's functions, which compute in `dtype`.

        Raises:
          ValueError: see `models.create`; an option that has a place of its own.
        """
        own: dict[str, Any] = {
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "in_channels": self.in_channels,
            "dtype": dtype,
            "remat": remat,
        }
        if twice := sorted(own.keys() & self.options.keys()):
            raise ValueError(f"model.options.{twice[0]} is no option; set model.{twice[0]}")
        return models.create(self.name, **own, **self.options)


def network_of(config: Config, *, dtype: str | None = None) -> Classifier:
    """Return the config's network; `dtype` replaces its compute type."""
    model = config.model
    return Network.of_config(config).create(dtype=dtype or model.dtype, remat=model.remat)
