"""The types of a config's sections, for whoever reads one; `config.base` holds the values."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, get_type_hints


class Section(Protocol):
    """A part of a config, whose keys read as attributes and as items."""

    def __getitem__(self, key: str, /) -> Any: ...

    def __contains__(self, key: object, /) -> bool: ...

    def get(self, key: str, default: Any = None, /) -> Any:
        """Return a key that configs of older versions may lack."""
        ...


class ModelSection(Section, Protocol):
    name: str
    num_classes: int
    image_size: int
    in_channels: int
    dtype: str
    remat: bool
    options: Mapping[str, Any]


class MeshSection(Section, Protocol):
    fsdp: int


class StartSection(Section, Protocol):
    stem: str
    head: str
    normalize: str


class InitSection(StartSection, Protocol):
    weights: str | None


class DataSection(Section, Protocol):
    name: str
    dir: str | None
    train_split: str
    selection_split: str
    test_split: str
    classes: str | None
    augmentation: str
    preprocessing: str | None
    workers: int
    strict: bool
    max_damaged: int
    views: int
    first_view: str | None
    extra: str | None
    extra_split: str
    extra_share: float
    epoch_images: int | None


class MixupSection(Section, Protocol):
    mixup: float | None
    cutmix: float | None
    switch: float
    probability: float
    group: int


class EraseSection(Section, Protocol):
    probability: float | None
    noise: str


class PhaseSection(StartSection, Protocol):
    objective: str
    trades_beta: float
    mart_beta: float
    l1: float
    epochs: int
    batch_size: int
    microbatches: int
    lr: float
    schedule: str
    warmup_epochs: int
    warmup_lr: float | None
    final_lr: float
    cooldown_epochs: int
    lr_steps: Sequence[float]
    lr_factor: float
    optimizer: str
    weight_decay: float
    decay_mask: str | None
    b2: float
    momentum: float
    nesterov: bool
    cycle_momentum: bool
    clip_norm: float | None
    ema_decay: float
    ema_warmup_epochs: int | None
    ema_statistics: str
    bn_statistics: str
    bn_momentum: Sequence[float]
    from_random: bool
    start: str | None
    changes: Mapping[str, Any]


class AttackSection(Section, Protocol):
    name: str
    norm: str
    epsilon: float
    steps: int
    warmup_epochs: int
    relative_step: float | None
    step_size: float | None
    start: str
    start_std: float | None
    labels: str
    statistics: str


class TroubleSection(Section, Protocol):
    skips: int
    rollbacks: int
    lr: float


class AlarmSection(Section, Protocol):
    every_steps: int
    images: int


class TestSection(Section, Protocol):
    images: int
    batch_size: int
    steps: int


class EvaluationSection(TestSection, Protocol):
    every_epochs: int
    attack: str
    step_size: float | None
    start: str | None
    weights: str
    metric: str | None


class CheckpointSection(Section, Protocol):
    every_epochs: int
    keep_epochs: bool
    keep_every_epochs: int


class LogSection(Section, Protocol):
    every_steps: int
    to: str


class Config(Protocol):
    """A whole config; the section of a phase is an item under its name."""

    seed: int
    model: ModelSection
    mesh: MeshSection
    init: InitSection
    data: DataSection
    mixup: MixupSection
    erase: EraseSection
    label_smoothing: float | None
    phases: Sequence[str]
    attack: AttackSection
    trouble: TroubleSection
    alarm: AlarmSection
    evaluation: EvaluationSection
    test: TestSection
    checkpoint: CheckpointSection
    log: LogSection

    def __getitem__(self, phase: str, /) -> PhaseSection: ...

    def __contains__(self, phase: object, /) -> bool: ...


# The sections that a config has beside its phases.
# The sections that a config has beside its phases.
SECTIONS: dict[str, Any] = {
    name: kind
    for name, kind in get_type_hints(Config).items()
    if Section in getattr(kind, "__mro__", ())
}
