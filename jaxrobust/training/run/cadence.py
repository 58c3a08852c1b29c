"""What is due at a step: a line of metrics, a checkpoint, a copy that stays, an evaluation."""

from typing import NamedTuple


class Due(NamedTuple):
    """What to do before the next step is taken."""

    logs: bool
    saves: bool
    keeps: bool
    evaluates: bool


class Every(NamedTuple):
    """How often a phase does what; the last step is one for all."""

    log_steps: int
    checkpoint_epochs: int
    evaluation_epochs: int
    steps_per_epoch: int
    total_steps: int
    keep_epochs: int = 0  # 0: never, not even at the end


def due(step: int, every: Every, *, start: int, saved: int, evaluated: int, kept: int = 0) -> Due:
    """Decide the actions after `step` steps; a run went on from `start`.

    A checkpoint, a copy or an evaluation stays due until it is done: where a step without a
    gradient is in the way, at the first step after. `saved`, `evaluated`, `kept`: the last ones.
    """
    ends = step == every.total_steps

    def last(epochs: int) -> int:
        return step if ends else step - step % (epochs * every.steps_per_epoch)

    evaluates = last(every.evaluation_epochs) > evaluated
    keeps = every.keep_epochs > 0 and last(every.keep_epochs) > kept
    return Due(
        logs=step > start and (step % every.log_steps == 0 or ends),
        saves=evaluates or keeps or last(every.checkpoint_epochs) > saved,
        keeps=keeps,
        evaluates=evaluates,
    )
