"""Lines of a module's own source, which messages name."""

import re
from pathlib import Path
from typing import Any

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def line(node: Any) -> str:
    """Return the line of the module's source that a node computes: FILE, line N (CODE)."""
    return own_line(node.meta.get("stack_trace") or "") or node.name


def own_line(text: str) -> str:
    """Return the innermost line of a stack trace that is not PyTorch's own."""
    import torch

    inside, ours = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
    lines = text.splitlines()
    found = [(i, match) for i, row in enumerate(lines) if (match := _FRAME.search(row))]
    own = [(i, m) for i, m in found if not m[1].startswith((inside, ours, "torch/", "<"))]
    if not own:
        return ""
    place, match = own[-1]
    code = lines[place + 1].strip() if place + 1 < len(lines) else ""
    return f"{match[1]}, line {match[2]}" + (f" ({code})" if code else "")
