"""Where each value of a config comes from: a paper's table, its authors' code, RobustBench, us.

A recipe has `SOURCES`, a source for each key that differs from its default. `DEFAULTS` are the
sources for `jaxrobust.config.base`, which follows the main paper (Singh, Croce, Hein 2023). Key
names may contain `*`; an exact name wins, otherwise the last pattern that matches.
"""

import fnmatch
import json
import runpy
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrobust.attacks import registry
from jaxrobust.config import base, plain
from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.text.spelling import meant

# Each source begins with one of these.
PLACES = (
    *("Table", "appendix", "section", "thesis", "the paper"),
    *("authors' code", "RobustBench", "ours"),
)
COMMAND_LINE = "the command line"
DEFAULTS = {
    "attack.epsilon": "Table 1",
    "attack.labels": "authors' code: mixed labels, smoothed",
    "attack.name": "Table 12",
    "attack.norm": "Table 1",
    "attack.start": "authors' code: no random start",
    "attack.steps": "section 4.2",
    "data.augmentation": "Table 1: basic, a random crop; authors' code: a crop of 8 to 100% of the "
    "image, resized, without a flip",
    "data.selection_split": "appendix A.3: 4,000 images that are not among the reported ones",
    "data.test_split": "RobustBench: its list of 5,000 images",
    "evaluation.steps": "appendix A.3: ten steps of APGD choose the epoch of larger networks",
    "mixup.probability": "authors' code: timm's",
    "mixup.switch": "authors' code: timm's",
    "train.b2": "authors' code: 0.95",
    "train.batch_size": "appendix A.3: the value for medium networks",
    "train.clip_norm": "authors' code: gradients are not clipped",
    "train.ema_decay": "section 4.2 and authors' code: 0.9999; appendices A.1 and A.2: 0.999",
    "train.epochs": "Table 1",
    "train.final_lr": "authors' code: 5e-6",
    "train.lr": "appendix A.2; authors' code: not scaled with the batch",
    "train.objective": "section 4.2",
    "train.optimizer": "appendix A.2",
    "train.schedule": "authors' code: a cosine that is linear between epochs",
    "train.warmup_epochs": "appendix A.2: the peak is at epoch 10",
    "train.warmup_lr": "authors' code: 1e-4 of the peak",
    "train.weight_decay": "appendix A.2",
}


class ConfigKey(NamedTuple):
    """A key of a config, its value, and the source of the value; None if unknown."""

    name: str
    value: Any
    source: str | None
    default: bool


def of_config(
    config: Any, sources: Mapping[str, str], changed: Sequence[str] = ()
) -> list[ConfigKey]:
    """List the keys of a config; the source of `changed` keys is the command line."""
    usual = arguments.flat(plain(base()))
    keys = []
    for name, value in arguments.flat(plain(config)).items():
        if name == "attack.steps":
            value = registry.steps(config.attack.name, value)  # FGSM takes one, whatever is set
        default = name in usual and usual[name] == value
        texts = DEFAULTS if default else sources
        fitting = [text for pattern, text in texts.items() if fits(name, pattern)]
        source = texts.get(name, fitting[-1] if fitting else None)
        typed = any(name == key or name.startswith(f"{key}.") for key in changed)
        keys.append(ConfigKey(name, value, COMMAND_LINE if typed else source, default))
    return keys


def fits(name: str, pattern: str) -> bool:
    """Tell whether a pattern matches a key or a section that contains it."""
    return any(fnmatch.fnmatchcase(name, one) for one in (pattern, f"{pattern}.*"))


def of_recipe(config: str) -> Mapping[str, str]:
    """Read the sources stated in a config file; empty if it has none."""
    path, _ = arguments.split_config(config)
    return runpy.run_path(str(path)).get("SOURCES", {})


def chosen(keys: Sequence[ConfigKey], name: str | None, everything: bool) -> list[ConfigKey]:
    """Select a key or the keys of a section; by default the keys with non-default values."""
    if name is None:
        return [key for key in keys if everything or not key.default]
    selected = [key for key in keys if key.name == name or key.name.startswith(f"{name}.")]
    if not selected:
        names = [key.name for key in keys]
        raise ValueError(f"{name} is not a key of this config; {meant(name, names)}")
    return selected


def text(keys: Sequence[ConfigKey], width: int) -> str:
    """Format keys with their sources one below another, in lines of at most `width`."""
    if not keys:
        return "every key has its default; name one to see its value and source"
    first = max(len(key.name) for key in keys)
    lines = []
    for key in keys:
        value = json.dumps(key.value)
        source = key.source or ("a default" if key.default else "no source is given")
        if key.default and key.source:
            source += " (the default, as in the main paper)"
        line = f"{key.name:{first}}  {value}: {source}"
        lines += textwrap.wrap(line, width, subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(lines)
