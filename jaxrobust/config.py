"""Every key that a config has, with the defaults of "Revisiting Adversarial Training for ImageNet".

Plain values only. A config file starts from `base()` and changes what differs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Protocol, get_args, get_origin, get_type_hints

import jax
from ml_collections import ConfigDict, config_dict

from jaxrobust import models
from jaxrobust.runtime.processes import launch
from jaxrobust.runtime.text.spelling import meant
from jaxrobust.types import Classifier

VERSION = 1  # of the keys, in a run's config.json; it grows where old values would mean others
# What a phase may have of its own, in addition to the keys of its section.
CHANGES = ("model", "data", "mixup", "erase", "label_smoothing", "attack", "evaluation", "test")
SPARED = 4  # cores of a host that do not decode by default: they feed its devices, and write


class OneOrSeveral(config_dict.FieldReference):
    """A value of the type of its default, or a list or tuple of such."""

    def set(self, value: Any, type_safe: bool = True) -> None:
        """Put one value, or a tuple of several, in place of the one before."""
        if not isinstance(value, list | tuple):
            super().set(value, type_safe)
            return
        own = self.get_type()
        parts = tuple(own(v) if own is float and isinstance(v, int) else v for v in value)
        if type_safe and not all(isinstance(part, own) for part in parts):
            raise TypeError(f"of {value!r} each part must be of type {own.__name__}")
        super().set(parts, False)

    @classmethod
    def unset(cls, kind: type) -> "OneOrSeveral":
        """Make one that is None, and of this type where it is set."""
        return cls(None, field_type=kind)


class Section(Protocol):
    """A part of a config: the keys with their defaults, which read as attributes and as items."""

    def __getitem__(self, key: str, /) -> Any: ...

    def __contains__(self, key: object, /) -> bool: ...

    def get(self, key: str, default: Any = None, /) -> Any:
        """Return a key that configs of older versions may lack."""
        ...


class ModelSection(Section, Protocol):
    name: str = "convnext_t_cvst"  # or a function of yours, such as my_nets.py:make
    num_classes: int = 1000  # width of the logits
    image_size: int = 224  # side of the images, pixels
    in_channels: int = 3  # 1: grey
    dtype: str = "float32"  # compute type; parameters and update stay float32
    remat: bool = False  # computes blocks again in the backward pass, where memory is short
    options: Mapping[str, Any] = {}  # further fields of the family's row, or of the function


class MeshSection(Section, Protocol):
    # So many devices share one copy of parameters and optimiser state; 0: all, 1: none does.
    fsdp: int = 1


class StartSection(Section, Protocol):
    """What `init` and a phase say alike of the weights that they start from."""

    stem: str
    head: str
    normalize: str


class InitSection(Section, Protocol):
    """What the first phase starts from, of the same network; positions are resized."""

    # File, imported folder, run, URL, hf://ORG/REPO, RobustBench or timm id; run:CONFIG, the run of
    # that config next to this one's workdir, which is trained first if need be; None: random.
    weights: str | None = None
    stem: str = "keep"  # keep | fresh, such as a ConvStem on the body of a PatchStem's weights
    # keep | fresh, for other classes | fresh-torch, nn.Linear's default | fresh:PART, of a PyTorch
    # module, which part of it by name.
    head: str = "keep"
    # Mean and std inside the network: keep (those of the weights) | none | half | imagenet
    # | cifar10 | cifar10-robustart | cifar100.
    normalize: str = "keep"


class DataSection(Section, Protocol):
    name: str = "imagenet2012"  # digits, cifar10, folder:PATH, npz:PATH, hf:NAME, a TFDS name
    dir: str | None = None  # default: $TFDS_DATA_DIR
    train_split: str = "train"  # or a part of one, such as train[:90%]
    # validation@selection: 4,000 images that are not among the 5,000 of RobustBench.
    selection_split: str = "validation@selection"  # chooses the best checkpoint
    test_split: str = "validation@robustbench"  # the reported numbers
    classes: str | None = None  # only these: imagenet100, or a file of names
    augmentation: str = "basic"  # a preset of data/transforms/presets.py, or a chain
    # Of evaluation; default: bicubic-0.875, or nothing where all images have the size.
    preprocessing: str | None = None
    # Processes that decode, of each host; 0: threads of this one. Default: the host's cores less
    # four, and 0 where it trains on them.
    workers: int | None = None
    strict: bool = False  # whether a damaged image stops the run
    max_damaged: int = 50  # up to this many are replaced by another image each, and named
    views: int = 1  # how often an image appears in its batch, each time augmented otherwise
    first_view: str | None = None  # augmentation of the first; default: same
    # A second source, such as npz:PATH of generated images, and its share of each batch.
    extra: str | None = None
    extra_split: str = "all"  # of the second source
    extra_share: float = 0.5  # of each batch, where there is a second source
    # Rows of an epoch with a second source; default: as many as either source lasts.
    epoch_images: int | None = None


class MixupSection(Section, Protocol):
    """On the device; None: as the preset data.augmentation says."""

    mixup: float | None = None  # weights from Beta(mixup, mixup); 0: none
    cutmix: float | None = None  # the same for boxes; 0: none
    switch: float = 0.5  # probability of boxes where both are on
    probability: float = 1.0  # of mixing at all
    group: int = 2  # consecutive images that mix among themselves, with one weight


class EraseSection(Section, Protocol):
    probability: float | None = None  # None: as the preset data.augmentation says
    noise: str = "normal"  # normal (leaves [0, 1], as the main paper's) | truncated (XCiT's)


class PhaseSection(Section, Protocol):
    """One run of the optimiser: the paper's AdamW and learning-rate curve."""

    # clean | adversarial | trades | trades-awp | dkl | hat | mart | ramp
    objective: str = "adversarial"
    trades_beta: float = 6.0  # weight of the robust part of TRADES
    mart_beta: float = 6.0  # the same of MART
    dkl_alpha: float = 4.0  # of DKL, weight of the cross-entropy with the clean probabilities
    dkl_beta: float = 20.0  # of DKL, weight of the distance of logits
    hat_beta: float = 2.5  # weight of the robust part of HAT
    hat_gamma: float = 0.5  # weight of HAT's helper examples
    ramp_lambda: float = 1.5  # of RAMP, weight of the divergence between the points of two norms
    l1: float = 0.0  # times the sum of |w| of all convolutions and linear maps is added to the loss
    epochs: int = 50  # 0: this phase does not happen
    batch_size: int = 1024  # global
    microbatches: int = 1  # parts of a device's images, one after another where memory is short
    lr: float = 1e-3  # the peak; never scaled with the batch size
    schedule: str = "chord-cosine"  # a row of jaxrobust/training/update/schedules.py
    warmup_epochs: int = 10  # linear, to lr
    warmup_lr: float | None = None  # where it starts; default: 1e-4 lr
    final_lr: float = 5e-6  # where the schedule ends
    cooldown_epochs: int = 0  # the last of the epochs, at final_lr
    lr_steps: Sequence[float] = ()  # of schedule=step: epochs, or below 1 fractions of them all
    lr_factor: float = 0.1  # times which lr is at each
    optimizer: str = "adamw"  # adamw | sgd, with the decay in the gradient, as PyTorch's
    weight_decay: float = 0.05  # times lr, of what decay_mask says
    decay_mask: str | None = None  # of what; default: as the network's reference
    b2: float = 0.95  # of AdamW's second moment; b1 is 0.9
    momentum: float = 0.9  # of SGD
    nesterov: bool = False  # of SGD, as PyTorch has it
    cycle_momentum: bool = False  # with one-cycle from 0.95 to 0.85 and back, as PyTorch's does
    clip_norm: float | None = None  # of all gradients together; default: none
    ema_decay: float = 0.9999  # of the average of the weights, which is evaluated
    # For this many epochs the average is a copy, then its decay grows to ema_decay.
    ema_warmup_epochs: int | None = None
    ema_statistics: str = "averaged"  # averaged | copied: those of batch norms in the average
    # Of trades and mart, which images move the running statistics: both | adversarial.
    bn_statistics: str = "both"
    # How fast they move in the first update and in the others, such as (1.0, 0.01); (): as the
    # network says, mostly 0.1 (PyTorch's momentum).
    bn_momentum: Sequence[float] = ()
    # Whether an attack on random weights under heavy augmentation is meant, which the paper
    # reports as failing.
    from_random: bool = False
    # What a later phase starts from: the best weights of an earlier one, by its name; None: of
    # the one before. The first phase starts from `init`. Positions are resized.
    start: str | None = None
    stem: str = "keep"  # as in init
    head: str = "keep"  # as in init
    normalize: str = "keep"  # as in init
    # What is another one than the config's in this phase, such as {"attack": {"epsilon": 8 /
    # 255}, "model": {"image_size": 160}}: any keys of CHANGES.
    changes: Mapping[str, Any] = {}


