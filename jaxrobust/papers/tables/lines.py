"""The commands that measure the rows of the papers' tables, or the reason why there are none.

They are data: `line` of each row in `data/*.json` has the config that trains it, the changed keys,
the run that it starts from, and its evaluations. An experiment of a figure may have several
configs, and commands for each of their runs. A record of a line fills the cells of its row, as
`tests/papers/test_lines.py` checks for each.
"""

import functools
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.papers.tables import tables
from jaxrobust.papers.tables.tables import Table
from jaxrobust.runtime.commandline import arguments


class Run(NamedTuple):
    """A training run: a config and its changed keys."""

    config: str  # FILE:ARGUMENTS, of configs/
    changes: tuple[tuple[str, Any], ...] = ()  # (key, value)

    @property
    def workdir(self) -> str:
        """Name the folder of the training, after the config and the changed keys."""
        words = ",".join([self.config, *(str(value) for _, value in self.changes)])
        return "runs/" + "-".join(re.findall(r"[\w.=]+", words))

    def command(self) -> str:
        """Write the command that trains it."""
        file, colon, arguments = self.config.partition(":")
        words = [f"configs/{file}.py{colon}{arguments}"]
        words += [f"--config.{key}={value}" for key, value in self.changes]
        words += [f"--workdir={self.workdir}"] if self.changes else []
        return shlex.join(["jaxrobust", "train", "--config", *words])

    def load(self) -> Any:
        """Load the config with the changes, unlocked."""
        config = arguments.load_config(self.config)
        for key, value in self.changes:
            *sections, last = key.split(".")
            functools.reduce(lambda part, name: part[name], sections, config)[last] = value
        return config


class RowLine(NamedTuple):
    """The measurement of a row; `why` says why there is no run, id or command."""

    run: Run | None = None
    others: tuple[Run, ...] = ()  # further runs, of a figure
    start: Run | None = None  # whose weights it starts from; training makes it if necessary
    published: str | None = None  # RobustBench id or Hub address of this very network's weights
    model: str = ""  # architecture of the weights at a Hub address
    dataset: str = ""  # for the evaluation of published weights
    flags: tuple[str, ...] = ()  # of jaxrobust evaluate, for each evaluation
    each: tuple[str, ...] = ()  # commands for each run, with RUN for its folder
    commands: tuple[str, ...] = ()  # that print figures of the row
    why: str = ""

    @property
    def runs(self) -> tuple[Run, ...]:
        """Return all runs of the row."""
        return (self.run, *self.others) if self.run else ()

    def texts(self) -> list[str]:
        """Write the commands, in order."""
        texts: list[str] = []
        for run in self.runs:
            texts.append(run.command())
            place = f"--workdir {run.workdir}"
            texts += [f"jaxrobust evaluate {place} {flags}" for flags in self.flags]
            texts += [text.replace("RUN", run.workdir) for text in self.each]
        if self.published:
            on_hub = self.published.startswith("hf://")
            name = Path(self.published).stem if on_hub else self.published
            model = f" --model {self.model}" if on_hub else ""
            texts.append(f"jaxrobust import {self.published}{model} --out weights/{name}")
            place = f"--weights weights/{name} --dataset {self.dataset}"
            texts += [f"jaxrobust evaluate {place} {flags}" for flags in self.flags]
        return [*texts, *self.commands]


def published_weights(row: dict[str, Any]) -> str | None:
    """Return the RobustBench id or the Hub address of a row's weights."""
    return row.get("robustbench") or row.get("weights")


def of_row(row: dict[str, Any]) -> RowLine:
    """Return the line of a row."""
    line = row["line"]
    changes = tuple(line.get("sets", {}).items())
    configs = line.get("configs") or ([line["config"]] if "config" in line else [])
    runs = tuple(Run(config, changes) for config in configs)
    return RowLine(
        runs[0] if runs else None,
        runs[1:],
        Run(line["after"]) if "after" in line else None,
        published_weights(row) if "evaluate" in line else None,
        row.get("model") or "",
        row.get("dataset") or "",
        tuple(line.get("evaluate", ())),
        tuple(line.get("each", ())),
        tuple(line.get("commands", ())),
        line.get("why", ""),
    )


@functools.cache
def of_tables(paper: str) -> tuple[tuple[Table, dict[str, Any], RowLine], ...]:
    """Return all rows of a paper with their lines."""
    return tuple((t, row, of_row(row)) for t in tables.tables(paper) for row in t.rows)
