"""Sphinx builds the documentation by this: `make docs`, with warnings as errors, without network."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Modules are imported for their docstrings; a GPU is not needed for that.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import daskshare  # noqa: E402

project = "daskshare"
author = "the daskshare developers"
release = version = daskshare.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
suppress_warnings = [
    # Pages of parts that are not there (yet) leave an empty pattern in a table of contents.
    "toc.empty_glob",
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# Examples that need a cluster or a video are run too: see the pages' testsetup.
doctest_test_doctest_blocks = ""
trim_doctest_flags = True

html_theme = "sphinx_book_theme"
html_title = f"daskshare {release}"
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def without_links_out_of_the_site(app: object, docname: str, source: list[str]) -> None:
    """Turn links to files beside docs/ into plain words: they lead nowhere on a site."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", source[0])


def setup(app) -> None:  # type: ignore[no-untyped-def]
    """Connect what is ours."""
    app.connect("source-read", without_links_out_of_the_site)