class AttackSection(Section, Protocol):
    name: str = "apgd"  # what trains in attacks.registry: apgd, pgd, fgsm, ...
    # linf | l2 | l1, or several of them, such as ("linf", "l2", "l1"), with a radius each.
    norm: str | Sequence[str] = "linf"
    epsilon: float | Sequence[float] = 4 / 255  # in units of the [0, 1] pixel range
    # Of several norms: worst | average | alternate | extreme | msd | pair, the rows of
    # jaxrobust/attacks/mixes.py; None: there is one norm.
    mix: str | None = None
    steps: int = 2  # of each attack in a training step
    # The radius grows by epsilon / warmup_epochs after each epoch, from 0 in the first.
    warmup_epochs: int = 0
    # Before that it is 0 for this many epochs, in which a start that is not robust learns the
    # images.
    delay_epochs: int = 0
    # Length of a step: a multiple of epsilon, or pixels; default: the attack's own.
    relative_step: float | None = None
    step_size: float | Sequence[float] | None = None  # in pixels, of each norm
    # What it raises: ce, dlr, cw, cw-floor, ce-cw, pm, or a function of yours, such as
    # my_losses.py:margin; default: what the objective says, mostly ce.
    loss: str | None = None
    # image | random, as AutoAttack's; but for apgd also uniform (in the cube) and gauss,
    # or uniform-boxed and gauss-boxed, brought into [0, 1] before the first gradient.
    start: str = "image"
    start_std: float | None = None  # of gauss, in pixels; default: the step
    labels: str = "soft"  # soft: as mixed and smoothed | hard: the likeliest class
    # The attack sees the network as it evaluates (running statistics of batch norms) | as
    # it trains (batch: those of a device's images, and stochastic depth).
    statistics: str = "running"


