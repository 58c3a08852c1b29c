"""Every key that a config has, with the defaults of "Revisiting Adversarial Training for ImageNet".

Plain values only. A config file starts from `base()` and changes what differs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxrobust import models
from jaxrobust.runtime.text.spelling import meant
from jaxrobust.sections import Config
from jaxrobust.types import Classifier

VERSION = 1  # of the keys, in a run's config.json; it grows where old values would mean others
# What a phase may have of its own, beside the keys of its section.
CHANGES = ("model", "data", "mixup", "erase", "label_smoothing", "attack", "evaluation", "test")


def phase(**changes: Any) -> ConfigDict:
    """Give the values of one run of the optimiser: the paper's AdamW and learning-rate curve."""
    values = {
        "objective": "adversarial",  # clean | adversarial | trades | mart
        "trades_beta": 6.0,
        "mart_beta": 6.0,
        "l1": 0.0,  # times the sum of |w| of all convolutions and linear maps is added to the loss
        "epochs": 50,  # 0: this phase does not happen
        "batch_size": 1024,  # global
        "microbatches": 1,  # parts of a device's images, one after another where memory is short
        "lr": 1e-3,  # the peak; never scaled with the batch size
        "schedule": "chord-cosine",  # a row of jaxrobust/training/update/schedules.py
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
        "cycle_momentum": False,  # with one-cycle from 0.95 to 0.85 and back, as PyTorch's does
        "clip_norm": config_dict.placeholder(float),  # of all gradients together; default: none
        "ema_decay": 0.9999,
        # For so many epochs the average is a copy, then its decay grows to ema_decay.
        "ema_warmup_epochs": config_dict.placeholder(int),
        "ema_statistics": "averaged",  # averaged | copied: those of batch norms in the average
        # Of trades and mart, which images move the running statistics: both | adversarial.
        "bn_statistics": "both",
        # How fast they move in the first update and in the others, such as (1.0, 0.01); (): as the
        # network says, mostly 0.1 (PyTorch's momentum).
        "bn_momentum": (),
        # Whether an attack on random weights under heavy augmentation is meant, which the paper
        # reports as failing.
        "from_random": False,
        # What a later phase starts from: the best weights of an earlier one, by its name; None: of
        # the one before. The first phase starts from `init`. Positions are resized.
        "start": config_dict.placeholder(str),
        "stem": "keep",  # as in init
        "head": "keep",
        "normalize": "keep",
        # What is another one than the config's in this phase, such as {"attack": {"epsilon": 8 /
        # 255}, "model": {"image_size": 160}}: any keys of CHANGES.
        "changes": ConfigDict(),
    }
    return ConfigDict(values | changes)


