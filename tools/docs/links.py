"""Follows the links of a site that is built: to files and places; it loads nothing from outside."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag


class PageLinks(HTMLParser):
    """What a page links to, what it loads, and the places in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the attributes that say an address or a name."""
        given = dict(attrs)
        self.places |= {given[key] or "" for key in ("id", "name") if key in given}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        loaded = given.get("src") or (given.get("href") if tag == "link" else None)
        if loaded:
            self.loads.append(loaded)


def broken(site: Path) -> list[str]:
    """List links that lead nowhere, and what a page would load from elsewhere, a line for each."""
    pages = {path: PageLinks(path.read_text()) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found += [f"{where} loads {one}" for one in page.loads if _outside(one)]
        for link in dict.fromkeys((*page.links, *page.loads)):
            if _outside(link) or link.startswith(("mailto:", "data:")):
                continue
            name, anchor = urldefrag(link.partition("?")[0] or link)
            target = (path.parent / unquote(name)).resolve() if name else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{where} links to {link}, which is not there")
            elif anchor and target in pages and unquote(anchor) not in pages[target].places:
                found.append(f"{where} links to {link}, and there is no such place")
    return found


def _outside(address: str) -> bool:
    return re.match(r"(https?:)?//", address) is not None
