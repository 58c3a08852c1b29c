"""What a web page says that a server sends instead of a file."""

import urllib.parse
from html.parser import HTMLParser

# Google Drive asks so before it sends a file that is too large for its search for viruses.
_FORM = "download-form"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.title, self.action = "", ""
        self.fields: dict[str, str] = {}
        self._in_title = self._in_form = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {key: value or "" for key, value in attrs}
        if tag == "title":
            self._in_title = True
        elif tag == "form" and said.get("id") == _FORM:
            self._in_form, self.action = True, said.get("action", "")
        elif tag == "input" and self._in_form and said.get("type") == "hidden":
            self.fields[said.get("name", "")] = said.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag == "form":
            self._in_form = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data


def read(page: str, url: str) -> tuple[str, str]:
    """Read a page's title, and the address of the file if it asks for a confirmation, else ""."""
    found = _Page()
    found.feed(page)
    title = " ".join(found.title.split())[:80]
    if not found.action:
        return title, ""
    address = urllib.parse.urlsplit(urllib.parse.urljoin(url, found.action))
    fields = dict(urllib.parse.parse_qsl(address.query)) | found.fields
    return title, address._replace(query=urllib.parse.urlencode(fields)).geturl()
