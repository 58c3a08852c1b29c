"""How a page looks and answers: its style sheet and its script, neither of which loads anything."""

from pathlib import Path

STYLE, SCRIPT = (
    f"\n{Path(__file__).with_suffix(ending).read_text()}" for ending in (".css", ".js")
)
