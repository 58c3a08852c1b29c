"""Signatures of the public names, as text to review."""

import inspect
import re
from collections.abc import Iterator

from tests.support.paths import ROOT
from tools.docs import public

FILE = ROOT / "tests/golden/public_signatures.txt"


def lines() -> Iterator[str]:
    for name in public.names():
        value = public.value(name)
        if callable(value) and not (isinstance(value, type) and issubclass(value, Exception)):
            signature = inspect.signature(value)
            plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
            line = f"{name}{signature.replace(parameters=plain, return_annotation=signature.empty)}"
            yield re.sub(r"<[^<>]*(<[^<>]*>)?[^<>]* at 0x[0-9a-f]+>", "...", line)


def text() -> str:
    return "\n".join(lines()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
