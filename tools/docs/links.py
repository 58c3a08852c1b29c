"""Checks the links of a built site, to files and anchors, without loading anything external."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag


class PageLinks(HTMLParser):
    """The links, resources and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record attributes with addresses or names."""
        given = dict(attrs)
        self.places |= {given[key] or "" for key in ("id", "name") if key in given}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        loaded = given.get("src") or (given.get("href") if tag == "link" else None)
        if loaded:
            self.loads.append(loaded)


def broken(site: Path) -> list[str]:
    """List broken links and external resources, one per line."""
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
                found.append(f"{where} links to {link}, which has no such anchor")
    return found


def _outside(address: str) -> bool:
    return re.match(r"(https?:)?//", address) is not None
