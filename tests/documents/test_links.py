"""Links within the repository lead somewhere, and pages are linked to."""

import re

import pages
import pytest


def broken(page):
    """The page's links that lead nowhere."""
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and target.is_relative_to(pages.ROOT)
        if not there or (anchor and anchor not in pages.anchors(target)):
            yield link


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_every_link_and_anchor_exists(page):
    assert list(broken(page)) == []


def test_every_page_can_be_reached_from_the_readme():
    seen, left = set(), [pages.ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = (link.partition("#")[0] for link in pages.links(page))
        left += [(page.parent / target).resolve() for target in targets if target]
    assert [pages.name(page) for page in pages.DOCS if page not in seen] == []


def test_every_picture_of_the_docs_is_shown():
    shown = {
        (page.parent / link).resolve() for page in pages.PAGES for link in pages.links(page)
    }  # fmt: skip
    pictures = [p for p in (pages.ROOT / "docs").rglob("*") if p.suffix in {".png", ".svg"}]
    unseen = [p for p in pictures if p not in shown and p.with_suffix(".svg") not in shown]
    assert [pages.name(picture) for picture in unseen] == []


def test_every_make_target_that_is_named_exists():
    makefile = (pages.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*)(?: [a-z -]+)?:", makefile, re.MULTILINE))
    targets |= {t for line in re.findall(r"^([a-z][a-z \-]*):", makefile, re.MULTILINE)
                for t in line.split()}  # fmt: skip
    named = {
        (pages.name(page), target)
        for page in pages.PAGES
        for target in re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    }
    assert sorted(found for found in named if found[1] not in targets) == []


@pytest.mark.parametrize(
    ("text", "links", "anchors"),
    [
        ("# A `b_c`, (d) and e-f!\n[x](y.md#z) ![p](q.png)\n", ["y.md#z", "q.png"],
         {"a-b_c-d-and-e-f"}),
        ("## Same\n## Same\n[out](https://example.org)\n", [], {"same", "same-1"}),
        ("```\n# no heading [no](link)\n```\n    [no](link)\n", [], set()),
        ('<img src="p.png" alt=""> [`a`](b.md)', ["b.md", "p.png"], set()),
    ],
    ids=["slug", "twice", "code", "html"],
)  # fmt: skip
def test_what_counts_as_a_link_and_an_anchor(tmp_path, text, links, anchors):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert pages.links(page) == links
    assert pages.anchors(page) == anchors
