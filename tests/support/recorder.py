"""A tracker that remembers what it is told."""

from typing import Any

DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="4" height="3"><circle r="1"/></svg>'


class Recorder:
    """`opened` stands in a row of `trackers.KINDS`; fails from the step `broken` on."""

    def __init__(self, broken: float = float("inf")) -> None:
        self.about: list[Any] = []
        self.begun: list[tuple[str, int, int]] = []
        self.seen: list[dict[str, int]] = []
        self.scalars_of: list[dict[str, Any]] = []
        self.images: list[tuple[str, int, str]] = []
        self.pictures: list[bytes] = []
        self.closed: list[bool] = []
        self.broken = broken

    def opened(self, workdir, about):
        self.about.append(about)
        return self

    def begin(self, phase, start, before, seen):
        self.begun.append((phase, start, before))
        self.seen.append(dict(seen))

    def scalars(self, step, values):
        if step >= self.broken:
            raise OSError("the network is gone")
        self.scalars_of.append({"phase": self.begun[-1][0], "step": step} | values)

    def image(self, step, name, picture):
        self.images.append((self.begun[-1][0], step, name))
        self.pictures.append(picture)

    def close(self, *, ended):
        self.closed.append(ended)
