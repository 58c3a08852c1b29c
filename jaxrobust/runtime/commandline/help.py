"""The help of a command: the usual flags, or all of them in groups with `--help-all`."""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

# Flags that several commands share, by topic.
GROUPS = {
    "The network": "workdir phase selected weights model options num_classes function torch "
    "torch_args torch_output",
    "Images": "dataset split classes data_dir image_size preprocessing n",
    "The threat": "norm epsilon",
    "Output": "out json",
    "Several hosts": "multihost coordinator_address coordinator_timeout num_processes process_id",
}
USUAL = frozenset(("--help", "-help", "--helpshort", "-h", "--h", "-?"))
ALL = frozenset(("--help-all", "--help_all", "--helpfull"))
_COLUMNS = 100
_FEW = 11  # up to this many flags and words need no groups
_REPEAT = ";\n    repeat this option to specify a list of values"  # absl's wording


class HelpRow(NamedTuple):
    """A flag or positional argument, as the user types it, and its help."""

    typed: str
    text: str
    default: Any = None

    def lines(self) -> list[str]:
        """Format the row, adding its default if the text does not mention it."""
        is_said = (
            self.default in (None, False, (), "", argparse.SUPPRESS) or "default:" in self.text
        )
        default = "" if is_said else f" (default: {self.default})"
        first, *others = self.text.split("\n")
        first = textwrap.fill(
            f"  {self.typed}  {first}{default}", _COLUMNS, subsequent_indent=" " * 6
        )
        return [*first.split("\n"), *(f"      {line}" for line in others)]


def page(
    doc: str,
    rows: Sequence[HelpRow],
    *,
    usual: str = "",
    groups: Mapping[str, str] = GROUPS,
) -> str:
    """Format a command's description and flags: the usual ones, or all of them in groups."""
    by_name = {row.typed.removeprefix("--"): row for row in rows}
    if usual:
        words = [row for row in rows if not row.typed.startswith("--")]
        parts = {"The usual flags": [*words, *(by_name[name] for name in usual.split())]}
    elif len(rows) <= _FEW:
        parts = {"Flags": [*rows]}
    else:
        by_title = {
            title: [by_name[name] for name in names.split() if name in by_name]
            for title, names in groups.items()
        }
        by_title = {title: group for title, group in by_title.items() if len(group) > 1}
        grouped = [row for group in by_title.values() for row in group]
        parts = {"Flags": [row for row in rows if row not in grouped]} | by_title
    lines = [doc.strip("\n"), ""]
    for title, group in ((title, group) for title, group in parts.items() if group):
        lines += [f"{title}:", *(line for row in group for line in row.lines()), ""]
    return "\n".join([*lines, *["--help-all lists all flags."] * bool(usual)])


def of_absl(names: Sequence[str]) -> list[HelpRow]:
    """Describe flags of absl."""
    rows = []
    for flag in (flags.FLAGS[name] for name in names):
        text = str(flag.help).replace(_REPEAT, " May be repeated.")
        rows.append(HelpRow(f"--{flag.name}", text, flag.default))
    return rows


def of_argparse(parser: argparse.ArgumentParser) -> list[HelpRow]:
    """Describe the positional arguments and flags of a parser, each flag in one spelling."""
    rows, formatter = [], argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        if action.dest == "help":
            continue
        typed = action.option_strings[:1] or [word(action)]
        text = formatter._expand_help(action) if action.help else ""
        choices = [str(choice) for choice in action.choices or ()]
        if not all(choice in text for choice in choices):
            text += f" One of {', '.join(choices)}."
        rows.append(HelpRow(typed[0], text, action.default))
    return rows


def word(action: argparse.Action) -> str:
    """Return a positional argument as a usage line shows it."""
    name = str(action.metavar or action.dest.upper())
    forms = {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} ..."}
    return forms.get(str(action.nargs), name)
