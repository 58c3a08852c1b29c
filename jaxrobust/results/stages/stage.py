"""Stages as named in `--then`: select, autoattack:linf:4/255+l2:2, export:hub."""

from typing import NamedTuple

from jaxrobust.attacks import fixed_steps
from jaxrobust.attacks import registry as attack_rows
from jaxrobust.evaluation.questions.questions import AUTOATTACK, GivenFlags
from jaxrobust.models.published import PUBLISHED
from jaxrobust.publish import layouts
from jaxrobust.runtime.commandline import threats
from jaxrobust.runtime.text.spelling import meant
from jaxrobust.types import Threat

SELECT, ATTACK, EXPORT, CLEAN = "select", "attack", "export", "clean"
_FORM = "write, for example, --then select,autoattack:linf:4/255+l2:2+l1:75,export:hub"


class Stage(NamedTuple):
    """One stage after a training."""

    text: str  # as written by the user
    kind: str  # SELECT, ATTACK or EXPORT
    attack: str = ""
    threats: tuple[str, ...] = ()  # empty: those that the run trained against
    layout: str = ""  # of an export
    id: str | None = None  # of a RobustBench entry for a new network

    @property
    def balls(self) -> list[Threat]:
        """Parse the threats."""
        return [threats.parse(text, "then") for text in self.threats]


def parse(text: str) -> list[Stage]:
    """Parse the stages of `--then`, in order; a `ValueError` says what to write instead.

    >>> [stage.kind for stage in parse("select,autoattack:linf:4/255+l2:2,export:hub")]
    ['select', 'attack', 'export']
    """
    stages = [_parsed(word.strip()) for word in text.split(",")]
    for number, stage in enumerate(stages):
        earlier = stages[:number]
        key = (stage.kind, stage.attack, stage.layout)
        alike = [other for other in earlier if (other.kind, other.attack, other.layout) == key]
        if any(stage.kind != ATTACK or set(one.balls) == set(stage.balls) for one in alike):
            raise ValueError(f"--then={text} has {stage.text} twice; give it once")
        if stage.kind == SELECT and earlier:
            raise ValueError(
                f"--then={text}: select chooses the weights for {earlier[0].text}; put it first"
            )
        if stage.id and not any(other.attack == AUTOATTACK for other in earlier):
            raise ValueError(
                f"--then={text}: {stage.text} writes the entry {stage.id} of RobustBench, which "
                "needs an AutoAttack accuracy; put autoattack before it"
            )
    return stages


def _parsed(word: str) -> Stage:
    name, colon, argument = (part.strip() for part in word.partition(":"))
    if not name:
        raise ValueError(f"--then has an empty stage; {_FORM}")
    if colon and not argument:
        raise ValueError(f"--then={word} has nothing after its colon; {_FORM}")
    if name == SELECT:
        if argument:
            raise ValueError(f"--then={word}: select accepts nothing after a colon; leave it out")
        return Stage(word, SELECT)
    if name == EXPORT:
        return _export(word, argument)
    if name != CLEAN and not GivenFlags(attack=name).searches and fixed_steps.parse(name) is None:
        stages = (SELECT, EXPORT, AUTOATTACK, CLEAN, *attack_rows.searching(), "pgd-20", "fgsm")
        raise ValueError(
            f"--then={word}: {name!r} is neither a stage nor an attack; {meant(name, stages)}"
        )
    stage = Stage(
        word, ATTACK, name, tuple(part.strip() for part in argument.split("+") if argument)
    )
    if name == CLEAN and argument:
        raise ValueError(f"--then={word}: clean does not accept a threat; leave {argument} out")
    if len(set(stage.balls)) < len(stage.threats):  # `balls` parses, and may raise
        raise ValueError(f"--then={word} repeats a threat; give it once")
    return stage


def _export(word: str, text: str) -> Stage:
    layout, _, name = (part.strip() for part in text.partition(":"))
    if layout not in (*layouts.LAYOUTS, *PUBLISHED):
        fault = f"{layout!r} is not a layout" if layout else "the layout is missing"
        near = meant(layout, [*layouts.LAYOUTS, *PUBLISHED])
        of = f"choose one of {', '.join(layouts.LAYOUTS)}, or a RobustBench id, as in export:hub"
        raise ValueError(f"--then={word}: {fault}; {near if near.startswith('did') else of}")
    return Stage(word, EXPORT, layout=layout, id=name or None)
