"""The site of these documents: `make docs` writes it to build/site, without a network.

Sphinx, because the docstrings are written in its markup, and because readers know its pages from
PyTorch and Triton; MyST, so that the documents stay the Markdown that GitHub shows; Furo, whose
pages take no font and no script from elsewhere. The sources are the repository's root, so that
every link is the same file here and there; README.md is the front page.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guard_ops.version import __version__  # noqa: E402

project, author, release = "Guard Ops", "The Guard Ops authors", __version__
project_copyright = "The Guard Ops authors; Apache-2.0"
root_doc = "README"
include_patterns = [
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "docs/*.rst",
    "examples/*.ipynb", "tests/data/README.md",
]  # fmt: skip
exclude_patterns = ["build", ".venv", "runs"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

nb_execution_mode = "off"  # tests/documents/test_notebook.py executes it
myst_heading_anchors = 6  # GitHub's
myst_enable_extensions = ["fieldlist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_mock_imports = ["diffusers"]  # its schedulers' base classes, which take seconds to import
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"Guard Ops {release}"
html_copy_source = False
html_show_sphinx = False
html_additional_pages = {"index": "redirect.html"}
html_static_path = ["static"]
html_css_files = ["wide.css"]
templates_path = ["templates"]
highlight_language = "text"  # of blocks that name none
pygments_style = "friendly"
pygments_dark_style = "monokai"

# What the front page's menu shows. A test holds that every page is in it.
MENU = {
    "Use it": ("docs/writing-a-loop", "docs/swap-in", "docs/trainer", "docs/rewards",
               "docs/monitor", "docs/report", "docs/scale", "docs/api", "docs/reference",
               "examples/minimal_grpo"),
    "Understand it": ("docs/math", "docs/reliability", "docs/demo", "docs/study",
                      "docs/benchmarks"),
    "Build it": ("docs/building", "docs/gpu", "docs/cuda", "docs/kernels"),
    "Change it": ("CONTRIBUTING", "docs/life-of-a-call", "docs/backends", "tests/data/README",
                  "SECURITY", "CHANGELOG"),
}  # fmt: skip


def with_anchors(app: Any, page: str, source: list[str]) -> None:
    """Makes what GitHub takes for an anchor within a text one of MyST's, which links can reach."""
    source[0] = re.sub(r'^<a name="([\w-]+)"></a>', r"(\1)=\n", source[0], flags=re.MULTILINE)


def with_menu(app: Any, page: str, source: list[str]) -> None:
    """Adds the menu to the front page: GitHub, which shows the same file, has none."""
    if page == root_doc:
        for caption, pages in MENU.items():
            listed = "\n".join(f"/{name}" for name in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def with_stars(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """A shape such as [K, B, *latent] begins no emphasis."""
    lines[:] = [re.sub(r"(?<=, )\*(?=\w)", r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", with_stars)
    app.connect("source-read", with_anchors)
    app.connect("source-read", with_menu)
