"""The settings of the documentation; `python tools/docs/build.py` builds it.

Sphinx with MyST-NB, as JAX, Flax, Optax and Orbax build theirs: pages are Markdown, their cells are
run while they are built, and what a cell prints is shown below it. Nothing is loaded from
elsewhere, neither while it is built nor in a browser.
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jaxrobust
from tools.docs import kernels, pages

project = "jaxrobust"
author = copyright = "The jaxrobust authors"
release = version = jaxrobust.__version__
extensions = ["myst_nb"]
exclude_patterns = ["_*"]
nitpicky = False
highlight_language = "none"
maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

nb_execution_mode = os.environ.get("JAXROBUST_DOCS_CELLS", "cache")
# Which language cells are in, only a kernel says.
suppress_warnings = ["myst-nb.lexer"] if nb_execution_mode == "off" else []
nb_execution_timeout = 900
nb_execution_raise_on_error = False  # it is a warning, and warnings fail: so all pages are tried
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"

html_theme = "furo"
html_title = f"jaxrobust {release}"
html_static_path = ["_static"]
html_css_files = ["own.css"]
html_show_sourcelink = False
html_copy_source = False
# The theme's own pages need no script to be read; search does.
html_theme_options = {"top_of_page_buttons": [], "navigation_with_keys": False}


def setup(app: Any) -> None:
    """Fill pages with what they include, and let cells run where nothing else is."""
    work = Path(app.outdir).parent
    app.config.nb_execution_cache_path = str(kernels.cache(work))
    kernels.prepare(work)
    # Pages generated from the code are rewritten when it changes.
    app.add_config_value("code", kernels.digest("tools/docs"), "env")

    def read(app: Any, name: str, source: list[str]) -> None:
        source[0] = pages.expanded(source[0], f"{name}.md")
        for file in pages.included():
            if pages.places()[file.relative_to(ROOT).as_posix()] == f"{name}.md":
                app.env.note_dependency(str(file))

    app.connect("source-read", read)
