"""The attacks by name: for training, for AutoAttack's searches, and with fixed steps.

An attack's file ends with its rows, which `add` registers. Everything that names attacks (flags,
configs, their messages and help, counts of passes, records) reads them here. A new attack is one
file and one import in `attacks/__init__.py`; for your own, call `add` before using it.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxrobust.attacks.losses import CE
from jaxrobust.types import NORMS, Attack, Machine


class Setting(NamedTuple):
    """One attack of an evaluation.

    `steps` are iterations, or Square's queries; `targets` classes are targeted in turn (0: none);
    `eot` gradients are averaged.
    """

    name: str
    machine: str
    norm: str
    steps: int
    restarts: int = 1
    targets: int = 0
    eot: int = 1


class StandardSettings(NamedTuple):
    """An attack of AutoAttack with its standard settings."""

    number: int  # determines its draws, so it never changes
    steps: int
    restarts: int = 1
    targets: int = 0
    code: int = CE  # the loss of an untargeted run; see `losses.by_target`
    of_tasks: bool = False  # whether it maximizes a task's loss instead of one of logits


class MachineFacts(NamedTuple):
    """What others need to know about a machine: the engine, the plan, the costs, the checks."""

    machine: str
    make: Callable[..., Machine]  # from a setting, a radius and, by default its own, a `loss`
    rule: str  # describes its steps
    norms: tuple[str, ...] = NORMS
    starts: tuple[str, ...] = ("random",)  # of the first restarts; the last one for all others
    aims: bool = False  # whether its program depends on having target classes
    forward: int = 1  # passes per step
    backward: int = 1
    each_class: bool = False  # if untargeted, this many backward passes per class
    extra: int = 1  # evaluations besides the steps, for an image that is never fooled
    final_forward: bool = False  # whether a training attack ends with a pass without gradient
    least: Mapping[str, int] = MappingProxyType({})  # setting that may be overridden -> minimum
    flat: bool = False  # whether a first gradient of zeros casts doubt on an untargeted run


class Fixed(NamedTuple):
    """How to evaluate with a fixed number of steps, as `--attack NAME-K`."""

    loss: str = "ce"
    start: str = "random"  # by default


class NamedAttack(NamedTuple):
    """An attack by its name.

    `make(norm=, epsilon=, steps=, loss=, random_start=) -> attack` and, where steps have a
    `length`, `step_size=` and `l1_rule=` too.
    """

    name: str  # in configs, flags and records
    help: str  # a short description for lists
    facts: MachineFacts  # of its machine
    searches: StandardSettings | None = None  # in AutoAttack; None: it is not part of it
    fixed: Fixed | None = None  # its evaluation with a fixed number of steps; None: there is none
    trains: bool = False  # as `attack.name` of a config
    make: Callable[..., Attack] | None = None  # None: only for searches
    length: float | None = None  # of a step, in epsilon / steps; None: chosen by the attack
    single: bool = False  # whether it has a single step
    stronger: str = ""  # for a single step: the row with several steps

    def steps(self, count: int) -> int:
        """Return the number of steps taken if `count` are requested: `count`, or one."""
        return 1 if self.single else count

    @property
    def written(self) -> str:
        """Return its form for `--attack` with a number of steps K."""
        return self.name if self.single else f"{self.name}-K"


ROWS: dict[str, NamedAttack] = {}  # attacks by their names for `--attack` and configs
MACHINES: dict[str, MachineFacts] = {}  # the machines of searches, by their names in records


def add(facts: MachineFacts, *rows: NamedAttack) -> None:
    """Register a machine and its attacks; `ValueError` if a row clashes with another."""
    names = set(ROWS)
    numbers = {row.searches.number: row.name for row in ROWS.values() if row.searches}
    for row in rows:
        if row.name in names:
            raise ValueError(f"an attack named {row.name} already exists; choose another name")
        if row.searches and (other := numbers.get(row.searches.number)):
            raise ValueError(
                f"attack {row.name}: number {row.searches.number} already belongs to {other}, "
                f"whose random draws derive from it; choose another, such as {max(numbers) + 1}"
            )
        if (row.trains or row.fixed) and row.make is None:
            raise ValueError(f"attack {row.name} has `trains` or `fixed`, so it needs `make`")
        names.add(row.name)
        if row.searches:
            numbers[row.searches.number] = row.name
    MACHINES[facts.machine] = facts
    ROWS.update({row.name: row for row in rows})


def searching(*, of_tasks: bool | None = False) -> dict[str, tuple[MachineFacts, StandardSettings]]:
    """Return AutoAttack's possible searches, on logits or on tasks, with their machines."""
    rows = [(row, row.searches) for row in ROWS.values() if row.searches]
    return {row.name: (row.facts, s) for row, s in rows if of_tasks in (None, s.of_tasks)}


def training() -> dict[str, NamedAttack]:
    """Return the possible values of `attack.name` in a config."""
    return {name: row for name, row in ROWS.items() if row.trains}


def fixed() -> dict[str, NamedAttack]:
    """Return the attacks with a fixed number of steps."""
    return {name: row for name, row in ROWS.items() if row.fixed}


def trained(name: str) -> NamedAttack:
    """Look up a config's training attack; `ValueError`: no such name."""
    rows = training()
    if name not in rows:
        raise ValueError(f"unknown attack {name!r}; choose one of {sorted(rows)}")
    return rows[name]


_NAMED = re.compile(r"(.+)-([1-9]\d{0,6})")


def parse(attack: str) -> tuple[NamedAttack, int] | None:
    """Parse an attack with a fixed number of steps, such as pgd-20; None for others."""
    rows = fixed()
    if (row := rows.get(attack)) and row.single:
        return row, 1
    match = _NAMED.fullmatch(attack)
    row = rows.get(match[1]) if match else None
    return (row, int(match[2])) if match and row and not row.single else None


def written(*, also: str = "") -> str:
    """List the attacks with a fixed number of steps, for messages and help."""
    return ", ".join(row.written for row in fixed().values()) + also


def rule(attack: str) -> str | None:
    """Describe the steps of an attack as records name it; None: unknown here."""
    parsed = parse(attack)
    row = parsed[0] if parsed else ROWS.get(attack.partition(" ")[0])  # "apgd-ce (full)"
    return row.facts.rule if row else None


def steps(name: str, count: int) -> int:
    """Return the number of steps of a training attack; if unknown here, `count`."""
    return ROWS[name].steps(count) if name in ROWS else count


def passes(name: str, steps: int) -> int:
    """Count forward and backward passes per image of a training attack with this many steps."""
    row = trained(name)
    facts = row.facts
    return row.steps(steps) * (facts.forward + facts.backward) + facts.final_forward


def described(*select: Callable[[], Mapping[str, Any]]) -> str:
    """List attacks with their help, one per line."""
    rows = dict.fromkeys(name for chosen in select for name in chosen())
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:{width}}  {ROWS[name].help}" for name in rows)