class TroubleSection(Section, Protocol):
    skips: int = 10  # steps in a row that may find no finite gradient (they update nothing)
    rollbacks: int = (
        0  # after more, back to the last checkpoint, up to this many times, then the run stops
    )
    lr: float = 0.5  # times the learning rate, after each of these


class AlarmSection(Section, Protocol):
    """A stronger attack and the input gradient's signs, looked at; warns of catastrophic
    overfitting and gradient masking.
    """

    every_steps: int = 1000  # 0: never
    images: int = 64  # of the batch that are looked at


class TestSection(Section, Protocol):
    """At the end: each phase's best weights on the test split."""

    images: int = 0  # 0: all of them
    batch_size: int = 256  # no number depends on it
    steps: int = 40  # of APGD-CE


class EvaluationSection(Section, Protocol):
    """While training: accuracy on the selection split, clean and under APGD-CE of the same radius,
    or under an attack of fixed steps: pgd-20, cw-40, ... as jaxrobust evaluate names them.
    """

    every_epochs: int = 1  # and at the end of a phase
    images: int = 0  # 0: all of the split
    batch_size: int = 256  # no number depends on it
    attack: str = "apgd-ce"  # or of fixed steps
    steps: int = 10  # of apgd-ce
    # Of attacks of fixed steps, as there; default: 2.5 epsilon / K, at random.
    step_size: float | None = None
    start: str | None = None  # of the attack
    weights: str = "ema"  # which are evaluated: ema | raw
    # What chooses the epoch: clean | robust; default: robust, after clean training clean.
    metric: str | None = None


class CheckpointSection(Section, Protocol):
    every_epochs: int = 1  # a state to continue from
    # The weights of every evaluation stay, under PHASE/epochs, for `jaxrobust analyse`.
    keep_epochs: bool = False
    # The raw and the averaged weights after every this many epochs of each phase, and of its last,
    # stay under PHASE/kept for `jaxrobust select`; each copy takes 8 bytes a parameter of disk
    # (ConvNeXt-T: 0.23 GB, ConvNeXt-B: 0.71 GB). 0: none stays.
    keep_every_epochs: int = 0


class LogSection(Section, Protocol):
    every_steps: int = 50  # a line in the log and in metrics.jsonl
    # Where metrics and figures go in addition to metrics.jsonl: names of trackers with commas
    # between them, such as tensorboard,wandb.
    to: str = ""


class Config(Protocol):
    """A whole config; the section of a phase is an item under its name."""

    seed: int = 0  # of the first weights, the order of images, and all draws
    model: ModelSection
    mesh: MeshSection
    init: InitSection
    data: DataSection
    mixup: MixupSection
    erase: EraseSection
    label_smoothing: float | None = None  # None: as the preset data.augmentation says
    # The phases in their order, each with a section of that name; one of 0 epochs does not happen.
    # Here: clean training, then against the attack, from the best weights of the first.
    phases: Sequence[str] = ("pretrain", "train")
    attack: AttackSection
    trouble: TroubleSection
    alarm: AlarmSection
    evaluation: EvaluationSection
    test: TestSection
    checkpoint: CheckpointSection
    log: LogSection

    def __getitem__(self, phase: str, /) -> PhaseSection: ...

    def __contains__(self, phase: object, /) -> bool: ...


