"""Stages before a training begins: read, checked, and their cost said."""

from pathlib import Path
from typing import Any

from jaxrobust.analysis.stages import checks, costs, stage
from jaxrobust.analysis.stages.stage import Stage
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say


def stages(then: str | None, config: Any, workdir: Path, *, estimate: bool) -> list[Stage]:
    """Read and check the stages of `--then`; None: there are none.

    Where nothing has begun and `estimate` is asked for, what all of it costs is said.
    Raises:
      ValueError: a stage that is none, or that cannot work after this training.
    """
    if then is None:
        return []
    named = stage.parse(then)
    for line in checks.prepared(config, named):
        say(line)
    hosts.together(lambda: checks.check(config, named, workdir))
    if estimate and not hosts.first((workdir / "config.json").is_file()):
        compilation.use_persistent_cache(workdir.parent)  # training finds what this compiles
        for line in costs.lines(config, named, workdir):
            say(line)
    return named
