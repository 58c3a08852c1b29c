"""The lines that measure the rows of the papers' tables, or in one sentence why there are none.

They are made of what the tables say (`tables`) by the rules of each paper: nothing is listed by
hand. A record of a line fills the cells of its row, which `tests/papers/test_lines.py` shows for
each of them.
"""

import functools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxrobust.papers.tables import rules_cifar, rules_imagenet, tables, training_words
from jaxrobust.papers.tables.rules import Row, Rule
from jaxrobust.papers.tables.tables import Table
from jaxrobust.papers.tables.tables_markdown import Filled, plain, varying

RULES: dict[str, tuple[Rule, ...]] = {
    "revisiting_at": rules_imagenet.REVISITING_AT,
    "xcit_light_recipe": rules_imagenet.XCIT_LIGHT_RECIPE,
    "twenty_architectures": rules_cifar.TWENTY_ARCHITECTURES,
    "robust_resnets": rules_cifar.ROBUST_RESNETS,
}
# (model, origin) -> weights of the networks whose perturbations Table 9 of the thesis shows.
_PERTURBED = {
    ("xcit_s12", "authors"): "Debenedetti2022Light_XCiT-S12",
    ("xcit_s12", "timm"): "xcit_small_12_p16_224.fb_in1k",
    ("resnet50", "wightman2021"): "resnet50.a1_in1k",
}
_PUBLISHED_ON = "imagenet2012"  # whose images all published networks of the tables are of
_FILES = "CIFAR-10-C"  # the folder that people have, in lines
# Tables whose test resolutions were chosen by a figure: its attack and its sizes.
_CURVES = {
    ("revisiting_at", "table_3"): ("Figure 3", "apgd-t --steps 40 --targets 3", range(192, 385, 32))
}
_CORES = 64  # of the pod whose batch a core the thesis tells
_ABOUT = (
    "What measures each row: trained here, or downloaded where a second way stands below it. "
    "`jaxrobust reproduce RUN ... weights/ID ...` shows the records of runs, of their `evaluation` "
    "folders and of downloaded weights (`runs/evaluation-...`, beside `weights/ID`) in the tables. "
    "A run that several rows have is trained once."
)


class Run(NamedTuple):
    """A training run: a config, and the keys of it that are set."""

    config: str  # FILE:ARGUMENTS, of configs/
    changes: tuple[tuple[str, Any], ...] = ()  # (key, value)

    @property
    def workdir(self) -> str:
        """Name the folder that training writes: by the config, and by the keys."""
        words = re.findall(
            r"[\w.=]+", ",".join([self.config, *(str(value) for _, value in self.changes)])
        )
        return "runs/" + "-".join(words)

    def command(self) -> str:
        """Write the command that trains it."""
        file, _, arguments = self.config.partition(":")
        words = [f"configs/{file}.py:{arguments}" if arguments else f"configs/{file}.py"]
        words += [f"--config.{key}={value}" for key, value in self.changes]
        words += [f"--workdir={self.workdir}"] if self.changes else []
        return shlex.join(["jaxrobust", "train", "--config", *words])


class RowLine(NamedTuple):
    """What measures a row; without any run, id and command, `why` says that nothing does."""

    run: Run | None = None
    before: tuple[Run, ...] = ()  # whose weights it starts from; training makes it if need be
    published: str | None = None  # the id of weights of this very network
    flags: tuple[str, ...] = ()  # of jaxrobust evaluate, for each evaluation
    commands: tuple[str, ...] = ()  # which print figures of the row
    why: str = ""

    def texts(self) -> list[str]:
        """Write the commands, in their order."""
        texts = [self.run.command()] if self.run else []
        if self.run:
            texts += [f"jaxrobust evaluate --workdir {self.run.workdir} {f}" for f in self.flags]
        if self.published:
            folder = f"weights/{self.published}"
            texts.append(f"jaxrobust import {self.published} --out {folder}")
            how = f"--weights {folder} --dataset {_PUBLISHED_ON}"
            texts += [f"jaxrobust evaluate {how} {flags}" for flags in self.flags]
        return [*texts, *self.commands]

    def curve(self, attack: str, sizes: Iterable[int]) -> list[str]:
        """Write what attacks its run at several image sizes, and draws accuracy over them."""
        if not self.run:
            return []
        where = " ".join(f"--image_size {size}" for size in sizes)
        picture = f"{self.run.workdir}/resolution.pdf"
        return [
            f"jaxrobust evaluate --workdir {self.run.workdir} --attack {attack} {where}",
            f"jaxrobust figure {self.run.workdir}/evaluation --kind resolution --out {picture}",
        ]

    def start(self) -> str:
        """Say from which run the training starts; "" where from none."""
        if not self.before:
            return ""
        return (
            f"The training starts from {self.before[0].workdir}, and makes that run first where it "
            "is not finished."
        )


