"""Docstrings as MyST: sections become lists, examples become code, the rest stays text."""

import re
from collections.abc import Iterator

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
_SECTION = re.compile(rf"({'|'.join(SECTIONS)}):$")
_ENTRY = re.compile(r"(\*{0,2}[\w.,* ()/\[\]]+?):\s(.*)")
_CODE = re.compile(r"(`+[^`]*`+)")
_SPECIAL = re.compile(r"([\\*_\[\]<>$|{}#~^])")


def myst(docstring: str) -> str:
    """Convert a dedented docstring to MyST."""
    return "\n\n".join(filter(None, map(_block, _blocks(docstring.strip("\n")))))


def escaped(text: str) -> str:
    """Escape Markdown's special characters, except between backticks."""
    parts = _CODE.split(text)
    return "".join(p if i % 2 else _SPECIAL.sub(r"\\\1", p) for i, p in enumerate(parts))


def cell(text: str) -> str:
    """Format a text for a table cell, on one line."""
    line = " ".join(escaped(text).split())
    return re.sub(r"(?<!\\)\|", r"\\|", line)  # inside backticks too


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield paragraphs, examples and sections, which end at the next unindented line."""
    block: list[str] = []
    for line in text.splitlines():
        inside = bool(block and _SECTION.match(block[0]))
        if inside and (not line.strip() or line.startswith(" ")):
            block.append(line)
            continue
        ends = inside or not line.strip() or _SECTION.match(line) is not None
        ends = ends or (line.startswith(">>>") and not _doctest(block))
        if ends and block:
            yield block
            block = []
        if line.strip():
            block.append(line)
    if block:
        yield block


def _doctest(block: list[str]) -> bool:
    return bool(block) and block[0].lstrip().startswith(">>>")


def _block(block: list[str]) -> str:
    if match := _SECTION.match(block[0]):
        text = "\n".join(line.strip() for line in block[1:])
        listed = match[1] not in ("Returns", "Yields")
        return f"**{match[1]}**\n\n" + (_entries(block[1:]) if listed else escaped(text))
    if _doctest(block):
        return "```pycon\n" + "\n".join(block) + "\n```"
    if all(line.startswith("    ") for line in block):
        return "```text\n" + "\n".join(line[4:] for line in block) + "\n```"
    if all(line.lstrip().startswith("- ") or line.startswith("  ") for line in block):
        return "\n".join(re.sub(r"^- ", "- ", escaped(line)) for line in block)
    return escaped("\n".join(block))


def _entries(lines: list[str]) -> str:
    """Convert `name: text` lines, with indented continuations, to a list."""
    lines = [line for line in lines if line.strip()]
    if not lines:
        return ""
    least = min(len(line) - len(line.lstrip()) for line in lines)
    items: list[str] = []
    for line in lines:
        text = line[least:]
        if text.startswith(" ") and items:
            items[-1] += " " + text.strip()
        else:
            items.append(text.strip())
    return "\n".join(f"- {_entry(item)}" for item in items)


def _entry(item: str) -> str:
    match = _ENTRY.fullmatch(item)
    return f"`{match[1]}`: {escaped(match[2])}" if match else escaped(item)
