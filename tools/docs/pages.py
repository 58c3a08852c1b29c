"""Pages from elsewhere in the repository, and pages that are generated from the code.

A page of `docs/` includes other content by a one-line block, which a viewer of the repository sees
unchanged:

    ```{include} ../../jaxrobust/attacks/README.md
    ```

    ```{generated} config
    ```

An included page is not copied: its text is read when the site is built, and its links are rewritten
to the site's files. A link to a file that is not a page becomes the file's name.
"""

import posixpath
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```\{(include|generated)\} (\S+)\n```$", re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_IMG = re.compile(r'<img src="([^"]+)"[^>]*?alt="([^"]*)"[^>]*>', re.DOTALL)
_FENCED = re.compile(r"^(```|:::).*?^\1$", re.MULTILINE | re.DOTALL)


@cache
def places() -> dict[str, str]:
    """Map included files, by path in the repository, to their pages in docs/."""
    found = {}
    for page in sorted(DOCS.rglob("*.md")):
        for kind, name in _BLOCK.findall(page.read_text()):
            if kind == "include":
                file = (page.parent / name).resolve()
                found[file.relative_to(ROOT).as_posix()] = page.relative_to(DOCS).as_posix()
    return found


def included() -> list[Path]:
    """List the files that pages include."""
    return [ROOT / name for name in places()]


def expanded(text: str, page: str) -> str:
    """Replace the blocks of a page, named by its path in `docs/`, with their content."""

    def filled(match: re.Match[str]) -> str:
        kind, name = match.groups()
        if kind == "generated":
            from tools.docs import reference  # which imports the package

            return reference.PAGES[name]()
        file = ((DOCS / page).parent / name).resolve()
        where = file.relative_to(ROOT).as_posix()
        if not file.is_file():  # of an optional room
            return f"This installation does not include `{posixpath.dirname(where)}`."
        return turned(file.read_text(), where, page)

    own = turned(text, f"docs/{page}", page)
    return _BLOCK.sub(filled, own)


def turned(text: str, file: str, page: str) -> str:
    """Rewrite the links of a repository file for a page of the site."""
    parts, last = [], 0
    for match in _FENCED.finditer(text):
        parts += [_links(text[last : match.start()], file, page), match[0]]
        last = match.end()
    return "".join([*parts, _links(text[last:], file, page)])


def _links(text: str, file: str, page: str) -> str:
    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        name, hash_, anchor = target.partition("#")
        if "://" in target or not name:
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
        if there.startswith("docs/"):
            where = there.removeprefix("docs/")
        elif there in places():
            where = places()[there]
        elif mark:  # a picture, which Sphinx copies
            where = posixpath.join("..", there)
        else:
            return f"{words} (`{there}`)" if there not in words else words
        return (
            f"{mark}[{words}]({posixpath.relpath(where, posixpath.dirname(page))}{hash_}{anchor})"
        )

    return _LINK.sub(link, _IMG.sub(r"![\2](\1)", text))
