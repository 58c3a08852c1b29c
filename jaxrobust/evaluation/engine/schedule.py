"""The host's half of the engine: which slot does which job, and the state of each image."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.types import Threat


class SlotRows(NamedTuple):
    """The host's instructions to the slots."""

    fresh: np.ndarray  # bool[S], begins the job that the other fields describe
    keep: np.ndarray  # bool[S], continues with its job
    images: np.ndarray  # f32[S,H,W,C]
    labels: np.ndarray  # i32[S]
    targets: np.ndarray  # i32[S]
    restarts: np.ndarray  # i32[S]
    ids: np.ndarray  # u32[S]
    first: np.ndarray  # i32[S], the first step whose point may fool the network


class Aims(NamedTuple):
    """The targets of jobs on n images, and the jobs that an earlier evaluation has done."""

    targets: np.ndarray  # i32[n, T], classes, or the code of a loss (T = 1)
    done: np.ndarray | None = None  # bool[n, T, restarts], without success; None: no jobs


class Sample(NamedTuple):
    """The evaluated images: N images of K classes."""

    images: ImageSet
    labels: np.ndarray  # i32[N]
    ids: np.ndarray  # u32[N]
    clean: np.ndarray  # bool[N], classified correctly
    ranks: np.ndarray  # u[N, T], the likeliest wrong classes
    classes: int  # K
    threat: Threat
    seed: int

    def rows(self, places: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Look up images, labels and ids at some places."""
        return self.images[places], self.labels[places], self.ids[places]


class ImageVerdict(NamedTuple):
    """An attack's verdict on one image."""

    image: int
    fooled: bool
    target: int  # of the job that succeeded, or of the last job
    restart: int
    steps: int  # of all jobs up to that one
    job: int  # its number in `Jobs`
    flat: bool  # the very first gradient was zero everywhere
    adversarial: np.ndarray | None  # f32[H,W,C], or two points, see `engine`


class Jobs:
    """The jobs of one attack: each image with each of its targets, each target with each restart.

    Jobs are assigned target by target, in the reference's order, so a later job of an image may
    begin before an earlier one has ended. A verdict waits for all earlier jobs, so it does not
    depend on the number of slots. Later jobs of a fooled image are dropped, unless its verdict is
    refuted.
    """

    def __init__(
        self,
        slots: int,
        devices: int,
        places: np.ndarray,
        aims: Aims,
        restarts: int,
        repeats: bool = True,
    ) -> None:
        """Create the jobs of the images at `places`, i[n] ascending.

        `repeats`: whether a job is repeated after its point is refuted.
        """
        n, kinds = aims.targets.shape
        self._places, self._targets, self._repeats = places, aims.targets, repeats
        self.width = slots // devices  # slots of each device
        self._devices = devices
        self._jobs = [(t, r) for t in range(kinds) for r in range(restarts)]
        self._next_new = 0  # the first job not begun, in their order, target by target
        self._again: deque[tuple[int, int]] = deque()  # take precedence over new jobs
        self._busy: dict[int, tuple[int, int]] = {}  # slot -> image, job
        self._fresh: list[int] = []
        self._dropped = False
        self._ended = np.zeros((n, len(self._jobs)), bool)
        if aims.done is not None:
            self._ended |= aims.done.reshape(self._ended.shape)
        self._steps = np.zeros((n, len(self._jobs)), np.int32)
        self._flat = np.zeros(n, bool)
        self._won = np.full(n, len(self._jobs), np.int32)  # the first job that succeeded
        self._fooling: dict[int, dict[int, np.ndarray]] = {}  # image -> job -> adversarial point
        self._first: dict[tuple[int, int], int] = {}  # `SlotRows.first` of refuted jobs
        self._refuted: dict[tuple[int, int], int] = {}  # number of refutations
        self._touched: list[int] = []

    def _order(self) -> list[int]:
        """List the slots in the order in which they get jobs: devices take turns."""
        slots = np.arange(self._devices * self.width)
        return slots.reshape(self._devices, self.width).T.ravel().tolist()

    def assign(self) -> bool:
        """Give jobs to free slots; tell whether any slot has one."""
        self._fresh = []
        for slot in self._order():
            if slot not in self._busy and (job := self._next()) is not None:
                self._busy[slot] = job
                self._steps[job] = 0  # it may have been dropped, or refuted, before
                self._fresh.append(slot)
        return bool(self._busy)

    def _next(self) -> tuple[int, int] | None:
        while self._again:
            image, job = self._again.popleft()
            if job < self._won[image]:
                return image, job
        while self._next_new < self._ended.size:
            job, image = divmod(self._next_new, len(self._ended))
            self._next_new += 1
            if job < self._won[image] and not self._ended[image, job]:
                return image, job
        return None

    def rows(self, sample: Sample) -> SlotRows | None:
        """Make the rows for slots that change jobs; None if nothing changed."""
        if not self._fresh and not self._dropped:
            return None
        count = self._devices * self.width
        rows = SlotRows(
            fresh=np.zeros(count, bool),
            keep=np.isin(np.arange(count), list(self._busy)),
            images=np.zeros((count, *sample.images.shape[1:]), np.float32),
            labels=np.zeros(count, np.int32),
            targets=np.zeros(count, np.int32),
            restarts=np.zeros(count, np.int32),
            ids=np.zeros(count, np.uint32),
            first=np.zeros(count, np.int32),
        )
        places = [self._places[self._busy[slot][0]] for slot in self._fresh]
        read = sample.images[np.array(places)] if places else ()
        for slot, place, image_pixels in zip(self._fresh, places, read, strict=True):
            image, job = self._busy[slot]
            target, restart = self._jobs[job]
            target_of = (self._targets[image, target], restart)
            aim = (sample.labels[place], *target_of, sample.ids[place])
            values = (True, True, image_pixels, *aim, self._first.get((image, job), 0))
            for array, value in zip(rows, values, strict=True):
                array[slot] = value
        return rows

    def needed(self) -> int:
        """Compute how many slots per device suffice for the remaining jobs.

        The result is a power of two or three quarters of one, as each width needs a program.
        """
        if self._has_more() or not self._busy:
            return self.width
        per_device = -(-len(self._busy) // self._devices)
        power = 1 << (per_device - 1).bit_length()
        return min(self.width, power if per_device > 3 * power // 4 else 3 * power // 4)

    def narrow(self) -> np.ndarray:
        """Continue with `needed` slots; return i[S], the previous place of each, or -1."""
        self.width = self.needed()
        old_slots = dict(zip(self._order(), self._busy, strict=False))
        self._busy = {slot: self._busy[old] for slot, old in old_slots.items()}
        return np.array([old_slots.get(s, -1) for s in range(self._devices * self.width)])

    def _has_more(self) -> bool:
        return bool(self._again) or self._next_new < self._ended.size

    def floor(self) -> np.ndarray:
        """Compute the number of live slots at which each device returns to the host, i32[D]."""
        load = np.bincount([s // self.width for s in self._busy], minlength=self._devices)
        wait = max(self.width // 4, 1) if self._has_more() else self.width
        return np.maximum(load - wait, 0).astype(np.int32)

    def collect(
        self,
        live: np.ndarray,
        fooled: np.ndarray,
        steps: np.ndarray,
        flat: np.ndarray,
        points: Callable[[], np.ndarray],
    ) -> int:
        """Record the state of the slots; count the steps taken for some job."""
        useful, self._dropped = 0, False
        fetched = points() if any(fooled[s] and not live[s] for s in self._busy) else None
        for slot, (image, job) in list(self._busy.items()):
            useful += int(steps[slot] - self._steps[image, job])
            self._steps[image, job] = steps[slot]
            self._flat[image] |= flat[slot] and job == 0
            if live[slot]:
                continue
            del self._busy[slot]
            self._ended[image, job] = True
            self._touched.append(image)
            if fetched is not None and fooled[slot]:
                self._fooling.setdefault(image, {})[job] = fetched[slot].copy()
                self._won[image] = min(self._won[image], job)
        for slot, (image, job) in list(self._busy.items()):
            if job > self._won[image]:
                del self._busy[slot]
                self._dropped = True
        return useful

    def verdicts(self) -> Iterator[ImageVerdict]:
        """Yield the verdicts that have become known since the last call."""
        touched, self._touched = dict.fromkeys(self._touched), []
        for image in touched:
            won = self._won[image]
            if not self._ended[image, :won].all():
                continue
            fooled, last = bool(won < len(self._jobs)), min(won, len(self._jobs) - 1)
            target, restart = self._jobs[last]
            yield ImageVerdict(
                image=int(self._places[image]),
                fooled=fooled,
                target=int(self._targets[image, target]),
                restart=restart,
                steps=int(self._steps[image, : last + 1].sum()),
                job=last,
                flat=bool(self._flat[image]),
                adversarial=self._fooling[image].pop(won) if fooled else None,
            )

    def refute(self, verdicts: Iterable[ImageVerdict]) -> None:
        """Revoke verdicts of fooled images: their jobs continue as if nothing had been found.

        The job that found the point is repeated with the same draws, and its points count from the
        next step on. After a second refutation they count from two steps later, then four, so a
        network whose answers depend on the batch costs few repetitions. Other jobs follow as usual.
        For a randomized network only these follow: the job is not repeated.
        """
        for verdict in verdicts:
            image, job = int(np.searchsorted(self._places, verdict.image)), verdict.job
            self._won[image] = min(self._fooling.get(image, ()), default=len(self._jobs))
            if self._repeats:
                refuted = self._refuted.get((image, job), 0)
                self._first[image, job] = int(self._steps[image, job]) - 1 + 2**refuted
                self._refuted[image, job] = refuted + 1
                self._ended[image, job] = False
            else:
                self._touched.append(image)
            busy = set(self._busy.values())
            again = [
                (image, j)
                for j in range(job, max(job + self._repeats, self._won[image]))
                if not self._ended[image, j]
                and (image, j) not in busy
                and (image, j) not in self._again
                and j * len(self._ended) + image < self._next_new  # otherwise still in the queue
            ]
            self._again.extendleft(reversed(again))
