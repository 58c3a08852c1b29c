"""What the versions of AutoAttack consist of, and what their attacks cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrobust.attacks import BALLS
from jaxrobust.evaluation.engine import CE, DLR, Setting

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "custom": ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"),
}
BASE = {
    "apgd-ce": Setting("apgd-ce", "apgd", "", steps=100),
    "apgd-dlr": Setting("apgd-dlr", "apgd", "", steps=100),
    "apgd-t": Setting("apgd-t", "apgd", "", steps=100, targets=9),
    "fab": Setting("fab", "fab", "", steps=100, restarts=5),
    "fab-t": Setting("fab-t", "fab", "", steps=100, targets=9),
    "square": Setting("square", "square", "", steps=5000),
}
_FIVE = {"restarts": 5}
_CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {},
    "plus": {"apgd-ce": _FIVE, "apgd-dlr": _FIVE},  # FAB has five anyway
    "rand": {"apgd-ce": {"eot": 20}, "apgd-dlr": {"eot": 20}},
    "custom": {"apgd-ce": _FIVE, "apgd-dlr": _FIVE},
    "standard, l1": {
        "apgd-ce": {"restarts": 5, "machine": "apgd-multi-radius"},
        "apgd-t": {"targets": 5, "machine": "apgd-multi-radius"},
    },
}


def plan(
    norm: str,
    version: str,
    names: Sequence[str] | None,
    overrides: Mapping[str, Mapping[str, Any]] | None,
) -> list[Setting]:
    """The attacks to run, in order; arguments as in `autoattack`.

    Raises:
      ValueError: an unknown norm, version, attack or override.
    """
    if norm not in BALLS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(BALLS)}")
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} is unknown; choose one of {', '.join(VERSIONS)}")
    if names is None:
        if version == "custom":
            raise ValueError("version='custom' needs attacks=(...); " + _choices(version))
        names = VERSIONS[version]
    if isinstance(names, str):
        raise ValueError(f"attacks={names!r} is a string; pass ({names!r},)")
    for name in names:
        if name not in VERSIONS[version]:
            raise ValueError(f"attack {name!r} is not in version {version!r}; {_choices(version)}")
    if unused := [name for name in overrides or {} if name not in names]:
        raise ValueError(f"overrides of {unused}, which do not run; these do: {[*names]}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"attacks={tuple(names)} are none or repeated; {_choices(version)}")
    changes = _CHANGES[version] | _CHANGES.get(f"{version}, {norm}", {})
    settings = []
    for name in names:
        change = dict((overrides or {}).get(name, {}))
        setting = BASE[name]._replace(norm=norm, **changes.get(name, {}))
        _check_change(setting, change)
        numbers: dict[str, Any] = {key: int(value) for key, value in change.items()}
        settings.append(setting._replace(**numbers))
    return settings


def _check_change(setting: Setting, change: dict[str, Any]) -> None:
    """Refuses an override that the attack does not have, or a number that it cannot use."""
    editable = {"steps": 1, "restarts": 1}  # with the least value of each
    if setting.machine == "apgd-multi-radius":
        editable["steps"] = 5  # three stages of one step at least
    if setting.targets:
        editable["targets"] = 1
    if setting.machine.startswith("apgd"):
        editable["eot"] = 1
    for key, value in change.items():
        if key not in editable:
            raise ValueError(f"{setting.name} has no {key!r} to override; it has {[*editable]}")
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < editable[key]:
            raise ValueError(
                f"override of {setting.name}: {key}={value!r}; pass an int >= {editable[key]}"
            )


def _choices(version: str) -> str:
    return "choose from " + ", ".join(VERSIONS[version])


def fit(setting: Setting, classes: int, tell: Callable[[str], None]) -> Setting:
    """The setting for this number of classes; says what changes."""
    if setting.targets > classes - 1:
        tell(
            f"{setting.name}: {classes - 1} target classes instead of {setting.targets}, "
            f"the logits have {classes} classes"
        )
        setting = setting._replace(targets=classes - 1)
    if setting.name == "apgd-t" and classes < 4:
        tell("apgd-t: the targeted DLR loss needs 4 classes; climbs the margin z_t - z_y instead")
    if setting.name == "apgd-dlr" and classes < 3:
        tell("apgd-dlr: the DLR loss needs 3 classes; climbs the margin instead")
    return setting


def targets(setting: Setting, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """i32[n, T]: the likeliest wrong classes of the clean images, or the code of a loss."""
    n = len(labels)
    if not setting.targets:
        return np.full((n, 1), DLR if setting.name == "apgd-dlr" else CE, np.int32)
    wrong = logits.astype(np.float64)
    wrong[np.arange(n), labels] = -np.inf
    # From the end of an ascending order, as the reference: of equal logits the last class first.
    return np.argsort(wrong, axis=1, kind="stable")[:, ::-1][:, : setting.targets].astype(np.int32)


_FORWARD = {"apgd": 1, "apgd-multi-radius": 1, "fab": 2, "square": 1}


def forward(setting: Setting) -> int:
    """Forward passes of one step."""
    return _FORWARD[setting.machine] * setting.eot


def backward(setting: Setting, classes: int) -> int:
    """Backward passes of one step; untargeted FAB differentiates every logit."""
    per_step = {"square": 0, "fab": 1 if setting.targets else classes}.get(setting.machine, 1)
    return per_step * setting.eot


def passes(setting: Setting, classes: int) -> int:
    """Forward and backward passes of one step."""
    return forward(setting) + backward(setting, classes)


def most_passes(setting: Setting, classes: int) -> int:
    """For an image that is never fooled."""
    starts = {"apgd-multi-radius": 3, "fab": 0}.get(setting.machine, 1)
    jobs = setting.restarts * max(setting.targets, 1)
    return (setting.steps + starts) * jobs * passes(setting, classes)
