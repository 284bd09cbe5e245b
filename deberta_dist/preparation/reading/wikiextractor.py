"""Articles of WikiExtractor: ``<doc id="12" url="..." title="Anarchism">``, lines of text, ``</doc>``.

The tool writes files without an ending (AA/wiki_00) of any size. As in ``splitting``, an article belongs to the range of
a file in which it begins, whatever chunks the stream comes in, and no more than one article within the limit is held.

Source: attardi/wikiextractor, wikiextractor/extract.py (``write_output``, ``clean``), which writes the title as first
line of an article and escapes ``&``, ``<`` and ``>`` in its text.
"""

import re
from collections.abc import Iterable, Iterator

from deberta_dist.preparation.reading.splitting import Extent, LineRun, Refuse

_OPEN, _CLOSE = b"<doc ", b"</doc>"
_OPENING = re.compile(r"<doc [^\n]*>[ \t\r]*\n")
_CLOSING = re.compile(r"\n?</doc>\s*\Z")

# Start and end in the text, the bytes (None: too long), and which mark of an article they are a line with, if any.
_Segment = tuple[int, int, bytes | None, bytes | None]


def split_articles(runs: Iterable[LineRun], *, stop: int | None, limit: int, inside: bool, refuse: Refuse) -> Iterator[Extent]:
    """Every article, with the lines that open and close it; and every run of other lines that are not blank.

    ``article_text`` refuses those runs, and articles whose end is missing.

    Args:
        runs: from ``line_runs``.
        stop: no article that begins there or later; None: all.
        limit: bytes of the longest article.
        inside: whether the text begins within a line, and maybe an article, of the range before: what comes before the
            first whole line that opens or closes one is that range's.
        refuse: called with the beginning of a longer article, as soon as that is known.
    """
    open_one: _Article | None = None
    for start, end, lines, mark in _segments(runs, is_within_line=inside):
        opens, closes = mark == _OPEN, mark == _CLOSE
        if opens:
            if open_one is not None:  # it has no end
                yield open_one.extent()
            if stop is not None and start >= stop:
                return
        is_another_pieces = inside and not opens
        inside = inside and not opens and not closes
        if open_one is None or opens:
            is_blank = lines is not None and not lines.strip()
            open_one = None if is_another_pieces or is_blank else _Article(start, limit=limit, refuse=refuse)
        if open_one is not None:
            open_one.add(lines, end=end)
        if closes:
            if open_one is not None:
                yield open_one.extent()
                open_one = None
            # What stands behind a line that another range has is that range's.
            if stop is not None and start >= stop:
                return
    if open_one is not None:
        yield open_one.extent()


def article_text(content: str) -> str:
    """The text of an article, its title as first line.

    Args:
        content: it, with the lines that open and close it.

    Raises:
        ValueError: it lacks one of them.
    """
    opening = _OPENING.match(content)
    if opening is None:
        raise ValueError('text outside <doc id=... title="..."> and </doc>: not a file of WikiExtractor')
    closing = _CLOSING.search(content, opening.end() - 1)
    if closing is None:
        raise ValueError("an article without </doc>: the file is cut short or damaged")
    text = content[opening.end() : closing.start()].strip("\r\n")
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


class _Article:
    """The lines of one article, up to the limit."""

    def __init__(self, start: int, *, limit: int, refuse: Refuse) -> None:
        self._start = self._end = start
        self._limit, self._refuse = limit, refuse
        self._kept: bytearray | None = bytearray()

    def add(self, lines: bytes | None, *, end: int) -> None:
        self._end = end
        if self._kept is None:
            return
        if lines is None or len(self._kept) + len(lines) > self._limit:
            self._kept = None
            self._refuse(self._start)
        else:
            self._kept += lines

    def extent(self) -> Extent:
        return self._start, self._end, self._kept


def _segments(runs: Iterable[LineRun], *, is_within_line: bool) -> Iterator[_Segment]:
    for run in runs:
        if run.lines is None:
            yield run.offset, run.offset + run.num_bytes, None, None
            is_within_line = False
            continue
        lines, at = bytes(run.lines), 0
        while at < len(lines):
            marks = [] if is_within_line else [mark for mark in (_OPEN, _CLOSE) if lines.startswith(mark, at)]
            is_within_line = False
            if marks:
                behind = lines.index(b"\n", at) + 1
            else:
                places = [place for mark in (_OPEN, _CLOSE) if (place := lines.find(b"\n" + mark, at)) >= 0]
                behind = min(places, default=len(lines) - 1) + 1
            end = min(run.offset + behind, run.offset + run.num_bytes)
            yield run.offset + at, end, lines[at:behind], marks[0] if marks else None
            at = behind
