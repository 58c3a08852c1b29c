"""What a person sees while a run goes on: one bar on a terminal, plain lines elsewhere."""

import signal
import sys
from types import FrameType

import jax
from tqdm import tqdm


def say(message: str, *, every_process: bool = False) -> None:
    """Print a line on stderr, above a bar that may be there; only from the first process unless
    asked.
    """
    if jax.process_index() == 0 or every_process:
        tqdm.write(message, file=sys.stderr)


class StopSignals:
    """Ctrl-C and SIGTERM set `asked` to the signal's number, so that the loop can save.

    Ctrl-C after that stops at once. SIGTERM does not: Slurm and Kubernetes may send it twice.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, object] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = int(number)
            say("stopping after this step, then saving (Ctrl-C: stop at once, without saving)")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds, for people."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
