"""Write the table of the scaling law into the page of `jaxrobust estimate`; review it.

`python tools/generate/law_table.py`
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxrobust.doctor.estimate import devices
from jaxrobust.papers import law

PAGE = ROOT / "jaxrobust" / "doctor" / "estimate" / "README.md"
TARGETS = (65, 67.5, 70, 72.5)
HEAD = (
    "| target | network | images seen | chip-hours (H100, 20% of the peak) | at least to at most "
    "|\n"
    "|---|---|---|---|---|\n"
)


def rows() -> str:
    """Return the table: what `jaxrobust estimate --target` prints for each target."""
    chip = devices.target(law.DEVICES).chip
    assert chip is not None
    speed, (_, half), lines = chip.flops * law.UTILISATION * 3600, law.calibration(), ""
    for target in TARGETS:
        point, *ends = (law.cheapest(target + moved) for moved in (0, -half, half))
        hours, least, most = (f"{one.flops / speed:.3g}" for one in (point, *ends))
        network = f"WRN-{point.depth}-{point.width}"
        lines += f"| {target:g}% | {network} | {point.images / 1e6:.0f} million | {hours} | "
        lines += f"{least} to {float(most):,.0f} |\n" if "e" in most else f"{least} to {most} |\n"
    return HEAD + lines


def page(text: str) -> str:
    """Return the page with the table of today."""
    before, _, rest = text.partition(HEAD)
    old = rest.partition("\n\n")[0]
    return before + rows() + rest[len(old) + 1 :]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
