"""Progress of a phase: loss, accuracy, speed, remaining time, memory, cost."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from jaxrobust.config import Config, decoders
from jaxrobust.runtime.devices import compilation, hardware, in_use
from jaxrobust.runtime.text import panel, patience, terminal
from jaxrobust.runtime.text.panel import PanelRow
from jaxrobust.runtime.text.progress import LinePart, clock, say, watched
from jaxrobust.training.run import goodput

DATA_WAIT = 0.05  # share of time without a batch from which on to warn
_TITLE = "training"


@contextlib.contextmanager
def begun(phase: str, step: int, total: int, *, phases: Sequence[str]) -> Iterator[None]:
    """Show a phase's panel before a step is compiled; a `Progress` inside continues with it."""
    with panel.opened(_TITLE, here=jax.process_index() == 0, keep=True) as meter:
        meter.show(_rows(panel.stages(phases, phase), step, total), step, total)
        yield


def compiling(
    phase: str, work: str, program: str, *, always: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Announce what is compiled inside, in the panel if there is one; otherwise in a line.

    `program`: its name for `compilation.remember`; `always`: print a line even if it is short.
    """
    if panel.is_live():  # it shows the phase's name
        options: dict[str, Any] = {"say": panel.waits, "always": True}
        return compilation.waiting(f"compiling {work}", program, **options)
    return compilation.waiting(f"{phase}: compiling {work}", program, say, always=always)


def _rows(phases: Sequence[LinePart], step: int, total: int) -> list[PanelRow]:
    return [PanelRow("phases", phases), PanelRow("step", [LinePart(f"{step:,} of {total:,}")])]


class Progress:
    """Loss, accuracy, images/s, remaining time, data wait and cost of a phase.

    `flops_per_image` are the model's for one training image; model FLOP utilization relates them to
    the chip's peak. `chip_hours` were used before.
    """

    def __init__(
        self,
        config: Config,
        phase: str,
        step: int,
        total: int,
        *,
        flops_per_image: float | None = None,
        chip_hours: float = 0.0,
        times: goodput.Clock = goodput.NONE,
    ) -> None:
        self._chips, self._times = in_use.count(), times
        self._chip = hardware.chip(jax.devices()[0].device_kind)
        self._flops_per_image, self._chip_hours_before = flops_per_image, chip_hours
        self._started, self._peak_said = time.perf_counter(), 0.0
        self._main = jax.process_index() == 0
        self._seen = self._main and watched()
        self._phase, self._total, self._batch = phase, total, config[phase].batch_size
        self._figures: list[LinePart] = []  # of the last line, except the remaining time
        self._first: tuple[int, float] | None = None  # a finished step, and when
        self._done = step  # steps that have finished
        self._phases = panel.stages(config.phases, phase)
        self._meter = panel.Meter()
        self._shows = contextlib.ExitStack()
        self._workers, self._speed, self._starved = decoders(config.data), 0.0, False
        self._watched, self._watched_wait = 0.0, 0.0
        self._watcher = ThreadPoolExecutor(1, "progress")
        self._last_step: Future[float] | None = None
        self.resume(step)

    def dispatched(self, step: int, values: Any) -> None:
        """Register that a step was sent to the device; `values` are some of its results."""
        self._last_step = self._watcher.submit(self._finished, step, values)

    def _finished(self, step: int, values: Any) -> float:
        """Wait for a step's values; return when the device had them, and move the bar."""
        jax.block_until_ready(values)
        now, self._done = time.perf_counter(), step
        if self._seen:
            self._wait.again()
            self._first = self._first or (step, now)
            self._move(step, now)
        return now

    def _move(self, step: int, now: float) -> None:
        """Move the panel; remaining time is based on the speed since the first step or a line."""
        since, start = self._first or (step, now)
        speed = self._speed or (step - since) * self._batch / max(now - start, 1e-9)
        *learned, costs, mfu, starved = self._figures or [LinePart("")] * 6
        rows = (
            *_rows(self._phases, step, self._total),
            PanelRow("learns", learned),
            PanelRow("speed", [costs, mfu, starved]),
            PanelRow("left", [LinePart(self._left(step, speed))]),
        )
        self._meter.show(rows, step, self._total)

    def _left(self, step: int, speed: float) -> str:
        return clock((self._total - step) * self._batch / speed) if speed else "unknown"

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the call for a batch; only time in which the device has no step counts."""
        since = time.perf_counter()
        if self._last_step is None:  # the first batch, while workers start
            first = patience.lasting(f"{self._phase}: waiting for the first batch", here=self._main)
            with self._times.of("data"), first:
                yield
            self.resume(self._last[0])
            return
        yield
        if self._last_step.done():
            idle = time.perf_counter() - max(since, self._last_step.result())
            self._waited += idle
            self._times.move("data", idle)

    def show(self, step: int, means: dict[str, float]) -> dict[str, float]:
        """Show the state after `step`; return its costs.

        `images_per_second`, `images_per_second_per_chip`, `mfu` (model FLOP utilization) and
        `data_wait`, a share of the time, are since the last call or `resume`; `chip_hours` and
        `peak_memory_bytes` of a local device since the start; unknown ones are omitted.
        """
        last_step, since = self._last
        seconds = max(time.perf_counter() - since, 1e-9)
        data_wait = self._waited / seconds
        if step > last_step:
            self._speed = (step - last_step) * self._batch / seconds
        self.resume(step)
        self._watch(step, seconds, data_wait * seconds)
        costs = self._costs()
        self._figures = self._parts(means, costs, data_wait)
        if self._seen:
            self._move(step, time.perf_counter())
        elif self._main:
            text = " ".join(part.text for part in self._figures if part.text)
            line = f"{self._phase} {step}/{self._total} {text} ETA {self._left(step, self._speed)}"
            terminal.tell(line)
            self._wait.again()
        if costs.get("peak_memory_bytes", 0) > 1.01 * self._peak_said:
            self._say_costs(costs)
        return {"images_per_second": self._speed, "data_wait": data_wait} | costs

    def _parts(
        self, means: dict[str, float], costs: dict[str, float], data_wait: float
    ) -> list[LinePart]:
        accuracies = [f"{k} {means[k]:.1%}" for k in ("clean", "robust") if k in means]
        a_chip = "/chip" if self._chips > 1 else ""
        return [
            LinePart(f"loss {means['loss']:.4f}", 1),
            LinePart(f"batch {' '.join(accuracies)}" if accuracies else "", 2),
            LinePart(_radii(means), 2),
            LinePart(f"{costs['images_per_second_per_chip']:,.0f} images/s{a_chip}", 3),
            LinePart(f"MFU {costs['mfu']:.1%}" if "mfu" in costs else "", 4),
            LinePart(f"{data_wait:.0%} waiting for data" if self._starved else "", 5),
        ]

    def chip_hours(self) -> float:
        """Return devices times hours of the phase so far, including earlier runs."""
        return self._chip_hours_before + self._chips * (time.perf_counter() - self._started) / 3600

    def _costs(self) -> dict[str, float]:
        per_chip = self._speed / self._chips
        costs = {"images_per_second_per_chip": per_chip, "chip_hours": self.chip_hours()}
        if self._chip and self._flops_per_image:
            costs["mfu"] = per_chip * self._flops_per_image / self._chip.flops
        if peak := peak_memory():
            costs["peak_memory_bytes"] = peak
        return costs

    def _say_costs(self, costs: dict[str, float]) -> None:
        self._peak_said = costs.get("peak_memory_bytes", 0)
        of = f" of {self._chip.memory / 2**30:.0f}" if self._chip else ""
        memory = f"at most {self._peak_said / 2**30:.1f}{of} GiB in use per device, "
        say(
            f"{self._phase}: {memory if self._peak_said else ''}{costs['chip_hours']:.1f} "
            f"chip-hours so far on {self._chips} device{'s' if self._chips > 1 else ''}"
        )

    def _watch(self, step: int, seconds: float, waited: float) -> None:
        self._watched, self._watched_wait = self._watched + seconds, self._watched_wait + waited
        if self._watched < 1:
            return
        share = self._watched_wait / self._watched
        self._watched = self._watched_wait = 0.0
        if share > DATA_WAIT and not self._starved:
            now = f"{self._workers} of {os.cpu_count()} cores" if self._workers else "0: threads"
            say(
                f"{self._phase}: spent {share:.0%} of the time up to step {step} waiting for data; "
                f"raise data.workers (now {now}) or choose a cheaper data.augmentation"
            )
        self._starved = share > DATA_WAIT

    def resume(self, step: int) -> None:
        """Exclude the time since the last `show` (an evaluation, a save) from the speed."""
        self._last, self._waited = (step, time.perf_counter()), 0.0

    def __enter__(self) -> "Progress":
        shown = panel.opened(_TITLE, here=self._seen, keep=True)
        self._meter = self._shows.enter_context(shown)
        if self._seen:
            self._move(self._done, time.perf_counter())
        state = lambda: "at work" if self._seen else f"{self._phase}: {self._done} steps taken"  # noqa: E731
        since = "since the last one" if self._seen else "since the last line"
        here = patience.lasting(state, since=since, here=self._main)
        self._wait = self._shows.enter_context(here)
        return self

    def __exit__(self, *unused: object) -> None:
        self._shows.close()
        self._watcher.shutdown(wait=False)
        if jax.default_backend() != "cpu":
            self._say_costs(self._costs())


def peak_memory() -> int:
    """Return the peak bytes in use on a device of this host so far; 0: unknown to the backend."""
    return max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices())


def _radii(means: dict[str, float]) -> str:
    """Return the current radius, or radii, while they grow; "" if none does."""
    if "epsilon" in means:
        return f"epsilon {255 * means['epsilon']:.3g}/255"
    radii = {k: v for k, v in means.items() if k.startswith("epsilon_")}
    return " ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in radii.items())
