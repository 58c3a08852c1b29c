"""A live panel on a terminal: rows of figures, a bar, and what the program is waiting for.

It is rich's `Live`, redrawn after a change by the thread that holds `terminal.TURN`; no thread of
rich writes. Notebooks get a one-line tqdm bar instead, pipes nothing.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxrobust.runtime.text import patience, terminal
from jaxrobust.runtime.text.progress import (
    NOTEBOOK,
    LinePart,
    columns,
    fitted,
    joined,
    tqdm,
    watched,
)

_EVERY_S = 0.1  # seconds between two redraws, unless urgent
_FRAMED = 60  # columns below which a frame is not worth its space
_FRAME = 4  # columns that a frame takes
_WIDEST = 100  # maximum columns of a panel
_live: list["Meter"] = []  # the meters that are shown; the last one also shows what is waited for
_opened: dict[str, "Meter"] = {}  # by title


class PanelRow(NamedTuple):
    """A row: its label and its parts; parts with the highest rank are dropped first."""

    label: str
    parts: Sequence[LinePart]


def stages(names: Sequence[str], now: str) -> list[LinePart]:
    """List the finished, running and remaining stages; the last and the first are dropped first."""
    if now not in names:
        return [LinePart(now)]
    at = list(names).index(now)
    done = [LinePart(f"{name} done,", len(names) + at - i) for i, name in enumerate(names[:at])]
    after = [LinePart(f"{name},", 1 + i) for i, name in enumerate(names[at + 1 :])]
    return [*done, LinePart(f"{now} now,"), *after]


class Meter:
    """A progress display that shows nothing; in a pipe, callers print lines instead."""

    def show(self, rows: Sequence[PanelRow], done: float, total: float) -> None:
        """Show rows and the progress out of the total; empty rows are left out."""

    def waits(self, text: str) -> None:
        """Show what the program is waiting for, until the next `show`; redraws at once."""

    def close(self) -> None:
        """Draw for the last time."""


class NotebookBar(Meter):
    """A one-line tqdm bar in a notebook."""

    def __init__(self, title: str, *, keep: bool) -> None:
        self._title = title
        self._rows: tuple[PanelRow, ...] = ()
        self._bar = tqdm(total=1, dynamic_ncols=True, leave=keep, miniters=1)

    def show(self, rows: Sequence[PanelRow], done: float, total: float) -> None:
        """Move the bar and show the rows after it."""
        self._rows, self._bar.total = tuple(rows), max(total, 1)
        self._format("")
        self._bar.update(done - self._bar.n)

    def waits(self, text: str) -> None:
        """Show the text before the rows."""
        self._format(text)
        self._bar.refresh()

    def _format(self, text: str) -> None:
        parts = [LinePart(text), *(part for row in self._rows for part in row.parts)]
        self._bar.bar_format = fitted(self._title, parts, columns())

    def close(self) -> None:
        """Close tqdm's bar."""
        self._bar.close()


class LivePanel(Meter):
    """Lines on a terminal that are redrawn in place; other output appears above them."""

    def __init__(self, title: str, *, keep: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        self._title, self._waits = title, ""
        self._rows: tuple[PanelRow, ...] = ()
        self._done, self._total, self._drawn = 0.0, 1.0, 0.0
        always: Any = {"force_terminal": True, "force_interactive": True, "highlight": False}
        self._console = Console(file=sys.stderr, width=columns() - 1, **always)
        self._live = Live(console=self._console, auto_refresh=False, transient=not keep)
        with terminal.turn():
            self._live.start()
            self._console.show_cursor(True)  # a killed process cannot restore it
            _live.append(self)

    def show(self, rows: Sequence[PanelRow], done: float, total: float) -> None:
        """Update the content; it is redrawn at most ten times a second."""
        self._rows, self._done, self._total, self._waits = tuple(rows), done, total, ""
        if time.monotonic() - self._drawn >= _EVERY_S:
            self._draw()

    def waits(self, text: str) -> None:
        """Draw a row with what the program is waiting for."""
        self._waits = text
        self._draw()

    def close(self) -> None:
        """Draw the final state, or remove the lines if it is not kept."""
        if self not in _live:
            return
        self._waits = ""
        self._draw()
        with terminal.turn():
            _live.remove(self)
            self._live.stop()

    def _draw(self) -> None:
        with terminal.turn():
            self._drawn = time.monotonic()
            self._console.width = columns() - 1  # filling the last column may wrap the line
            self._live.update(self._drawing(self._console.width), refresh=True)

    def _drawing(self, wide: int) -> Any:
        from rich import box
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        framed = wide >= _FRAMED
        inside = wide - _FRAME * framed
        rows = [*self._rows, PanelRow("now", [LinePart(self._waits)])]
        rows = [row for row in rows if any(part.text for part in row.parts)]
        labels = max((len(row.label) for row in rows), default=0)
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(style="cyan", no_wrap=True, width=labels)
        table.add_column(no_wrap=True)
        for row in rows:
            text = Text(joined("", row.parts, inside - labels - 1).removesuffix(","))
            text.truncate(max(inside - labels - 1, 1), overflow="ellipsis")
            table.add_row(row.label, text)
        share = min(self._done / max(self._total, 1e-9), 1.0)
        bar = Table.grid(padding=(0, 1, 0, 0))
        bar.add_row(Text(f"{share:4.0%}"), ProgressBar(1.0, share, width=min(inside - 6, 60)))
        if not framed:
            return Group(
                Text(self._title, style="bold", no_wrap=True, overflow="ellipsis"), bar, table
            )
        return Panel(
            Group(bar, table),
            box.ROUNDED,
            title=Text(self._title, style="bold"),
            title_align="left",
            width=min(wide, _WIDEST),
        )


@contextlib.contextmanager
def opened(title: str, *, here: bool = True, keep: bool = False) -> Iterator[Meter]:
    """Open a panel on a terminal, if `here`; an already open one continues.

    A panel with the same title is yielded again and closed by whoever opened it first; for another
    title nothing is shown. With `keep`, the last state stays on the terminal. Inside, the panel
    also shows what the program is waiting for.
    """
    if not (here and watched()) or (_live and title not in _opened):
        yield Meter()
        return
    if title in _opened:
        yield _opened[title]
        return
    meter = NotebookBar(title, keep=keep) if NOTEBOOK else LivePanel(title, keep=keep)
    _opened[title] = meter
    try:
        with patience.shown_by(meter.waits):
            yield meter
    finally:
        del _opened[title]
        meter.close()


def waits(text: str) -> None:
    """Show what the program is waiting for in the panel that has the terminal."""
    _live[-1].waits(text)


def is_live() -> bool:
    """Return whether a panel has the terminal, so that nothing else may draw a bar."""
    return bool(_live)
