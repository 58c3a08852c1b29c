"""Which slot does which job, and what is known of each image: the host's half of the engine."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """What the host hands to the slots."""

    fresh: np.ndarray  # bool[S], begins the job that the rest describes
    keep: np.ndarray  # bool[S], goes on with its job
    images: np.ndarray  # f32[S,H,W,C]
    labels: np.ndarray  # i32[S]
    targets: np.ndarray  # i32[S]
    restarts: np.ndarray  # i32[S]
    ids: np.ndarray  # u32[S]


class Verdict(NamedTuple):
    """What an attack made of one image."""

    image: int
    fooled: bool
    target: int  # what the job that succeeded, or the last one, aimed at
    restart: int
    steps: int  # of all jobs up to that one
    flat: bool  # the very first gradient was zero everywhere
    adversarial: np.ndarray | None  # f32[H,W,C]


class Board:
    """The jobs of one attack: each image with each of its targets, each target with each restart.

    They are handed out target by target, as the reference orders them, so a later job of an image
    may begin before an earlier one has ended. A verdict waits for all earlier ones, hence does not
    depend on the number of slots; later jobs of a fooled image are dropped.
    """

    def __init__(
        self, slots: int, devices: int, which: np.ndarray, targets: np.ndarray, restarts: int
    ):
        """Jobs for the images `which` i[n], with targets i32[n, T]; both numbered from 0 here."""
        images, kinds = targets.shape
        self._which = which
        self._devices, self._width = devices, slots // devices
        self._targets = targets
        self._jobs = [(t, r) for t in range(kinds) for r in range(restarts)]
        self._queue = deque((i, j) for j in range(len(self._jobs)) for i in range(images))
        self._order = np.arange(slots).reshape(devices, -1).T.ravel()  # devices take turns
        self._busy: dict[int, tuple[int, int]] = {}  # slot -> image, job
        self._fresh: list[int] = []
        self._dropped = False
        self._ended = np.zeros((images, len(self._jobs)), bool)
        self._steps = np.zeros((images, len(self._jobs)), int)
        self._flat = np.zeros(images, bool)
        self._won = np.full(images, len(self._jobs))  # the first job known to succeed
        self._adversarial: dict[int, np.ndarray] = {}
        self._touched: list[int] = []

    def assign(self) -> bool:
        """Gives jobs to free slots; whether any slot has one."""
        self._fresh = []
        for slot in self._order.tolist():
            if slot not in self._busy and (job := self._next()) is not None:
                self._busy[slot] = job
                self._fresh.append(slot)
        return bool(self._busy)

    def _next(self) -> tuple[int, int] | None:
        while self._queue:
            image, job = self._queue.popleft()
            if job < self._won[image]:
                return image, job
        return None

    def rows(self, images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> Rows | None:
        """What the slots must be told, None if nothing changed."""
        if not self._fresh and not self._dropped:
            return None
        count = self._devices * self._width
        rows = Rows(
            fresh=np.zeros(count, bool),
            keep=np.isin(np.arange(count), list(self._busy)),
            images=np.zeros((count, *images.shape[1:]), np.float32),
            labels=np.zeros(count, np.int32),
            targets=np.zeros(count, np.int32),
            restarts=np.zeros(count, np.int32),
            ids=np.zeros(count, np.uint32),
        )
        for slot in self._fresh:
            image, job = self._busy[slot]
            target, restart = self._jobs[job]
            i = self._which[image]
            values = (True, True, images[i], labels[i], self._targets[image, target])
            for array, value in zip(rows, (*values, restart, ids[i]), strict=True):
                array[slot] = value
        return rows

    def floor(self) -> np.ndarray:
        """i32[D]: with how many live slots left a device should come back for work."""
        load = np.bincount([s // self._width for s in self._busy], minlength=self._devices)
        wait = max(self._width // 4, 1) if self._queue else self._width
        return np.maximum(load - wait, 0).astype(np.int32)

    def collect(
        self,
        live: np.ndarray,
        fooled: np.ndarray,
        steps: np.ndarray,
        flat: np.ndarray,
        adversarial: Callable[[], np.ndarray],
    ) -> int:
        """Takes note of what the slots hold; returns how many steps were made for some job."""
        useful, self._dropped = 0, False
        points = adversarial() if any(fooled[s] and not live[s] for s in self._busy) else None
        for slot, (image, job) in list(self._busy.items()):
            useful += int(steps[slot] - self._steps[image, job])
            self._steps[image, job] = steps[slot]
            self._flat[image] |= flat[slot] and job == 0
            if live[slot]:
                continue
            del self._busy[slot]
            self._ended[image, job] = True
            self._touched.append(image)
            if points is not None and fooled[slot] and job < self._won[image]:
                self._won[image], self._adversarial[image] = job, points[slot].copy()
        for slot, (image, job) in list(self._busy.items()):
            if job > self._won[image]:
                del self._busy[slot]
                self._dropped = True
        return useful

    def verdicts(self) -> Iterator[Verdict]:
        """Those that have become known since the last call."""
        touched, self._touched = dict.fromkeys(self._touched), []
        for image in touched:
            won = self._won[image]
            if not self._ended[image, :won].all():
                continue
            last = min(won, len(self._jobs) - 1)
            target, restart = self._jobs[last]
            yield Verdict(
                image=int(self._which[image]),
                fooled=bool(won < len(self._jobs)),
                target=int(self._targets[image, target]),
                restart=restart,
                steps=int(self._steps[image, : last + 1].sum()),
                flat=bool(self._flat[image]),
                adversarial=self._adversarial.pop(image, None),
            )
