"""Every config key, with the defaults of "Revisiting Adversarial Training for ImageNet".

Values are plain. A config file starts from `base()` and changes what differs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import TYPE_CHECKING, Any, Protocol, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict, config_dict

from jaxrobust.runtime.processes import launch
from jaxrobust.runtime.text.spelling import meant

if TYPE_CHECKING:  # a config is read before JAX is imported
    from jaxrobust.types import Classifier

VERSION = 1  # of the keys, in a run's config.json; increases when old values change meaning
# What a phase may override, in addition to the keys of its own section.
CHANGES = ("model", "data", "mixup", "erase", "label_smoothing", "attack", "evaluation", "test")
SPARED = 4  # cores of a host that do not decode by default: they feed its devices and write files


class OneOrSeveral(config_dict.FieldReference):
    """A value of its default's type, or a list or tuple of such values."""

    def set(self, value: Any, type_safe: bool = True) -> None:
        """Set a single value, or a tuple of several."""
        if not isinstance(value, list | tuple):
            super().set(value, type_safe)
            return
        value_type = self.get_type()
        parts = tuple(
            value_type(v) if value_type is float and isinstance(v, int) else v for v in value
        )
        if type_safe and not all(isinstance(part, value_type) for part in parts):
            raise TypeError(f"each item of {value!r} must be of type {value_type.__name__}")
        super().set(parts, False)

    @classmethod
    def unset(cls, kind: type) -> "OneOrSeveral":
        """Make a value that is None and, once set, of this type."""
        return cls(None, field_type=kind)


class Section(Protocol):
    """A part of a config: its keys and defaults, readable as attributes and as items."""

    def __getitem__(self, key: str, /) -> Any: ...

    def __contains__(self, key: object, /) -> bool: ...

    def get(self, key: str, default: Any = None, /) -> Any:
        """Return a key that may be missing in configs of older versions."""
        ...


class ModelSection(Section, Protocol):
    name: str = "convnext_t_cvst"  # or your own function, such as my_nets.py:make
    num_classes: int = 1000  # width of the logits
    image_size: int = 224  # side of the images, pixels
    in_channels: int = 3  # 1: gray
    dtype: str = "float32"  # compute type; parameters and update stay float32
    remat: bool = False  # recompute blocks in the backward pass, to save memory
    options: Mapping[str, Any] = {}  # further fields of the family's row, or of the function


class MeshSection(Section, Protocol):
    # This many devices share one copy of parameters and optimizer state; 1: no sharing; 0: all, or
    # all of a slice if there are several.
    fsdp: int = 1


class StartSection(Section, Protocol):
    """What `init` and phases have in common: the weights to start from."""

    stem: str
    head: str
    normalize: str


class InitSection(Section, Protocol):
    """What the first phase starts from; the network must be the same; positions are resized."""

    # File, imported folder, run, URL, hf://ORG/REPO, RobustBench or timm id; run:CONFIG, that
    # config's run next to this workdir, which is trained first if necessary; None: random.
    weights: str | None = None
    stem: str = "keep"  # keep | fresh, for example a ConvStem on a PatchStem network's body
    # keep | fresh, for other classes | fresh-torch, nn.Linear's default | fresh:PART, for a PyTorch
    # module, with the name of the part.
    head: str = "keep"
    # Mean and std inside the network: keep (the weights' own) | none | half | imagenet | cifar10 |
    # cifar10-robustart | cifar100.
    normalize: str = "keep"


