"""What a person sees while a run goes on: one bar on a terminal, plain lines elsewhere."""

import signal
import sys
import time
from types import FrameType

import jax
from tqdm import tqdm


def say(message: str) -> None:
    """A line on stderr, above a bar that may be there; only from the first process."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)


class Progress:
    """Loss, accuracy, images/s and time left of one phase."""

    def __init__(self, phase: str, step: int, total: int, batch_size: int):
        self._main = jax.process_index() == 0
        self._terminal = self._main and sys.stderr.isatty()
        self._phase, self._total, self._batch = phase, total, batch_size
        self._bar = tqdm(
            desc=phase,
            total=total,
            initial=step,
            disable=not self._terminal,
            dynamic_ncols=True,
            leave=True,
            bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}{postfix}",
        )
        self._last = (step, time.perf_counter())
        self.images_per_second = 0.0

    def show(self, step: int, means: dict[str, float]) -> None:
        """The state after `step`; the speed is that since the last call or `resume`."""
        before, since = self._last
        seconds = time.perf_counter() - since
        if step > before:
            self.images_per_second = (step - before) * self._batch / max(seconds, 1e-9)
        self._last = (step, time.perf_counter())
        left = (self._total - step) * self._batch / max(self.images_per_second, 1e-9)
        accuracies = " ".join(f"{k} {means[k]:.1%}" for k in ("clean", "robust") if k in means)
        text = (
            f"loss {means['loss']:.4f} {accuracies} {self.images_per_second:,.0f} images/s "
            f"ETA {_clock(left)}"
        )
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._main:
            print(f"{self._phase} {step}/{self._total} {text}", file=sys.stderr, flush=True)

    def resume(self, step: int) -> None:
        """Leaves the time since the last `show` (an evaluation, a save) out of the speed."""
        self._last = (step, time.perf_counter())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class StopSignals:
    """Ctrl-C and SIGTERM set `asked`, so that the loop can save; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("stopping after this step, then saving (again: stop at once, without saving)")

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
