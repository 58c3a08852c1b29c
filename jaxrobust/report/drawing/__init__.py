"""How the page is drawn: figures as SVG, markup, appearance."""
