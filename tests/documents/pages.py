"""The documents as their readers see them: links, headings, and the Python in them.

A snippet is a fence of ``python``. All snippets of a page are run in order, in one namespace, which
begins with what ``given.py`` has for the page. A comment on the line before a fence,

    <!-- snippet: not run, REASON -->

leaves out one that needs a GPU, a model or a framework: it is compiled, and what it takes from
guard_ops is looked up. Pages in ``NOT_RUN`` are all like that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *DOCS,
    ROOT / "kernels" / "README.md",
    ROOT / "tests" / "data" / "README.md",
]

_FENCE = re.compile(r"^(```+)(\w*)[^\n]*\n(.*?)^\1`*[ \t]*$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!-- snippet: not run, (.+?) -->\n\Z")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(?:[^`\n]|\n(?!\n))+?\1(?!`)")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
_HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"")
_NAMED = re.compile(r"<a\b[^>]*?\b(?:id|name)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t]*#*$", re.MULTILINE)


class Fence(NamedTuple):
    """A fenced block of a page."""

    line: int  # of its first line of code
    language: str
    code: str
    not_run: str | None  # why


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[Fence]:
    """Every fenced block, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        comment = _COMMENT.search(text[: match.start()])
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Fence(line, match[2], match[3], comment and comment[1]))
    return found


def _prose(page: Path) -> str:
    """The page without its fences, code spans and indented blocks, in which nothing is a link."""
    text = _FENCE.sub("", page.read_text())
    text = re.sub(r"(?:(?<=\n)|\A)\n?(?:    [^\n]*\n+)+", "\n", text)
    # A span may be a link's text, so only what could be taken for a link goes.
    return _SPAN.sub(lambda span: "" if "](" in span[0] else span[0], text)


def links(page: Path) -> list[str]:
    """Where the page's links and pictures lead, but those into the network."""
    text = _prose(page)
    found = [*_LINK.findall(text), *_HTML_LINK.findall(text)]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """What ``#...`` can follow the page's name: headings as GitHub has them, and HTML's names."""
    found: dict[str, int] = {}
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text())):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return {*found, *_NAMED.findall(page.read_text())}
