"""SVG to PNG, for programs that cannot show SVG; drawn by resvg, without other libraries."""

# A CSS list: the first font on the machine is used. resvg has no `system-ui`.
FONTS = "DejaVu Sans,Liberation Sans,Arial,Helvetica,Noto Sans,Open Sans,Roboto,sans-serif"
_ZOOM = 2  # pixels per unit: sharp on today's screens


def png(svg: str) -> bytes:
    """Render SVG text on white, two pixels per unit."""
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError("drawing pictures requires resvg: pip install resvg-py") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=_ZOOM, background="#ffffff"))


def lacking() -> str:
    """Say what is missing on this machine to draw pictures; empty if nothing is."""
    empty = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">{}</svg>'
    letter = f'<text y="9" font-size="9" font-family="{FONTS}">x</text>'
    if png(empty.format(letter)) != png(empty.format("")):
        return ""
    return (
        "pictures lack text, because no supported font is installed; install one, for example "
        "with apt-get install fonts-dejavu-core"
    )