def base() -> ConfigDict:
    """Give the defaults; locked, so that a mistyped key is an error."""
    config = ConfigDict()
    config.seed = 0
    config.model = {
        "name": "convnext_t_cvst",  # or a function of yours, such as my_nets.py:make
        "num_classes": 1000,
        "image_size": 224,
        "in_channels": 3,
        "dtype": "float32",  # compute type; parameters and update stay float32
        "remat": False,
        "options": ConfigDict(),  # further fields of the family's row, or of the function
    }
    # So many devices share one copy of parameters and optimiser state; 0: all, 1: none does.
    config.mesh = {"fsdp": 1}
    # What the first phase starts from, of the same network; positions are resized.
    config.init = {
        # File, imported folder, run, URL, hf://ORG/REPO, RobustBench or timm id; None: random.
        "weights": config_dict.placeholder(str),
        "stem": "keep",  # keep | fresh, such as a ConvStem on the body of a PatchStem's weights
        "head": "keep",  # keep | fresh, for other classes | fresh-torch, nn.Linear's default
        # Mean and std inside the network: keep (those of the weights) | none | half | imagenet
        # | cifar10 | cifar10-robustart | cifar100.
        "normalize": "keep",
    }
    config.data = {
        "name": "imagenet2012",
        "dir": config_dict.placeholder(str),  # default: $TFDS_DATA_DIR
        "train_split": "train",
        # validation@selection: 4,000 images that are not among the 5,000 of RobustBench.
        "selection_split": "validation@selection",  # chooses the best checkpoint
        "test_split": "validation@robustbench",  # the reported numbers
        "classes": config_dict.placeholder(str),  # only these: imagenet100, or a file of names
        "augmentation": "basic",  # a preset of data/transforms/presets.py, or a chain
        # Of evaluation; default: bicubic-0.875, or nothing where all images have the size.
        "preprocessing": config_dict.placeholder(str),
        "workers": 0,  # processes that decode; 0: threads of this one
        "strict": False,  # whether a damaged image stops the run
        "max_damaged": 50,  # so many are replaced by another image each, and named
        "views": 1,  # so often an image stands in its batch, each time augmented otherwise
        "first_view": config_dict.placeholder(str),  # augmentation of the first; default: same
        # A second source, such as npz:PATH of generated images, and its share of each batch.
        "extra": config_dict.placeholder(str),
        "extra_split": "all",
        "extra_share": 0.5,
        # Rows of an epoch with a second source; default: as many as either source lasts.
        "epoch_images": config_dict.placeholder(int),
    }
    # On the device; None: as the preset data.augmentation says.
    config.mixup = {
        "mixup": config_dict.placeholder(float),  # weights from Beta(mixup, mixup); 0: none
        "cutmix": config_dict.placeholder(float),  # the same for boxes; 0: none
        "switch": 0.5,  # probability of boxes where both are on
        "probability": 1.0,  # of mixing at all
        "group": 2,  # consecutive images that mix among themselves, with one weight
    }
    config.erase = {
        "probability": config_dict.placeholder(float),
        "noise": "normal",  # normal (leaves [0, 1], as the main paper's) | truncated (XCiT's)
    }
    config.label_smoothing = config_dict.placeholder(float)
    # The phases in their order, each with a section of that name; one of 0 epochs does not happen.
    # Here: clean training, then against the attack, from the best weights of the first.
    config.phases = ("pretrain", "train")
    config.pretrain = phase(objective="clean", epochs=0)
    config.train = phase()
    config.attack = {
        "name": "apgd",  # what trains in attacks.registry: apgd, pgd, fgsm, ...
        "norm": "linf",
        "epsilon": 4 / 255,  # in units of the [0, 1] pixel range
        "steps": 2,
        # The radius grows by epsilon / warmup_epochs after each epoch, from 0 in the first.
        "warmup_epochs": 0,
        # Length of a step: a multiple of epsilon, or pixels; default: the attack's own.
        "relative_step": config_dict.placeholder(float),
        "step_size": config_dict.placeholder(float),
        # image | random, as AutoAttack's; but for apgd also uniform (in the cube) and gauss,
        # or uniform-boxed and gauss-boxed, brought into [0, 1] before the first gradient.
        "start": "image",
        "start_std": config_dict.placeholder(float),  # of gauss, in pixels; default: the step
        "labels": "soft",  # soft: as mixed and smoothed | hard: the likeliest class
        # The attack sees the network as it evaluates (running statistics of batch norms) | as
        # it trains (batch: those of a device's images, and stochastic depth).
        "statistics": "running",
    }
    # Steps in a row that may find no finite gradient (they update nothing); after more, back to
    # the last checkpoint with `lr` times the learning rate, so many times, then the run stops.
    config.trouble = {"skips": 10, "rollbacks": 0, "lr": 0.5}
    # Every so many steps (0: never) a stronger attack and the input gradient's signs are looked at
    # on so many images; warns of catastrophic overfitting and gradient masking.
    config.alarm = {"every_steps": 1000, "images": 64}
    # While training: accuracy on the selection split, clean and under APGD-CE of the same radius,
    # or under an attack of fixed steps: pgd-20, cw-40, ... as jaxrobust evaluate names them.
    config.evaluation = {
        "every_epochs": 1,
        "images": 0,
        "batch_size": 256,
        "attack": "apgd-ce",
        "steps": 10,  # of apgd-ce
        # Of attacks of fixed steps, as there; default: 2.5 epsilon / K, at random.
        "step_size": config_dict.placeholder(float),
        "start": config_dict.placeholder(str),
        "weights": "ema",
        # What chooses the epoch: clean | robust; default: robust, after clean training clean.
        "metric": config_dict.placeholder(str),
    }
    # At the end: each phase's best weights on the test split; images=0 means all of them.
    config.test = {"images": 0, "batch_size": 256, "steps": 40}
    # keep_epochs: the weights of every evaluation stay, under PHASE/epochs, for
    # `jaxrobust analyse`.
    # keep_every_epochs: the raw and the averaged weights of every so many epochs of each phase, and
    # of its last, stay under PHASE/kept for `jaxrobust select`; each copy takes 8 bytes a
    # parameter of disk (ConvNeXt-T: 0.23 GB, ConvNeXt-B: 0.71 GB). 0: none stays.
    config.checkpoint = {"every_epochs": 1, "keep_epochs": False, "keep_every_epochs": 0}
    # to: where metrics and figures go beside metrics.jsonl: names of trackers with commas between
    # them, such as tensorboard,wandb.
    config.log = {"every_steps": 50, "to": ""}
    return config.lock()