class DataSection(Section, Protocol):
    name: str = "imagenet2012"  # digits, cifar10, folder:PATH, npz:PATH, hf:NAME, a TFDS name
    dir: str | None = None  # default: $TFDS_DATA_DIR
    train_split: str = "train"  # or a part of one, such as train[:90%]
    # validation@selection: 4,000 images outside RobustBench's 5,000.
    selection_split: str = "validation@selection"  # for selecting the best checkpoint
    test_split: str = "validation@robustbench"  # for the reported numbers
    classes: str | None = None  # use only these: imagenet100, or a file of names
    augmentation: str = "basic"  # a preset of data/transforms/presets.py, or a chain
    # For evaluation; default: bicubic-0.875, or nothing if all images have the size.
    preprocessing: str | None = None
    # Decoding processes per host; 0: use threads of the main process. Default: the host's cores
    # minus four, or 0 if it trains on them.
    workers: int | None = None
    strict: bool = False  # whether a damaged image stops the run
    max_damaged: int = 50  # at most this many are replaced by other images, and reported
    views: int = 1  # how often an image appears in its batch, each time with another augmentation
    first_view: str | None = None  # augmentation of the first view; default: the same
    # A second source, such as npz:PATH of generated images.
    extra: str | None = None
    extra_split: str = "all"  # of the second source
    extra_share: float = 0.5  # of each batch, if there is a second source
    # Rows per epoch with a second source; default: until either source runs out.
    epoch_images: int | None = None


class MixupSection(Section, Protocol):
    """Applied on the device; None: as in the preset data.augmentation."""

    mixup: float | None = None  # weights from Beta(mixup, mixup); 0: none
    cutmix: float | None = None  # the same for boxes; 0: none
    switch: float = 0.5  # probability of boxes if both are on
    probability: float = 1.0  # of mixing at all
    group: int = 2  # number of consecutive images mixed with each other, with one weight


class EraseSection(Section, Protocol):
    probability: float | None = None  # None: as in the preset data.augmentation
    noise: str = "normal"  # normal (leaves [0, 1]; the main paper's) | truncated (XCiT's)


class PhaseSection(Section, Protocol):
    """A run of the optimizer: by default the paper's AdamW and learning-rate curve."""

    # clean | adversarial | trades | trades-awp | dkl | hat | mart | ramp
    objective: str = "adversarial"
    trades_beta: float = 6.0  # weight of the robust part of TRADES
    mart_beta: float = 6.0  # the same for MART
    dkl_alpha: float = 4.0  # for DKL, weight of the cross-entropy with the clean probabilities
    dkl_beta: float = 20.0  # for DKL, weight of the distance of logits
    hat_beta: float = 2.5  # weight of the robust part of HAT
    hat_gamma: float = 0.5  # weight of HAT's helper examples
    ramp_lambda: float = 1.5  # for RAMP, weight of the divergence between two norms' points
    l1: float = 0.0  # adds this times the sum of |w| over convolutions and linear maps to the loss
    epochs: int = 50  # 0: skip this phase
    batch_size: int = 1024  # global
    microbatches: int = 1  # parts into which a device's images are split, to save memory
    lr: float = 1e-3  # the peak; not scaled with the batch size
    schedule: str = "chord-cosine"  # a row of jaxrobust/training/update/schedules.py
    warmup_epochs: int = 10  # linear, up to lr
    warmup_lr: float | None = None  # start of the warm-up; default: 1e-4 lr
    final_lr: float = 5e-6  # where the schedule ends
    cooldown_epochs: int = 0  # at the end, at final_lr
    lr_steps: Sequence[float] = ()  # for schedule=step: epochs, or fractions of them if below 1
    lr_factor: float = 0.1  # lr is multiplied by this at each step
    optimizer: str = "adamw"  # adamw | sgd, with the decay in the gradient, as in PyTorch
    weight_decay: float = 0.05  # times lr, for the parameters in decay_mask
    decay_mask: str | None = None  # which parameters decay; default: as in the network's reference
    b2: float = 0.95  # for AdamW's second moment; b1 is 0.9
    momentum: float = 0.9  # for SGD
    nesterov: bool = False  # for SGD, as in PyTorch
    cycle_momentum: bool = False  # with one-cycle, from 0.95 to 0.85 and back, as in PyTorch
    clip_norm: float | None = None  # for all gradients together; default: none
    ema_decay: float = 0.9999  # of the average of the weights, which is what is evaluated
    # For this many epochs the average is a copy; then its decay grows to ema_decay.
    ema_warmup_epochs: int | None = None
    ema_statistics: str = "averaged"  # averaged | copied: batch norms' statistics in the average
    # For trades and mart, the images that update the running statistics: both | adversarial.
    bn_statistics: str = "both"
    # How fast they change in the first update and in all others, such as (1.0, 0.01); (): as the
    # network specifies, mostly 0.1 (PyTorch's momentum).
    bn_momentum: Sequence[float] = ()
    # Confirms an attack on random weights under heavy augmentation, which the paper reports as
    # failing.
    from_random: bool = False
    # For later phases, an earlier phase by name, to start from its best weights; None: the previous
    # phase. The first phase starts from `init`. Positions are resized.
    start: str | None = None
    stem: str = "keep"  # as in init
    head: str = "keep"  # as in init
    normalize: str = "keep"  # as in init
    # Overrides for this phase, such as {"attack": {"epsilon": 8 / 255}, "model": {"image_size":
    # 160}}: any keys of CHANGES.
    changes: Mapping[str, Any] = {}


