"""Progress of an evaluation: images decided, an upper bound on robust accuracy, time left."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax

from jaxrobust.runtime.text import panel, patience, terminal
from jaxrobust.runtime.text.panel import PanelRow
from jaxrobust.runtime.text.progress import LinePart, clock, columns, joined, say, watched

T = TypeVar("T")

_SHORT = 5.0  # seconds: a shorter first call is mostly overhead
_SLOW = "seconds to minutes"  # to compile
_INTERVAL = 8.0  # seconds between two lines in a log


class Counts(NamedTuple):
    """An attack's counts so far in this process."""

    undecided: int
    passes: int = 0  # made on all images
    survived: int = 0
    fooled: int = 0
    of_fooled: int = 0  # passes made on the fooled images
    of_survived: int = 0

    def passes_left(
        self, *, slots: int, most: int, later: float, standing: int
    ) -> tuple[float, float]:
        """Estimate the passes left of this attack and of the attacks after it.

        The estimate starts at the upper bound, and falls as images are fooled. An image under
        attack counts as a survivor in proportion to its passes, fully at twice what a fooled image
        takes. Otherwise the quick ones would make all look fooled. `slots` images are attacked at a
        time; a survivor takes `most` passes of this attack, and `later` of those after it.
        """
        under_way = self.passes - self.of_fooled - self.of_survived
        cheap = min(self.of_fooled / max(self.fooled, 1), most)
        endured = min(under_way / max(2 * cheap, 1), slots, self.undecided)
        share = self.fooled / max(self.fooled + self.survived + endured, 1)
        per_image = (1 - share) * most + share * cheap
        others = self.undecided - endured
        attack = max(endured * most + others * per_image - under_way, 0)
        return attack, (standing - share * others) * later


class Decisions:
    """Shows images decided, an upper bound on robust accuracy, and time left."""

    def __init__(
        self,
        images: int,
        *,
        interval: Callable[[int, int], tuple[float, float]],
        enabled: bool,
        attacks: Sequence[str] = (),
    ) -> None:
        """Show nothing yet; `attacks` are planned in this order; `interval(k, n)` is of a share."""
        self._images, self._attacks, self._interval = images, attacks, interval
        self._enabled = enabled and jax.process_index() == 0
        self._in_terminal = self._enabled and watched()
        self._shown, self._text = 0.0, ""
        self._begun: set[str] = set()  # attacks; each begins again with every lot of images
        self._aside = 0  # images that survive and are not attacked any more
        self._meter = panel.Meter()
        self._shows = contextlib.ExitStack()

    def widen(self, images: int, aside: int) -> None:
        """Continue with `images` in total, of which `aside` have survived all attacks."""
        self._images, self._aside = images, aside

    def begin(
        self,
        attack: str,
        images: int,
        decided: int,
        standing: int,
        slots: int,
        compiling: str = _SLOW,
    ) -> None:
        """Begin an attack on `images`, of which `decided` are in the ledger and `standing` hold."""
        self._attack, self._of, self._standing, self._slots = attack, images, standing, slots
        self._counts, self._compiling = Counts(images - decided), compiling
        self._passes, self._seconds, self._calls = 0, 0.0, 0
        again = attack in self._begun
        self._begun.add(attack)
        if decided and not again:
            self._say(f"{attack}: {decided} of {images} images are in the ledger")
        if decided == images or again:
            return  # no compilation
        if self._in_terminal:
            self._show([self._robust()], 0, 1)
            self._meter.waits(f"compiling ({compiling})")
        else:
            self._say(f"{attack}: compiling ({compiling})")

    def awaited(self, calls: Iterator[T]) -> Iterator[T]:
        """Yield calls of the attack's program; show progress while one takes long."""
        while True:
            activity = "attacking" if self._calls else "compiling"
            text = (
                activity if self._in_terminal else f"{self._attack}: {activity}"
            )  # its bar has the name
            last = "" if self._calls else self._compiling
            with patience.lasting(text, last=last, here=self._enabled):
                call = next(calls, None)
            if call is None:
                return
            yield call

    def decided(self, standing: int, passes: int, *, fooled: bool) -> None:
        """Count one more image as decided after `passes`; `standing` are not fooled yet."""
        c, self._standing = self._counts, standing
        c = c._replace(undecided=c.undecided - 1)
        if fooled:
            self._counts = c._replace(fooled=c.fooled + 1, of_fooled=c.of_fooled + passes)
        else:
            self._counts = c._replace(survived=c.survived + 1, of_survived=c.of_survived + passes)

    def advance(self, passes: int, seconds: float, compiles: bool, most: int, later: int) -> None:
        """Show progress after `passes` more forward and backward passes in `seconds`."""
        if compiles:
            self._say(f"{self._attack}: compiled in {seconds:.1f} s")
            return
        self._calls += 1
        self._counts = self._counts._replace(passes=self._counts.passes + passes)
        if self._calls == 2:  # the first call is short and says little about the pace
            self._passes, self._seconds = 0, 0.0
        self._passes, self._seconds = self._passes + passes, self._seconds + seconds
        if self._calls == 1 and seconds < _SHORT:
            return
        here, after = self._counts.passes_left(
            slots=self._slots, most=most, later=later, standing=self._standing - self._aside
        )
        done, total = self._counts.passes, self._counts.passes + math.ceil(here)
        # Until an image is fooled, only a bound is known; for the later attacks it may be a hundred
        # times too long.
        bound = "" if self._counts.fooled else "at most "
        time_left = (here if bound else here + after) * self._seconds / max(self._passes, 1)
        of_this = f" for {self._attack}" if bound and after else ""
        decided, robust = self._of - self._counts.undecided, self._robust()
        if self._in_terminal:
            rows = [
                PanelRow("passes", [LinePart(f"{done:,} of {bound}{total:,}")]),
                PanelRow("decided", [LinePart(f"{decided:,} of {self._of:,} images")]),
                robust,
                PanelRow("left", [LinePart(f"{bound}{clock(time_left)}{of_this}")]),
            ]
            self._show(rows, done, total)
        elif self._enabled and time.perf_counter() - self._shown > _INTERVAL:
            parts = [
                LinePart(f"ETA {bound}{clock(time_left)},"),
                LinePart(f"{done:,} of {bound}{total:,} passes,", 2),
                LinePart(f"{decided}/{self._of} decided,", 1),
                LinePart(f"robust {robust.parts[0].text}", 3),
                robust.parts[1]._replace(rank=4),
            ]
            text = joined(self._attack, parts, columns())
            if text != self._text:
                self._shown, self._text = time.perf_counter(), text
                with terminal.turn():
                    print(text, file=sys.stderr, flush=True)

    def _robust(self) -> PanelRow:
        """Bound the robust accuracy by the share that survives, with its interval."""
        low, high = self._interval(self._standing, self._images)
        share = self._standing / max(self._images, 1)
        return PanelRow(
            "robust", [LinePart(f"at most {share:.1%}"), LinePart(f"({low:.1%} to {high:.1%})", 1)]
        )

    def _show(self, rows: list[PanelRow], done: int, total: int) -> None:
        planned = PanelRow("attacks", panel.stages(self._attacks, self._attack))
        self._meter.show([planned, *rows], done, total)

    def _say(self, message: str) -> None:
        if self._enabled:
            say(message)

    def __enter__(self) -> "Decisions":
        self._meter = self._shows.enter_context(panel.opened("AutoAttack", here=self._in_terminal))
        return self

    def __exit__(self, *unused: object) -> None:
        self._shows.close()
