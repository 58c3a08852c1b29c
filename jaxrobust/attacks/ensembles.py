"""The attacks in each version of AutoAttack, and their cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrobust import attacks
from jaxrobust.attacks.losses import DLR
from jaxrobust.attacks.registry import Setting, StandardSettings, searching
from jaxrobust.attacks.sparse import sparse_pgd, sparse_rs  # noqa: F401  (enter their rows)
from jaxrobust.types import THREAT_NORMS, check_norm

_STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
FAST = "fast"  # part of "standard"'s jobs, the rest only on a sample: not AutoAttack
VERSIONS = {
    "standard": _STANDARD,
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    FAST: _STANDARD,
}
_L0 = ("sparse-pgd", "sparse-pgd-p", "sparse-rs")  # Sparse-AutoAttack (arXiv 2405.05075)
ON_ALL = ("apgd-ce", "apgd-t")  # the attacks of "fast" that run on all images
ON_NEAREST = ("fab-t",)  # the ones that also run on the nearest survivors
CUSTOM = "custom"  # any attacks
TASK = "task"  # the attacks of `jaxrobust.tasks`


def versions(norm: str) -> dict[str, tuple[str, ...]]:
    """List the attacks of each version that exists for a norm; "custom" has all attacks."""
    return ({"standard": _L0} if norm == "l0" else VERSIONS) | {CUSTOM: _all(norm)}


def _all(norm: str, *, of_tasks: bool = False) -> tuple[str, ...]:
    rows = searching(of_tasks=of_tasks).items()
    return tuple(name for name, (facts, _) in rows if norm in facts.norms)


def named(name: str) -> StandardSettings:
    """Look up an attack of AutoAttack, with its standard settings."""
    return searching(of_tasks=None)[name][1]


def base(name: str, norm: str) -> Setting:
    """Make the standard setting of an attack."""
    row, standard = searching(of_tasks=None)[name]
    return Setting(name, row.machine, norm, standard.steps, standard.restarts, standard.targets)


_FIVE = {"restarts": 5}
_CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {},
    "plus": {"apgd-ce": _FIVE, "apgd-dlr": _FIVE},  # FAB has five by default
    "rand": {"apgd-ce": {"eot": 20}, "apgd-dlr": {"eot": 20}},
    CUSTOM: {"apgd-ce": _FIVE, "apgd-dlr": _FIVE},
    TASK: {},
    "standard, l1": {
        "apgd-ce": {"restarts": 5, "machine": "apgd-multi-radius"},
        "apgd-t": {"targets": 5, "machine": "apgd-multi-radius"},
    },
    # A part of "standard"'s jobs: fewer restarts and targets, the same machines.
    FAST: {"apgd-t": {"targets": 4}, "fab-t": {"targets": 4}},
    "fast, l1": {
        "apgd-ce": {"machine": "apgd-multi-radius"},
        "apgd-t": {"targets": 4, "machine": "apgd-multi-radius"},
        "fab-t": {"targets": 4},
    },
}


def plan(
    norm: str,
    version: str,
    names: Sequence[str] | None,
    overrides: Mapping[str, Mapping[str, Any]] | None,
) -> list[Setting]:
    """List the attacks to run, in order; arguments and errors as in `autoattack`."""
    check_norm(norm, THREAT_NORMS)
    choice = {TASK: _all(norm, of_tasks=True)} if version == TASK else versions(norm)
    if version not in choice:
        unknown = f"has no attacks for {norm}" if version in VERSIONS else "is unknown"
        raise ValueError(f"version={version!r} {unknown}; choose one of {', '.join(choice)}")
    if version == FAST and (names is not None or overrides):
        option = "attacks" if names is not None else "overrides"
        raise ValueError(
            f"version={FAST!r} already fixes the attacks and their settings; leave {option} out"
        )
    choices = "choose from " + ", ".join(choice[version])
    if names is None:
        if version == CUSTOM:
            raise ValueError(f"version={CUSTOM!r} needs attacks=(...); {choices}")
        names = choice[version]
    if isinstance(names, str):
        raise ValueError(f"attacks={names!r} is a string; pass ({names!r},)")
    for name in names:
        if name not in choice[version]:
            raise ValueError(f"attack {name!r} is not in version {version!r}; {choices}")
    if unused := [name for name in overrides or {} if name not in names]:
        raise ValueError(f"overrides names {unused}, which will not run; choose from {[*names]}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"attacks={tuple(names)} is empty or repeats an attack; {choices}")
    changes = _CHANGES[version] | _CHANGES.get(f"{version}, {norm}", {})
    settings = []
    for name in names:
        change = dict((overrides or {}).get(name, {}))
        setting = base(name, norm)._replace(**changes.get(name, {}))
        _check_change(setting, change)
        numbers: dict[str, Any] = {key: int(value) for key, value in change.items()}
        settings.append(setting._replace(**numbers))
    return settings


def adjustable(name: str) -> tuple[str, ...]:
    """List the settings of an attack that `overrides` can change."""
    row, standard = searching(of_tasks=None)[name]
    least = attacks.MACHINES[row.machine].least
    return tuple(key for key in least if key != "targets" or standard.targets)


def _check_change(setting: Setting, change: dict[str, Any]) -> None:
    least = attacks.MACHINES[setting.machine].least
    editable = {key: least[key] for key in adjustable(setting.name)}
    for key, value in change.items():
        if key not in editable:
            raise ValueError(f"{setting.name} has no setting {key!r}; choose from {[*editable]}")
        is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_int or value < editable[key]:
            raise ValueError(
                f"override of {setting.name}: {key}={value!r} must be an int >= {editable[key]}"
            )


def fit(setting: Setting, classes: int, tell: Callable[[str], None]) -> Setting:
    """Adapt a setting to this number of classes; `tell` receives messages about changes."""
    if setting.targets > classes - 1:
        tell(
            f"{setting.name}: using {classes - 1} target classes instead of {setting.targets}, "
            f"because the logits have {classes} classes"
        )
        setting = setting._replace(targets=classes - 1)
    climbs = not attacks.MACHINES[setting.machine].aims  # the loss depends on the target
    if setting.targets and climbs and classes < 4:
        tell(
            f"{setting.name}: the targeted DLR loss needs 4 classes; using the margin z_t - z_y "
            "instead"
        )
    if named(setting.name).code == DLR and classes < 3:
        tell(f"{setting.name}: the DLR loss needs 3 classes; using the margin instead")
    return setting


def ranks(logits: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Rank the most likely wrong classes of clean images, u[n, count], by logits f[n, K]."""
    wrong = logits.astype(np.float64)
    wrong[np.arange(len(labels)), labels] = -np.inf
    # From the end of an ascending order, like the reference: the last of equal logits comes first.
    order = np.argsort(wrong, axis=1, kind="stable")[:, ::-1][:, :count]
    return order.astype(np.min_scalar_type(logits.shape[1]))


def targets(setting: Setting, likely: np.ndarray) -> np.ndarray:
    """Return as many of `ranks` as the attack uses, i[n, T], or the code of a loss."""
    if not setting.targets:
        return np.full((len(likely), 1), named(setting.name).code, np.int32)
    return likely[:, : setting.targets]


def forward(setting: Setting) -> int:
    """Count the forward passes of one step."""
    return attacks.MACHINES[setting.machine].forward * setting.eot


def backward(setting: Setting, classes: int) -> int:
    """Count the backward passes of one step."""
    row = attacks.MACHINES[setting.machine]
    per_step = classes if row.each_class and not setting.targets else 1
    return row.backward * per_step * setting.eot


def passes(setting: Setting, classes: int) -> int:
    """Count the forward and backward passes of one step."""
    return forward(setting) + backward(setting, classes)


def most_passes(setting: Setting, classes: int) -> int:
    """Count the passes for an image that is never fooled."""
    evaluations = setting.steps + attacks.MACHINES[setting.machine].extra
    jobs = setting.restarts * max(setting.targets, 1)
    return evaluations * jobs * passes(setting, classes)