class AttackSection(Section, Protocol):
    name: str = "apgd"  # a training attack in attacks.registry: apgd, pgd, fgsm, ...
    # linf | l2 | l1, or several, such as ("linf", "l2", "l1"), with one radius each.
    norm: str | Sequence[str] = "linf"
    epsilon: float | Sequence[float] = 4 / 255  # in units of the [0, 1] pixel range
    # For several norms: worst | average | alternate | extreme | msd | pair, the rows of
    # jaxrobust/attacks/mixes.py; None: a single norm.
    mix: str | None = None
    steps: int = 2  # of each attack in a training step
    # The radius grows by epsilon / warmup_epochs after each epoch, starting at 0.
    warmup_epochs: int = 0
    # Before that it is 0 for this many epochs, so that a start that is not robust learns the
    # images.
    delay_epochs: int = 0
    # Length of a step: a multiple of epsilon, or pixels; default: chosen by the attack.
    relative_step: float | None = None
    step_size: float | Sequence[float] | None = None  # in pixels, for each norm
    # The loss to maximize: ce, dlr, cw, cw-floor, ce-cw, pm, or your own function, such as
    # my_losses.py:margin; default: the objective's, mostly ce.
    loss: str | None = None
    # image | random, as in AutoAttack. Except for apgd also uniform (in the cube) and gauss, or
    # uniform-boxed and gauss-boxed, clipped to [0, 1] before the first gradient.
    start: str = "image"
    start_std: float | None = None  # for gauss, in pixels; default: the step
    labels: str = "soft"  # soft: as mixed and smoothed | hard: the most likely class
    # The network in the attack: running, in evaluation mode (running statistics of batch norms) |
    # batch, in training mode (statistics of a device's images, stochastic depth).
    statistics: str = "running"


class TroubleSection(Section, Protocol):
    skips: int = 10  # steps in a row that may have no finite gradient (they update nothing)
    rollbacks: int = 0  # then roll back to the last checkpoint, this many times at most; then stop
    lr: float = 0.5  # times the learning rate, after each rollback


class AlarmSection(Section, Protocol):
    """Checks a stronger attack and the input gradient's signs; warns of catastrophic overfitting
    and gradient masking.
    """

    every_steps: int = 1000  # 0: never
    images: int = 64  # number of images of the batch to check


class TestSection(Section, Protocol):
    """At the end: tests each phase's best weights on the test split."""

    images: int = 0  # 0: all of them
    batch_size: int = 256  # does not affect the results
    steps: int = 40  # of APGD-CE


class EvaluationSection(Section, Protocol):
    """During training: accuracy on the selection split, clean and under APGD-CE with the same
    radius, or under an attack with fixed steps: pgd-20, cw-40, ... as in jaxrobust evaluate.
    """

    every_epochs: int = 1  # and at the end of a phase
    images: int = 0  # 0: all of the split
    batch_size: int = 256  # does not affect the results
    attack: str = "apgd-ce"  # or with fixed steps
    steps: int = 10  # for apgd-ce
    # For attacks with fixed steps, as there; default: 2.5 epsilon / K, random.
    step_size: float | None = None
    start: str | None = None  # of the attack
    weights: str = "ema"  # the weights to evaluate: ema | raw
    # What selects the epoch: clean | robust; default: robust, or clean after clean training.
    metric: str | None = None


