"""How Sphinx builds the documentation: `make docs`, with warnings as errors, without network."""

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

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Two dashes of an option are not a long one.
smartquotes = False

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# Examples of docstrings are run too, those of one page after another in one namespace.
doctest_test_doctest_blocks = "docstrings"
doctest_global_setup = "import daskshare"
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
    # One field to search with is enough: the one in the side bar.
    "navbar_persistent": [],
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def adapt(app: object, docname: str, source: list[str]) -> None:
    """Fit pages that are also read in the repository to the site."""
    # Links to files beside docs/ lead nowhere on a site: leave the words.
    text = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", source[0])
    # Sphinx warns of a pattern in a table of contents that no page answers to.
    here = Path(__file__).parent
    text = re.sub(
        r"^([a-z]+\*)\n", lambda m: m[0] if any(here.glob(f"{m[1]}.*")) else "", text, flags=re.M
    )
    source[0] = text


def setup(app) -> None:  # type: ignore[no-untyped-def]
    """Connect what is ours."""
    app.connect("source-read", adapt)
