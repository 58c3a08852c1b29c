"""The attacks by name: what trains, what AutoAttack searches with, what takes a number of steps.

The file of an attack ends with its rows, which `add` enters: everything that names attacks (flags,
configs, their messages and help, counts of passes, records) reads them here. An attack is one file
and one import in `attacks/__init__.py`; one of your own is one call of `add` before it is used.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxrobust.attacks.losses import CE
from jaxrobust.types import NORMS, Array, Attack, Machine


class Setting(NamedTuple):
    """One attack of an evaluation.

    `steps` are iterations, or Square's queries; `targets` classes are aimed at in turn (0: none);
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

    number: int  # its draws derive from it: fixed for ever
    steps: int
    restarts: int = 1
    targets: int = 0
    code: int = CE  # what an untargeted run climbs; see `losses.by_target`
    of_tasks: bool = False  # it climbs the loss of a task, not one of logits


class MachineFacts(NamedTuple):
    """What others need to know of a machine: the engine, the plan, the costs, the checks."""

    machine: str
    make: Callable[[Setting, Array], Machine]  # of a setting and a radius
    rule: str  # what its steps are
    norms: tuple[str, ...] = NORMS
    starts: tuple[str, ...] = ("random",)  # of the first restarts; the last one of all others
    aims: bool = False  # whether its program knows if it is given target classes
    forward: int = 1  # passes of a step
    backward: int = 1
    each_class: bool = False  # untargeted, this many backward passes per class
    extra: int = 1  # evaluations in addition to the steps, of an image that is never fooled
    final_forward: bool = False  # whether a training attack ends with a pass without gradient
    least: Mapping[str, int] = MappingProxyType({})  # what may be overridden -> its least value
    flat: bool = False  # whether a first gradient of zeros puts an untargeted run in doubt


class Fixed(NamedTuple):
    """How an attack of a fixed number of steps is evaluated with, as `--attack NAME-K`."""

    loss: str = "ce"
    start: str = "random"  # unless told otherwise


class NamedAttack(NamedTuple):
    """An attack by its name.

    `make(norm=, epsilon=, steps=, loss=, random_start=) -> attack` and, where steps have a
    `length`, `step_size=` and `l1_rule=` too.
    """

    name: str  # in configs, flags and records
    help: str  # in a few words, for lists
    facts: MachineFacts  # of its machine
    searches: StandardSettings | None = None  # in AutoAttack; None: it does not
    fixed: Fixed | None = None  # its evaluation by a number of steps; None: there is none
    trains: bool = False  # as `attack.name` of a config
    make: Callable[..., Attack] | None = None  # None: it searches only
    length: float | None = None  # of a step, as a multiple of epsilon / steps; None: its own choice
    single: bool = False  # it has one step
    stronger: str = ""  # of a single step: the row that takes several

    def steps(self, count: int) -> int:
        """Count the steps that are made if this many are asked for: those, or one."""
        return 1 if self.single else count

    @property
    def written(self) -> str:
        """Write it as `--attack` takes it by a number of steps K."""
        return self.name if self.single else f"{self.name}-K"


ROWS: dict[str, NamedAttack] = {}  # attacks by the names that `--attack` and configs take
MACHINES: dict[str, MachineFacts] = {}  # what searches are made of, by its name in records


def add(facts: MachineFacts, *rows: NamedAttack) -> None:
    """Enter a machine and the attacks that it makes; `ValueError` where a row fits no other."""
    names = set(ROWS)
    numbers = {row.searches.number: row.name for row in ROWS.values() if row.searches}
    for row in rows:
        if row.name in names:
            raise ValueError(f"there is an attack {row.name} already; choose another name")
        if row.searches and (other := numbers.get(row.searches.number)):
            raise ValueError(
                f"attack {row.name}: number {row.searches.number} is {other}'s, whose draws derive "
                f"from it; choose another, such as {max(numbers) + 1}"
            )
        if (row.trains or row.fixed) and row.make is None:
            raise ValueError(f"attack {row.name} trains or takes steps, so it needs `make`")
        names.add(row.name)
        if row.searches:
            numbers[row.searches.number] = row.name
    MACHINES[facts.machine] = facts
    ROWS.update({row.name: row for row in rows})


def searching(*, of_tasks: bool = False) -> dict[str, tuple[MachineFacts, StandardSettings]]:
    """Select what AutoAttack can search with, of logits or of tasks, with the machine of each."""
    rows = [(row, row.searches) for row in ROWS.values() if row.searches]
    return {row.name: (row.facts, s) for row, s in rows if s.of_tasks == of_tasks}


def training() -> dict[str, NamedAttack]:
    """Select what `attack.name` of a config may be."""
    return {name: row for name, row in ROWS.items() if row.trains}


def fixed() -> dict[str, NamedAttack]:
    """Select what runs a fixed number of steps."""
    return {name: row for name, row in ROWS.items() if row.fixed}


def trained(name: str) -> NamedAttack:
    """Find the training attack of a config; `ValueError`: no such name."""
    rows = training()
    if name not in rows:
        raise ValueError(f"unknown attack {name!r}; one of {sorted(rows)}")
    return rows[name]


_NAMED = re.compile(r"(.+)-([1-9]\d{0,6})")


def parse(attack: str) -> tuple[NamedAttack, int] | None:
    """Read an attack of a fixed number of steps, such as pgd-20; None if it is not one."""
    rows = fixed()
    if (row := rows.get(attack)) and row.single:
        return row, 1
    match = _NAMED.fullmatch(attack)
    row = rows.get(match[1]) if match else None
    return (row, int(match[2])) if match and row and not row.single else None


def goes_image_by_image(attack: str) -> bool:
    """Recognise AutoAttack, or some of its parts, which attack each image until it is fooled."""
    if attack == "clean" or parse(attack):
        return False
    heads = tuple(f"{name}-" for name, row in fixed().items() if not row.single)
    return not attack.startswith(heads) or attack.split(",")[0] in searching()


def written(*, also: str = "") -> str:
    """List the attacks of a fixed number of steps for messages and help."""
    return ", ".join(row.written for row in fixed().values()) + also


def rule(attack: str) -> str | None:
    """Say what the steps of an attack are, as records name it; None: it is not known here."""
    parsed = parse(attack)
    row = parsed[0] if parsed else ROWS.get(attack.partition(" ")[0])  # "apgd-ce (full)"
    return row.facts.rule if row else None


def steps(name: str, count: int) -> int:
    """Count the steps of a training attack; of one that is not known here, those given."""
    return ROWS[name].steps(count) if name in ROWS else count


def passes(name: str, steps: int) -> int:
    """Count the forward and backward passes per image of a training attack with this many steps."""
    row = trained(name)
    facts = row.facts
    return row.steps(steps) * (facts.forward + facts.backward) + facts.final_forward


def described(*select: Callable[[], Mapping[str, Any]]) -> str:
    """List attacks with their help, a line each."""
    rows = dict.fromkeys(name for chosen in select for name in chosen())
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:{width}}  {ROWS[name].help}" for name in rows)