def of_row(table: Table, row: Row) -> RowLine:
    """Return the line of a row."""
    seen = {**row, "table": table.id, "kind": table.kind, **_more(row)}
    rule = next(rule for rule in RULES[table.paper] if rule.fits(seen))
    why = rule.why.format_map(seen)
    if rule.commands or rule.why:
        return RowLine(commands=tuple(c.format_map(seen) for c in rule.commands), why=why)
    wanted = {key: what for key, what in table.attacked().items() if row.get(key) is not None}
    if not wanted:
        return RowLine(why=f"The paper prints no accuracy of {row['name']} here.")
    flags = tuple(_evaluations(row, wanted, rule))
    if rule.published:
        return RowLine(published=row["robustbench"], flags=flags)
    changes = rule.changes(row) if rule.changes else {}
    run = Run(f"{rule.config}:{rule.words(seen)}", tuple(changes.items()))
    start = rule.start(seen) if rule.start else None
    before = (Run(start),) if start else ()
    return RowLine(run, before, row.get("robustbench"), flags)


def _more(row: Row) -> dict[str, Any]:
    """Add the keys that rules ask for and no row has: whose it is, its weights, a pod's batch."""
    model, origin = row.get("model"), row.get("origin")
    names = [row.get("robustbench"), _PERTURBED.get((str(model), str(origin)))]
    if "timm" in row or "meta" in row:
        names += training_words.clean_weights(str(model))[-1:]  # with its tag
    weights = next(filter(None, names), None)
    batch = row.get("batch_per_core", 0) * _CORES
    return {"own": origin == "authors", "weights": weights, "batch": batch}


def _evaluations(row: Row, wanted: dict[str, dict[str, Any]], rule: Rule) -> Iterator[str]:
    """Write the flags of the evaluations that measure all results of a row."""
    where = ""
    if row["image_size"] != row.get("train_size", row["image_size"]):
        where += f" --image_size {row['image_size']}"
    if row["split"] != rule.split and not rule.published:
        where += f" --split {row['split']}"
    attacked = [what for what in wanted.values() if what["attack"] not in ("clean", "corruptions")]
    flags = [*_attacks(attacked)]
    if not flags and "clean" in wanted:
        flags = ["--attack clean"]
    yield from (flag + where for flag in flags)
    if "corruptions" in wanted:
        there = f" --dataset cifar10-c:{_FILES}" if row["dataset"] == "cifar10" else where
        yield f"--corruptions all{there}"


def _attacks(results: list[dict[str, Any]]) -> Iterator[str]:
    if any("members" in what for what in results):
        yield "--worst_case"  # which runs all the others
        return
    standard = [_threat(what) for what in results if what["attack"] == "autoattack"]
    yield from [" ".join(standard)] * bool(standard)  # one evaluation of them all
    for what in results:
        if what["attack"] != "autoattack":
            yield f"{_settings(what)} {_threat(what)}"


def _threat(what: Mapping[str, Any]) -> str:
    return f"--threat {what['norm']}:{what['epsilon']}"


def _settings(what: Mapping[str, Any]) -> str:
    """Write the flags of an attack that is not AutoAttack, as `matching` compares them."""
    if "name" not in what:
        settings = f"--steps {what['steps']} --restarts {what['restarts']}"
        return f"--attack {what['attack']} {settings}"
    step = f"{what['step_size'] * 255:.3g}/255"
    return f"--attack {what['name']}-{what['steps']} --step {step} --start {what['start']}"


@functools.cache
def of_tables(paper: str) -> tuple[tuple[Table, Row, RowLine], ...]:
    """Return all rows of a paper with their lines."""
    return tuple((t, row, of_row(t, row)) for t in tables.tables(paper) for row in t.rows)


def document(name: str, shown: list[Filled], *, measured: bool, only: int | None = None) -> str:
    """Return the commands of the tables of a paper; `measured`: and how many cells are filled.

    `only`: the place of the one row that is shown.
    """
    source = tables.paper(name)["source"]
    parts = [f"# {source['title']}: commands", _ABOUT]
    return "\n\n".join([*parts, *(_table(each, measured, only) for each in shown)]) + "\n"


def _table(shown: Filled, measured: bool, only: int | None) -> str:
    table = shown.table
    told = varying(table)
    figure, attack, sizes = _CURVES.get((table.paper, table.id), ("", "", ()))
    parts = [f"## {tables.title(table)}: {table.caption}"]
    for index, row in enumerate(table.rows):
        if only not in (None, index):
            continue
        said = [f"{key} {text}" for key in told if (text := plain(row.get(key)))]
        printed = [key for key in table.attacked() if row.get(key) is not None]
        if measured and printed:
            done = sum((index, key) in shown.cells for key in printed)
            said.append(f"{done} of {len(printed)} measured")
        parts.append(", ".join([f"- Row {index + 1}: {tables.named(row)}", *said]))
        line = of_row(table, row)
        parts += ["\n".join(f"      {text}" for text in line.texts())] * bool(line.texts())
        parts += [f"  {said}" for said in (line.start(), line.why) if said]
        if figure and (texts := line.curve(attack, sizes)):
            about = f"How its size was chosen ({figure}), and a picture of that:"
            parts += [f"  {about}", "\n".join(f"      {text}" for text in texts)]
    return "\n\n".join(parts)