def _values(kind: Any) -> dict[str, Any]:
    """Collect the defaults of a section; a key that is None keeps the type that it may have."""
    values: dict[str, Any] = {}
    for key, hint in get_type_hints(kind).items():
        if Section in getattr(hint, "__mro__", ()):
            values[key] = _values(hint)
        elif (value := getattr(kind, key)) is None:
            one, *others = get_args(hint)
            kind_of = config_dict.placeholder if len(others) == 1 else OneOrSeveral.unset
            values[key] = kind_of(one)
        elif get_origin(hint) is UnionType:
            values[key] = OneOrSeveral(value)
        else:
            values[key] = value
    return values


def phase(**changes: Any) -> ConfigDict:
    """Give the values of one run of the optimiser: the paper's AdamW and learning-rate curve."""
    return ConfigDict(_values(PhaseSection) | changes)


def base() -> ConfigDict:
    """Return the defaults, locked so that a mistyped key is an error."""
    config = ConfigDict()
    for key, value in _values(Config).items():
        config[key] = value
        if key == "phases":  # whose sections follow it
            config.pretrain, config.train = phase(objective="clean", epochs=0), phase()
    return config.lock()


class ArgumentError(ValueError):
    """Arguments of a config that it does not take, in one sentence."""


def read_arguments(text: str | None, **choices: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of a config, which `--config FILE.py:FIRST,name=value,...` gives.

    >>> read_arguments("vit_s,epochs=300", model=("vit_s", "vit_m"), epochs=(50, 300), steps=(2, 3))
    {'model': 'vit_s', 'epochs': 300, 'steps': 2}

    Args:
      text: what follows the colon.
      **choices: the values of each argument, its default first (None: there is none); `float`
        among them stands for any number, `str` for any text. The first argument has to be given,
        and may be written without its name.
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
            raise ArgumentError(
                f"{word!r} is not an argument of this config; {meant(name, choices)}"
            )
        if name in given:
            raise ArgumentError(f"the argument {name} is given twice; give it once")
        given[name] = value
    if first not in given:
        known = ", ".join(map(str, choices[first]))
        raise ArgumentError(f"say which {first} after a colon, one of {known}")
    return {
        name: _argument(name, given[name], values) if name in given else values[0]
        for name, values in choices.items()
    }


def _argument(name: str, text: str, values: Sequence[Any]) -> Any:
    match = {str(value): value for value in values if value not in (None, float, str)}
    if text in match:
        return match[text]
    if str in values and text:
        return text
    if float not in values:
        raise ArgumentError(f"{name}={text} is not among its values; {meant(text, match)}")
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(f"{name}={text} is not a number") from None


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

    def sizes(self) -> dict[str, Any]:
        """Collect what its images and classes are."""
        return {key: getattr(self, key) for key in ("num_classes", "image_size", "in_channels")}

    def create(self, *, dtype: str, remat: bool = False) -> Classifier:
        """Make the network's functions, which compute in `dtype`."""
        own = self.sizes() | {"dtype": dtype, "remat": remat}
        if twice := sorted(own.keys() & self.options.keys()):
            raise ValueError(f"model.options.{twice[0]} is not an option; set model.{twice[0]}")
        return models.create(self.name, **own, **self.options)


def network_of(config: Config, *, dtype: str | None = None) -> Classifier:
    """Make the config's network; `dtype` replaces its compute type."""
    model = config.model
    return NetworkSpec.of_config(config).create(dtype=dtype or model.dtype, remat=model.remat)


class Values(dict):
    """A config as plain values; its keys read as attributes, which is how `build` reads it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def plain(config: Any) -> dict[str, Any]:
    """Copy a config, or a section of one, as values that JSON has."""
    return json.loads(json.dumps(config) if isinstance(config, dict) else config.to_json())


def attributes(config: dict[str, Any]) -> Any:
    """Let the keys of plain values, and of sections in them, be read as attributes."""
    return json.loads(json.dumps(config), object_hook=Values)


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


def decoders(data: DataSection) -> int:
    """Count this host's processes that decode: as the config says, or by its cores.

    By default none where JAX computes on these cores, which then has them all.
    """
    if data.workers is not None:
        return data.workers
    return 0 if jax.default_backend() == "cpu" else max(launch.own_cores() - SPARED, 0)


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
    return attributes(seen)


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
            raise ValueError(f"{whole} is not a key; {meant(key, known)}")
        if depth < len(keys) - 1:
            if not isinstance(section[key], dict):
                raise ValueError(f"{prefix}{'.'.join(keys)}: {key} is not a section, but a value")
            section = section[key]
    if isinstance(section[keys[-1]], dict) and not isinstance(value, dict):
        raise ValueError(f"{prefix}{'.'.join(keys)} is a section, and {value!r} is a value")
    section[keys[-1]] = value