class Values(dict):
    """A config as plain values; its keys read as attributes, which is how `build` reads it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class ArgumentError(ValueError):
    """Arguments of a config that it does not take, in one sentence."""


def read_arguments(text: str | None, **choices: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of a config, which `--config FILE.py:FIRST,name=value,...` gives.

    >>> read_arguments("vit_s,epochs=300", model=("vit_s", "vit_m"), epochs=(50, 300), steps=(2, 3))
    {'model': 'vit_s', 'epochs': 300, 'steps': 2}

    Args:
      text: what stands behind the colon.
      **choices: the values of each argument, its default first (None: there is none); `float`
        among them stands for any number. The first argument has to be given, and may be written
        without its name.
    Raises:
      ArgumentError: an argument that is not among them, one given twice, or another value.
    """
    first, *_ = choices
    given: dict[str, str] = {}
    for i, word in enumerate((text or "").split(",") if text else ()):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals and i == 0:
            name, value = first, name
        if name not in choices:
            raise ArgumentError(f"{word!r} is no argument of this config; {meant(name, choices)}")
        if name in given:
            raise ArgumentError(f"the argument {name} is given twice; give it once")
        given[name] = value
    if first not in given:
        known = ", ".join(map(str, choices[first]))
        raise ArgumentError(f"say which {first} behind a colon, one of {known}")
    return {
        name: _argument(name, given[name], values) if name in given else values[0]
        for name, values in choices.items()
    }


def _argument(name: str, text: str, values: Sequence[Any]) -> Any:
    match = {str(value): value for value in values if value not in (None, float)}
    if text in match:
        return match[text]
    if float not in values:
        raise ArgumentError(f"{name}={text} is not among its values; {meant(text, match)}")
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(f"{name}={text} is no number") from None


def plain(config: Any) -> dict[str, Any]:
    """Copy a config, or a section of one, as values that JSON has."""
    return json.loads(json.dumps(config) if isinstance(config, dict) else config.to_json())


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Give a run's config the defaults of keys that are younger than the run."""
    defaults = plain(base())
    log = dict(config.get("log", {}))
    if log.pop("tensorboard", False):  # `spelling.MOVED`
        log["to"] = "tensorboard"
    config = config | {"log": log}
    names = config.get("phases", defaults["phases"])
    defaults |= {name: plain(phase()) for name in names if name in config}
    return _merged(defaults, config)


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def phases(config: Config) -> list[str]:
    """List the names of the phases that happen, in their order."""
    names = list(config.phases)
    for name in names:
        if name not in config or "objective" not in config[name]:
            raise ValueError(
                f"phases={names} names {name!r}, for which the config has no section; write "
                f"config.{name} = phase(...) in it"
            )
        if names.count(name) > 1:
            raise ValueError(f"phases={names} names {name!r} twice; give the second another name")
    happen = [name for name in names if config[name].epochs != 0]
    if not happen:
        zeros = " and ".join(f"{name}.epochs=0" for name in names) or "phases=()"
        raise ValueError(f"{zeros}: there is nothing to train")
    return happen


def of_phase(config: Config, name: str) -> Config:
    """Give the config as a phase sees it: with its own `changes`."""
    changes = plain(config[name].changes)
    if not changes:
        return config
    seen = plain(config)
    for keys, value in _leaves(changes):
        _change(seen, keys, value, f"{name}.changes.")
    return json.loads(json.dumps(seen), object_hook=Values)


def _leaves(tree: Mapping[str, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and (*keys, key) != ("model", "options"):
            yield from _leaves(value, (*keys, key))
        else:
            yield (*keys, key), value


def _change(config: dict[str, Any], keys: tuple[str, ...], value: Any, prefix: str) -> None:
    section, known = config, list(CHANGES)
    for depth, key in enumerate(keys):
        known = known if depth == 0 else list(section)
        if key not in known:
            whole = f"{prefix}{'.'.join(keys[: depth + 1])}"
            raise ValueError(f"{whole} is no key; {meant(key, known)}")
        if depth < len(keys) - 1:
            if not isinstance(section[key], dict):
                raise ValueError(f"{prefix}{'.'.join(keys)}: {key} is no section, but a value")
            section = section[key]
    if isinstance(section[keys[-1]], dict) and not isinstance(value, dict):
        raise ValueError(f"{prefix}{'.'.join(keys)} is a section, and {value!r} is a value")
    section[keys[-1]] = value


@dataclass(frozen=True)
class NetworkSpec:
    """What a network is made from; None: not known yet."""

    name: str
    num_classes: int | None = None
    image_size: int | None = None
    in_channels: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of its row

    @classmethod
    def of_config(cls, config: Config) -> "NetworkSpec":
        """Read the network that a config describes."""
        model = config.model
        sizes = (model.num_classes, model.image_size, model.in_channels)
        return cls(model.name, *sizes, options=dict(model.options.items()))

    def create(self, *, dtype: str, remat: bool = False) -> Classifier:
        """Make the network's functions, which compute in `dtype`."""
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
    """Make the config's network; `dtype` replaces its compute type."""
    model = config.model
    return NetworkSpec.of_config(config).create(dtype=dtype or model.dtype, remat=model.remat)
