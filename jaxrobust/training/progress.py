"""How a phase goes on: loss, accuracy, speed, time left, memory, cost."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from tqdm import tqdm

from jaxrobust.runtime import hardware
from jaxrobust.runtime.progress import clock, say

DATA_WAIT = 0.05  # the share of time without a batch that is worth a word


def _bar(room: int) -> str:
    """Return tqdm's format with a bar of at most `room` characters, none if that is too short."""
    bar = f"{{percentage:3.0f}}% |{{bar:{min(room, 20)}}}| " if room > 2 else ""
    return "{desc} " + bar + "{n_fmt}/{total_fmt}{postfix}"


class Progress:
    """Loss, accuracy, images/s, time left of one phase, how long it waited for data, and its cost.

    `flops_per_image` are those of the model for one image of training, of which model FLOP
    utilisation is a share of the chip's peak; `chip_hours` were used by the phase before.
    """

    def __init__(
        self,
        phase: str,
        step: int,
        total: int,
        batch_size: int,
        workers: int,
        *,
        flops_per_image: float | None = None,
        chip_hours: float = 0.0,
    ) -> None:
        self._chips = jax.device_count()
        self._chip = hardware.chip(jax.devices()[0].device_kind)
        self._flops_per_image, self._chip_hours_before = flops_per_image, chip_hours
        self._started, self._peak_said = time.perf_counter(), 0.0
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
            bar_format=_bar(20),
        )
        self._workers, self._speed, self._starved = workers, 0.0, False
        self._watched, self._watched_wait = 0.0, 0.0
        self._watcher = ThreadPoolExecutor(1, "progress")
        self._last_step: Future[float] | None = None
        self.resume(step)

    def dispatched(self, values: Any) -> None:
        """Take note that a step is on its way to the device; `values` are of its results."""
        self._last_step = self._watcher.submit(_finished, values)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the call for a batch; what counts is the time in which the device has no step."""
        since = time.perf_counter()
        yield
        if self._last_step is None:  # the first batch: workers start
            self.resume(self._last[0])
        elif self._last_step.done():
            self._waited += time.perf_counter() - max(since, self._last_step.result())

    def show(self, step: int, means: dict[str, float]) -> dict[str, float]:
        """Show the state after `step`; return what it cost.

        `images_per_second`, `images_per_second_per_chip`, `mfu` (model FLOP utilisation) and
        `data_wait`, a share of the time, are those since the last call or `resume`; `chip_hours`
        and `peak_memory_bytes` of a device of this host since the start. `mfu` and
        `peak_memory_bytes` are there where they are known.
        """
        before, since = self._last
        seconds = max(time.perf_counter() - since, 1e-9)
        data_wait = self._waited / seconds
        if step > before:
            self._speed = (step - before) * self._batch / seconds
        self.resume(step)
        left = (self._total - step) * self._batch / max(self._speed, 1e-9)
        accuracies = " ".join(f"{k} {means[k]:.1%}" for k in ("clean", "robust") if k in means)
        self._watch(step, seconds, data_wait * seconds)
        costs = self._costs()
        per_chip, mfu = costs["images_per_second_per_chip"], costs.get("mfu")
        text = (
            f"loss {means['loss']:.4f} {accuracies} {per_chip:,.0f} images/s"
            + ("/chip " if self._chips > 1 else " ")
            + (f"MFU {mfu:.1%} " if mfu is not None else "")
            + (f"{data_wait:.0%} waiting for data " if self._starved else "")
            + f"ETA {clock(left) if self._speed else 'unknown'}"
        )
        if self._terminal:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            others = len(f"{self._phase} 100% || {step}/{self._total}, {text}")
            self._bar.bar_format = _bar(columns - others - 1)
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._main:
            print(f"{self._phase} {step}/{self._total} {text}", file=sys.stderr, flush=True)
        if costs.get("peak_memory_bytes", 0) > 1.01 * self._peak_said:
            self._say_costs(costs)
        return {"images_per_second": self._speed, "data_wait": data_wait} | costs

    def chip_hours(self) -> float:
        """Return devices times hours of the phase so far, those before this run included."""
        hours = (time.perf_counter() - self._started) / 3600
        return self._chip_hours_before + self._chips * hours

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
        memory = f"at most {self._peak_said / 2**30:.1f}{of} GiB in use on a device, "
        say(
            f"{self._phase}: {memory if self._peak_said else ''}{costs['chip_hours']:.1f} "
            f"chip-hours so far on {self._chips} device{'s' if self._chips > 1 else ''}"
        )

    def _watch(self, step: int, seconds: float, waited: float) -> None:
        """Say when data becomes the bottleneck, from windows of at least a second."""
        self._watched, self._watched_wait = self._watched + seconds, self._watched_wait + waited
        if self._watched < 1:
            return
        share = self._watched_wait / self._watched
        self._watched = self._watched_wait = 0.0
        if share > DATA_WAIT and not self._starved:
            now = f"{self._workers} of {os.cpu_count()} cores" if self._workers else "0: threads"
            say(
                f"{self._phase}: waited for data {share:.0%} of the time up to step {step}; raise "
                f"data.workers (now {now}) or choose a cheaper data.augmentation"
            )
        self._starved = share > DATA_WAIT

    def resume(self, step: int) -> None:
        """Leave the time since the last `show` (an evaluation, a save) out of the speed."""
        self._last, self._waited = (step, time.perf_counter()), 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()
        self._watcher.shutdown(wait=False)
        if jax.default_backend() != "cpu":
            self._say_costs(self._costs())


def peak_memory() -> int:
    """Return the most bytes that a device of this host has had in use; 0 where the backend tells
    none.
    """
    return max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices())


def _finished(values: Any) -> float:
    """Return when the device had computed these values."""
    jax.block_until_ready(values)
    return time.perf_counter()
