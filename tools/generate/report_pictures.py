"""Makes the pictures of reports in README with Chromium.

python tools/generate/report_pictures.py quickstart=runs/quickstart --height 1465
python tools/generate/report_pictures.py cifar10=runs/cifar10/evaluation --height 2188

Each NAME=PATH becomes tools/pictures/NAME.png: the top of the report by `python -m jaxrobust.report
PATH`, with few colors, to keep it small in the repository.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxrobust.report import gathered, page
from jaxrobust.report.parts import examples

LARGEST = 200_000  # bytes of a picture
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="+", metavar="NAME=PATH", help="Name, and what to show.")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "pictures", help="Folder.")
    parser.add_argument("--width", type=int, default=1000, help="Pixels; default: 1000.")
    parser.add_argument(
        "--height", type=int, default=1600, help="Maximum number of pixels; default: 1600."
    )
    args = parser.parse_args(argv)
    if wrong := [text for text in args.pictures if not text.partition("=")[2]]:
        parser.error(f"{wrong[0]} names no picture; write it as NAME=PATH")
    args.out.mkdir(parents=True, exist_ok=True)
    for text in args.pictures:
        name, _, path = text.partition("=")
        contents = gathered.gather([Path(path)])
        shown = page.page(contents, pictures=examples.Album().part)
        file = args.out / f"{name}.png"
        file.write_bytes(small(screenshot(shown, args.width, args.height)))
        print(f"{file}: {file.stat().st_size:,} bytes")


def screenshot(text: str, width: int, height: int) -> Image.Image:
    """Return the top of a page in a window of this size, without empty space below."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("report_pictures needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        html, png = there / "page.html", there / "page.png"
        html.write_text(text)
        window = (f"--window-size={width},{height}", f"--user-data-dir={there / 'browser'}")
        command = [chromium, *_FLAGS, *window, f"--screenshot={png}", str(html)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image = Image.open(png).convert("RGB")
    empty = Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))
    box = ImageChops.difference(image, empty).getbbox() or (0, 0, *image.size)
    return image.crop((0, 0, image.width, min(box[3] + 16, image.height)))


def small(image: Image.Image) -> bytes:
    """Return an image as PNG with as many colors as fit; `ValueError` if not even 32 fit."""
    for colours in (256, 128, 64, 32):
        held = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(held, "png", optimize=True)
        if held.tell() < LARGEST:
            return held.getvalue()
    raise ValueError(f"the picture has {held.tell():,} bytes; give a smaller --height")


if __name__ == "__main__":
    main()