class CheckpointSection(Section, Protocol):
    every_epochs: int = 1  # how often to save a state to continue from
    # Whether to keep each evaluation's weights, under PHASE/epochs, for `jaxrobust analyse`.
    keep_epochs: bool = False
    # Every this many epochs of each phase, and at its end, keep raw and averaged weights under
    # PHASE/kept for `jaxrobust select`. Each copy takes 8 bytes per parameter on disk (ConvNeXt-T:
    # 0.23 GB, ConvNeXt-B: 0.71 GB). 0: keep none.
    keep_every_epochs: int = 0


class LogSection(Section, Protocol):
    every_steps: int = 50  # steps between lines in the log and in metrics.jsonl
    # Where to send metrics and figures besides metrics.jsonl: comma-separated names of trackers,
    # such as tensorboard,wandb.
    to: str = ""


class Config(Protocol):
    """A full config; the section of a phase is an item under the phase's name."""

    seed: int = 0  # for initial weights, order of images, and all draws
    model: ModelSection
    mesh: MeshSection
    init: InitSection
    data: DataSection
    mixup: MixupSection
    erase: EraseSection
    label_smoothing: float | None = None  # None: as in the preset data.augmentation
    # The phases in order, each with a section of that name; a phase with 0 epochs is skipped. Here:
    # clean training, then adversarial training from the best clean weights.
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
    """Collect the defaults of a section; a key that is None keeps its possible type."""
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
    """Return the values of a phase: by default the paper's AdamW and learning-rate curve."""
    return ConfigDict(_values(PhaseSection) | changes)


def base() -> ConfigDict:
    """Return the defaults, locked so that a misspelt key is an error."""
    config = ConfigDict()
    for key, value in _values(Config).items():
        config[key] = value
        if key == "phases":  # its sections follow
            config.pretrain, config.train = phase(objective="clean", epochs=0), phase()
    return config.lock()


class ArgumentError(ValueError):
    """Arguments that a config does not accept; the message is one sentence."""


def read_arguments(text: str | None, **choices: Sequence[Any]) -> dict[str, Any]:
    """Parse a config's arguments, from `--config FILE.py:FIRST,name=value,...`.

    >>> read_arguments("vit_s,epochs=300", model=("vit_s", "vit_m"), epochs=(50, 300), steps=(2, 3))
    {'model': 'vit_s', 'epochs': 300, 'steps': 2}

    Args:
      text: the part after the colon.
      **choices: the values of each argument, its default first (None: no default); `float` among
        them allows any number, `str` any text. The first argument is required, and its name may be
        left out.
    Raises:
      ArgumentError: an unknown argument, a repeated one, or an invalid value.
    """
    first, *_ = choices
    arguments: dict[str, str] = {}
    for i, word in enumerate((text or "").split(",") if text else ()):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals and i == 0:
            name, value = first, name
        if name not in choices:
            raise ArgumentError(
                f"{word!r} is not an argument of this config; {meant(name, choices)}"
            )
        if name in arguments:
            raise ArgumentError(f"the argument {name} is given twice; give it once")
        arguments[name] = value
    if first not in arguments:
        first_choices = ", ".join(map(str, choices[first]))
        raise ArgumentError(f"give the {first} after a colon, one of {first_choices}")
    return {
        name: _argument(name, arguments[name], values) if name in arguments else values[0]
        for name, values in choices.items()
    }


def _argument(name: str, text: str, values: Sequence[Any]) -> Any:
    match = {str(value): value for value in values if value not in (None, float, str)}
    if text in match:
        return match[text]
    if str in values and text:
        return text
    if float not in values:
        raise ArgumentError(f"{name}={text} is not a valid value; {meant(text, match)}")
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(f"{name}={text} is not a number") from None


