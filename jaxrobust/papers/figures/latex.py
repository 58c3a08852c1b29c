"""A LaTeX table (booktabs) for a paper, and its words and numbers."""

import math
import re
from collections.abc import Sequence

from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.results.plotting import MARK
from jaxrobust.types import fraction

_SPECIAL = {char: f"\\{char}" for char in "&%$#_{}"}
_SPECIAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"}
NORMS = {"linf": r"\ell_\infty", "l2": r"\ell_2", "l1": r"\ell_1"}  # in formulas


def escaped(text: str) -> str:
    """Escape a text so that LaTeX prints it verbatim, on one line."""
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(char, char) for char in text)


def number(value: int) -> str:
    """Write an integer with separated thousands."""
    return f"{value:,}".replace(",", "{,}")


def percent(value: float) -> str:
    """Write a fraction as a percentage, without the percent sign."""
    return f"{100 * value:.1f}"


def between(ends: Sequence[float]) -> str:
    """Write an interval of fractions as percentages."""
    return f"[{percent(ends[0])}, {percent(ends[1])}]"


def ball(norm: str, epsilon: float) -> str:
    """Write norm and radius as a formula."""
    return rf"${NORMS.get(norm, norm)}$ radius ${fraction(epsilon)}$"


def attack_name(name: str) -> str:
    """Write the name of an attack as papers do: APGD-CE; threats before it stay as they are.

    >>> attack_name("apgd-t")
    'APGD-T'
    """
    *threat, last = name.split(" ") if not name.endswith(" (full)") else [name]
    spellings = {"square": "Square", "autoattack": "AutoAttack", "replay": "replayed points"}
    if re.fullmatch(r"[\d./]+", last):  # a threat of a union: l2 0.5
        return " ".join(_norm(word) for word in (*threat, _radius(last)))
    head = last.removesuffix(" (full)")
    written = spellings.get(head, head.upper()) + last[len(head) :]
    balls = [_norm(word) if at % 2 == 0 else _radius(word) for at, word in enumerate(threat)]
    return " ".join([written, *balls])


def _norm(word: str) -> str:
    return f"${NORMS[word]}$" if word in NORMS else word


def _radius(word: str) -> str:
    try:
        value = float(word)
    except ValueError:
        return word
    # Names have four digits of a radius: 0.03137 is 8/255.
    levels = 255 * value
    near = 0 < round(levels) <= 64 and math.isclose(levels, round(levels), rel_tol=1e-3)
    return f"{round(levels)}/255" if near and value < 0.26 and "." in word else fraction(value)


def attack_words(record: AccuracyRecord) -> str:
    """Name the attack of a record in a caption."""
    if record.is_union:
        of = [escaped_name(name) for name in record.accuracy_after or ()]
        return f"the worst case of {', '.join(of)}"
    if record.fast:
        return f"the {record.method}"
    names, *settings = (record.method or "attacks").split(", ")
    settings = [escaped(word) for word in settings if word != "ladder"]  # the radii show it
    name, _, version = names.partition(" ")
    if name == "autoattack":
        return f"AutoAttack ({', '.join([f'{escaped(version)} version', *settings])})"
    listed = " and ".join(escaped_name(name) for name in names.split(" + "))
    return f"{listed} ({', '.join(settings)})" if settings else listed


def escaped_name(name: str) -> str:
    """Write the name of an attack for LaTeX, formulas as formulas."""
    parts = attack_name(name).split("$")
    return "$".join(part if at % 2 else _escaped(part) for at, part in enumerate(parts))


def threat_words(record: AccuracyRecord) -> str:
    """Name norm and radius of a record in a caption; for a union, all of them."""
    balls = list(dict.fromkeys(ball(threat.norm, threat.epsilon) for threat in record.threats))
    return balls[0] if len(balls) == 1 else f"{', '.join(balls[:-1])} and {balls[-1]}"


def images_words(record: AccuracyRecord, images: int) -> str:
    """Name number and origin of the images in a caption."""
    source, split = escaped(str(record.dataset)), escaped(str(record.split))
    return f"$n={number(images)}$ images of {source} (split {split})"


def table(label: str, caption: str, rows: Sequence[Sequence[str]], comments: Sequence[str]) -> str:
    """Write the table: the first row is the header, the first column contains names.

    Args:
      label: for `\\ref{tab:LABEL}`.
      caption, rows: in LaTeX.
      comments: lines above the table, for readers.
    """
    head, *body = ["    " + " & ".join(row) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    safe = re.sub(r"[^\w.-]+", "-", label)
    return "\n".join(
        [
            f"{MARK}; it needs \\usepackage{{booktabs}}.",
            *(f"% {' '.join(line.split())}" for line in comments),
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            rf"  \label{{tab:{safe}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            f"  {head}".removeprefix("  "),
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )
