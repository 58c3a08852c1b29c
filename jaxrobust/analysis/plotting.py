"""Matplotlib, where pictures are drawn: an extra, which is asked for in one sentence."""

from typing import Any


def plotting() -> Any:
    """Return matplotlib's pyplot for files; `ValueError`: it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "pictures need matplotlib; install the extra: pip install -e '.[plot]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
