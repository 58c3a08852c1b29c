"""The templates of pages (Jinja2): text is escaped, and macros return markup."""

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).with_name("templates")


def data(value: Any) -> Markup:
    """Embed data in the page as JSON, escaped so that nothing ends the element early."""
    text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def plain(value: Any) -> Any:
    """Convert a value for JSON: five digits, and null if it is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float):
        rounded = float(f"{value:.5g}") if math.isfinite(value) else None
        return int(value) if rounded is not None and value == int(value) else rounded
    return value


ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True,
    finalize=lambda value: "" if value is None else value,
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
ENVIRONMENT.filters["data"] = data
parts: Any = ENVIRONMENT.get_template("parts.html").module
