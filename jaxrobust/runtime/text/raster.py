"""SVG as PNG, for programs that show no SVG; resvg draws it, which needs no other library."""

# As CSS lists them, the first that a machine has; resvg knows no `system-ui`.
FONTS = "DejaVu Sans,Liberation Sans,Arial,Helvetica,Noto Sans,Open Sans,Roboto,sans-serif"
_ZOOM = 2  # pixels to a unit: sharp on screens of today


def png(svg: str) -> bytes:
    """Draw an SVG file's text on white, two pixels to a unit."""
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError("pictures need resvg, which draws them: pip install resvg-py") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=_ZOOM, background="#ffffff"))


def lacking() -> str:
    """Say what pictures lack on this machine; an empty text where all is well."""
    empty = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">{}</svg>'
    letter = f'<text y="9" font-size="9" font-family="{FONTS}">x</text>'
    if png(empty.format(letter)) != png(empty.format("")):
        return ""
    return (
        "pictures have no letters, because this machine has no known font; install one, such as "
        "with apt-get install fonts-dejavu-core"
    )
