"""Reads Markdown as far as the tests of the docs need it: headings, links, fenced commands, code in lines."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("CONTRIBUTING.md")])

_FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^[ ]*```", re.S | re.M)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.M)


class Command(NamedTuple):
    """One command of a page, and where it stands."""

    page: str
    line: int
    words: tuple[str, ...]


def without_fences(text: str) -> str:
    """A page without its fenced blocks; lines keep their numbers."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    for match in _HEADING.finditer(without_fences(text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
        slug = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        result.add(f"{slug}-{count}" if count else slug)
    return result


def links(text: str) -> list[str]:
    """Targets of all links and images outside of code."""
    return _LINK.findall(_CODE.sub("", without_fences(text)))


def code(text: str) -> list[str]:
    """Code in lines, outside of fenced blocks."""
    return _CODE.findall(without_fences(text))


def commands(page: Path) -> Iterator[Command]:
    """Commands of the ``sh`` blocks of a page, one each; lines that end with a backslash go on."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        if match[2] != "sh":
            continue
        first = text.count("\n", 0, match.start(3)) + 1
        lines = match[3].split("\n")
        while lines:
            number, line = first, lines.pop(0)
            while line.endswith("\\") and lines:
                line, first = line[:-1] + lines.pop(0), first + 1
            first += 1
            if words := shlex.split(line, comments=True):
                yield Command(page.relative_to(ROOT).as_posix(), number, tuple(words))
