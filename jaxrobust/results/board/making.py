"""Make the page of boards: each bundle is verified first, and left out if it does not verify."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrobust.results.board import board_page, entries, listing, ranking
from jaxrobust.results.board.entries import BoardEntry
from jaxrobust.runtime.files import whole
from jaxrobust.runtime.text.progress import say
from jaxrobust.runtime.text.spelling import counted

PAGE = "index.html"


def make(
    paths: Sequence[Path], out: Path, *, networks: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Write `out`/index.html of the bundles that verified; return all of it for JSON.

    Args:
      paths: bundles, or folders of several.
      out: folder of the page, which is made if need be.
      networks: file that says which network each bundle is of; None: `networks.toml` beside each.
      settings: `batch`, `sample` and `seed`, as `jaxrobust verify` takes them.
    Raises:
      ValueError: there is no bundle, or `out` is a file. A bundle that does not verify is named on
        stderr and on the page, and `whole` is False.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; name a folder")
    listed = listing.find(paths, networks)
    found: dict[str, BoardEntry] = {}
    left_out: dict[str, str] = {}
    for number, one in enumerate(listed, 1):
        say(f"bundle {number} of {len(listed)}: {one.folder}")
        verified = entries.verified(one, **settings)
        if isinstance(verified, str):
            left_out[str(one.folder)] = verified
            say(f"{one.folder} is left out: {verified}; it is not ranked")
        else:  # a copy of a bundle is no other network
            found.setdefault(verified.numbers[0], verified)
    boards = ranking.boards([*found.values()])
    text = board_page.page(boards, left_out)
    out.mkdir(parents=True, exist_ok=True)
    with whole.writing(out / PAGE, len(text.encode())) as part:
        part.write_text(text, encoding="utf-8")
    missing = f", {counted(len(left_out), 'bundle')} left out" if left_out else ""
    shown = f"{counted(len(found), 'bundle')} on {counted(len(boards), 'board')}{missing}"
    print(f"{out / PAGE}: {shown}")
    return {"out": str(out / PAGE)} | board_page.plain(boards, left_out)
