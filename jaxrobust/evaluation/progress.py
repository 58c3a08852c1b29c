"""How an evaluation goes on: images decided, robust accuracy at most, time left."""

import sys
import time
from collections.abc import Callable

import jax
from tqdm.auto import tqdm

from jaxrobust.runtime.progress import Part, clock, columns, fitted, say, watched


class Decisions:
    """Images decided, an upper bound of the robust accuracy, and time left of an evaluation."""

    def __init__(
        self, images: int, *, interval: Callable[[int, int], tuple[float, float]], enabled: bool
    ) -> None:
        self._interval = interval  # of a share, from how many of how many
        self._enabled = enabled and jax.process_index() == 0
        self._seen = self._enabled and watched()
        self._images = images
        self._told: tuple[str, int, int] | None = None  # what the last line in a pipe was of
        self._passes, self._seconds, self._estimated, self._said = 0, 0.0, False, 0.0
        self._bar = tqdm(
            total=1, disable=not self._seen, dynamic_ncols=True, leave=False, miniters=1
        )

    def begin(self, attack: str, images: int, known: int, standing: int) -> None:
        """Begin an attack on `images`, of which `known` are decided; `standing` are not fooled
        yet.
        """
        self._attack, self._of, self._decided, self._standing = attack, images, known, standing
        if known:
            self._say(f"{attack}: {known} of {images} images are in the ledger")
        self._made = 0
        if known == images:  # nothing is left to compile for
            return
        if self._seen:
            self._show([Part("compiling (minutes for a large network)")], 1)
            self._bar.refresh()
        else:
            self._say(f"{attack}: compiling (minutes for a large network)")

    def decided(self, standing: int) -> None:
        """Count one image more as decided; `standing` are not fooled yet."""
        self._decided, self._standing = self._decided + 1, standing

    def advance(self, passes: int, seconds: float, compiles: bool, most: int, later: int) -> None:
        """Show how it goes after `passes` forward and backward passes of images in `seconds`.

        `most` are needed for an image that is not fooled by this attack, `later` by the others.
        """
        if compiles:
            if seconds > 1:
                self._say(f"{self._attack}: compiled in {seconds:.1f} s")
            return
        self._passes, self._seconds = self._passes + passes, self._seconds + seconds
        self._made += passes
        left = (self._of - self._decided) * most + self._standing * later
        time_left = left * self._seconds / max(self._passes, 1)
        if not self._estimated:
            self._estimated = True
            self._say(f"at most {left:,} passes of an image, {clock(time_left)}, if none is fooled")
        low, high = self._interval(self._standing, self._images)
        parts = [  # the time is a bound too: an image that is fooled leaves the rest out
            Part(f"at most {clock(time_left)} left,"),
            Part(f"{self._decided}/{self._of} images decided,", 1),
            Part(f"robust at most {self._standing / max(self._images, 1):.1%}", 2),
            Part(f"({low:.1%} to {high:.1%})", 3),
        ]
        if self._seen:
            self._show(parts, self._made + (self._of - self._decided) * most)
        elif self._changed(10):
            text = " ".join([self._attack, *(part.text for part in parts)])
            if len(text) > columns():  # without the interval
                text = " ".join([self._attack, *(part.text for part in parts[:-1])])
            print(text, file=sys.stderr, flush=True)

    def _changed(self, seconds: float) -> bool:
        """Tell whether a line is due: some time after the last one, once an image is decided."""
        told = (self._attack, self._decided, self._standing)
        if not self._enabled or told == self._told or time.perf_counter() - self._said <= seconds:
            return False
        self._said, self._told = time.perf_counter(), told
        return True

    def _show(self, parts: list[Part], total: int) -> None:
        """Move the bar to the passes made of those that this attack needs at most."""
        self._bar.total = max(total, 1)
        self._bar.bar_format = fitted(self._attack, parts, columns())
        self._bar.update(self._made - self._bar.n)

    def _say(self, message: str) -> None:
        if self._enabled:
            say(message)

    def __enter__(self) -> "Decisions":
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()
