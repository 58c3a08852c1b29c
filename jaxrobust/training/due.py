"""What is due at a step: a line of metrics, a checkpoint, an evaluation."""

from typing import NamedTuple


class Due(NamedTuple):
    """What to do before the next step is taken."""

    logs: bool
    saves: bool
    evaluates: bool


class Every(NamedTuple):
    """How often a phase does what; the last step is one for all."""

    log_steps: int
    checkpoint_epochs: int
    evaluation_epochs: int
    steps_per_epoch: int
    total_steps: int


def due(step: int, every: Every, *, start: int, saved: int, evaluated: int) -> Due:
    """Return what is due after `step` steps.

    A checkpoint or an evaluation stays due until it is done: where a step without a gradient is
    in the way, at the first step after.

    Args:
      start: the step that this run went on from.
      saved, evaluated: the last step that was.
    """
    ends = step == every.total_steps

    def last(epochs: int) -> int:
        return step if ends else step - step % (epochs * every.steps_per_epoch)

    evaluates = last(every.evaluation_epochs) > evaluated
    return Due(
        logs=step > start and (step % every.log_steps == 0 or ends),
        saves=evaluates or last(every.checkpoint_epochs) > saved,
        evaluates=evaluates,
    )