@dataclass(frozen=True)
class NetworkSpec:
    """The specification of a network; None: not known yet."""

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
        """Return the sizes of its images and classes."""
        return {key: getattr(self, key) for key in ("num_classes", "image_size", "in_channels")}

    def create(self, *, dtype: str, remat: bool = False) -> "Classifier":
        """Make the network's functions, computing in `dtype`."""
        from jaxrobust import models

        fields = self.sizes() | {"dtype": dtype, "remat": remat}
        if twice := sorted(fields.keys() & self.options.keys()):
            raise ValueError(f"model.options.{twice[0]} is not an option; set model.{twice[0]}")
        return models.create(self.name, **fields, **self.options)


def network_of(config: Config, *, dtype: str | None = None) -> "Classifier":
    """Make the config's network; `dtype` overrides its compute type."""
    model = config.model
    return NetworkSpec.of_config(config).create(dtype=dtype or model.dtype, remat=model.remat)


class Values(dict):
    """A config as plain values with keys readable as attributes, which is how `build` reads it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def plain(config: Any) -> dict[str, Any]:
    """Copy a config, or a section of one, to values that JSON supports."""
    return json.loads(json.dumps(config) if isinstance(config, dict) else config.to_json())


def attributes(config: dict[str, Any]) -> Any:
    """Make the keys of plain values, and of sections in them, readable as attributes."""
    return json.loads(json.dumps(config), object_hook=Values)


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Add to a run's config the defaults of keys that are newer than the run."""
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
    """Return this host's number of decoding processes: the config's, or one based on its cores.

    The default is 0 if JAX computes on these cores, so that it has all of them.
    """
    if data.workers is not None:
        return data.workers
    import jax

    return 0 if jax.default_backend() == "cpu" else max(launch.own_cores() - SPARED, 0)


def phases(config: Config) -> list[str]:
    """List the names of the phases to run, in order."""
    names = list(config.phases)
    for name in names:
        if name not in config or "objective" not in config[name]:
            raise ValueError(
                f"phases={names} names {name!r}, but the config has no such section; add "
                f"config.{name} = phase(...)"
            )
        if names.count(name) > 1:
            raise ValueError(f"phases={names} names {name!r} twice; rename the second")
    happen = [name for name in names if config[name].epochs != 0]
    if not happen:
        zeros = " and ".join(f"{name}.epochs=0" for name in names) or "phases=()"
        raise ValueError(f"{zeros}: there is nothing to train")
    return happen


def of_phase(config: Config, name: str) -> Config:
    """Return the config as a phase sees it, with the phase's `changes`."""
    changes = plain(config[name].changes)
    if not changes:
        return config
    changed = plain(config)
    for keys, value in _leaves(changes):
        _change(changed, keys, value, f"{name}.changes.")
    return attributes(changed)


def _leaves(tree: Mapping[str, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and (*keys, key) != ("model", "options"):
            yield from _leaves(value, (*keys, key))
        else:
            yield (*keys, key), value


def _change(config: dict[str, Any], keys: tuple[str, ...], value: Any, prefix: str) -> None:
    section, allowed = config, list(CHANGES)
    for depth, key in enumerate(keys):
        allowed = allowed if depth == 0 else list(section)
        if key not in allowed:
            full_key = f"{prefix}{'.'.join(keys[: depth + 1])}"
            raise ValueError(f"{full_key} is not a key; {meant(key, allowed)}")
        if depth < len(keys) - 1:
            if not isinstance(section[key], dict):
                raise ValueError(f"{prefix}{'.'.join(keys)}: {key} is a value, not a section")
            section = section[key]
    if isinstance(section[keys[-1]], dict) and not isinstance(value, dict):
        raise ValueError(f"{prefix}{'.'.join(keys)} is a section, but {value!r} is a value")
    section[keys[-1]] = value
