"""Matplotlib for pictures, an optional dependency; the error names the extra to install."""

from typing import Any

SUFFIXES = ("pdf", "svg", "png")  # of figures
# First line of the table next to a figure; other .tex files are the user's.
MARK = "% Written by jaxrobust figure"


def plotting() -> Any:
    """Return matplotlib's pyplot for files; `ValueError` if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "pictures need matplotlib; install the extra: pip install -e '.[plot]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def figure(about: str, width: float, height: float) -> Any:
    """Return a figure with a caption above."""
    figure = plotting().figure(figsize=(width, height), layout="constrained")
    figure.suptitle(about, fontsize=9)
    return figure
