"""What the positional argument of a command means: a run, weights, or a function."""

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from jaxrobust.runtime import pytorch

_IN_MODULE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def with_target(
    values: dict[str, Any], target: str, *, weights: Container[str] = ()
) -> dict[str, Any]:
    """Set the flag that a positional target stands for: a run, weights, or a function.

    `weights`: names that, before a colon, mean weights and not modules.

    >>> with_target({"norm": "l2"}, "nets.py:logits_fn")
    {'norm': 'l2', 'function': 'nets.py:logits_fn'}
    >>> with_target({}, "package.nets:make"), with_target({}, "quick:a", weights=["quick"])
    ({'function': 'package.nets:make'}, {'weights': 'quick:a'})
    """
    path, flag, value = Path(target), "weights", target
    in_module = _IN_MODULE.fullmatch(target) and target.partition(":")[0] not in weights
    if target.startswith(pytorch.PREFIX):
        flag, value = "torch", target.removeprefix(pytorch.PREFIX)
    elif target.startswith("gs://") or (
        (path / "config.json").is_file() and (path / "metrics.jsonl").is_file()
    ):
        flag = "workdir"
    elif (".py:" in target or in_module) and not path.exists():
        flag = "function"
    elif path.suffix == ".py" and path.is_file():
        raise ValueError(
            f"{target} is Python code, not weights; name a function in it, such as "
            f"{target}:logits_fn, or the run that this config trained"
        )
    for name in ("workdir", "weights", "function", "torch"):
        if values.get(name) is not None:
            raise ValueError(
                f"{target} and --{name}={values[name]} both name the network; leave one out"
            )
    return values | {flag: value}
