"""The site of the documents."""

import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser

import pages
import pytest


def settings():
    """What docs/conf.py sets; it imports nothing but the version."""
    path = list(sys.path)
    try:
        return runpy.run_path(str(pages.ROOT / "docs" / "conf.py"))
    finally:
        sys.path[:] = path


def test_every_page_is_in_the_menu():
    menu = [page for part in settings()["MENU"].values() for page in part]
    assert len(menu) == len(set(menu))
    sources = {p for pattern in settings()["include_patterns"] for p in pages.ROOT.glob(pattern)}
    found = {path.relative_to(pages.ROOT).with_suffix("").as_posix() for path in sources}
    assert set(menu) == found - {settings()["root_doc"]}


def test_stars_of_shapes_are_escaped_and_emphasis_is_not():
    lines = ["velocity v, [K, B, *latent]; *not* this", "``a`` *b*, *c*"]
    settings()["with_stars"](None, "function", "f", None, None, lines)
    assert lines[0] == r"velocity v, [K, B, \*latent]; *not* this"


def test_an_anchor_within_a_text_can_be_reached():
    source = ['a\n\n<a name="micro-batches"></a>**Micro-batches** are\n']
    settings()["with_anchors"](None, "page", source)
    assert source == ["a\n\n(micro-batches)=\n**Micro-batches** are\n"]


class Resources(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "link" and attributes.get("rel") != "canonical":
            self.found.append(attributes.get("href"))
        elif tag in {"script", "img", "iframe", "source"} and "src" in attributes:
            self.found.append(attributes["src"])


@pytest.mark.slow_suite  # half a minute
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    for package in ("sphinx", "furo", "myst_nb", "sphinx_copybutton"):
        pytest.importorskip(package)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-c", "docs",
               "-d", str(tmp_path / "doctrees"), ".", str(site)]  # fmt: skip
    done = subprocess.run(command, cwd=pages.ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for page in site.rglob("*.html"):
        resources = Resources()
        resources.feed(page.read_text())
        assert [url for url in resources.found if url and re.match(r"(https?:)?//", url)] == []
    for style in site.rglob("*.css"):
        assert (
            re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)|@import[^;]*//", style.read_text()) == []
        )
    reference = (site / "docs" / "reference.html").read_text()
    import guard_ops

    assert [n for n in guard_ops.__all__ if f'id="guard_ops.{n}"' not in reference] == []
    assert "README.html" in (site / "index.html").read_text()
