"""Splits a stream of bytes into documents: by lines, or by blocks between blank lines.

Only a line feed ends a line, whatever else Unicode counts as a line end. A line is blank if it holds white space
alone (``str.isspace``), of any length. A document begins at the first byte of its first line that is not blank: that
byte decides which range of a file it belongs to. Nothing here depends on how the stream is cut into chunks, and
no more than one document within the limit is held.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

# Start and end in the text, and the bytes without the last line feed; None: longer than the limit.
Extent = tuple[int, int, bytes | bytearray | None]
Refuse = Callable[[int], None]

# The white space of str.isspace, in UTF-8.
_NARROW = rb"[\x09-\x0d\x1c-\x20]*"
_WIDE = rb"(?:\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
_SPACE = _NARROW + rb"(?:" + _WIDE + _NARROW + rb")*"
_BLANK_LINES = re.compile(_SPACE + rb"\n")
_SEPARATOR = re.compile(rb"\n" + _SPACE + rb"\n")
# Every byte that white space can have, but the line feed.
_SPACE_BYTES = bytes(
    {*range(9, 14), *range(28, 33), *range(0x80, 0x8B)} | {*b"\x85\x9a\x9f\xa0\xa8\xa9\xaf\xc2\xe1\xe2\xe3"} - {10}
)
_LOOK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LineRun:
    """Whole lines that follow each other.

    Attributes:
        offset: where they begin.
        num_bytes: how many bytes of the text they are.
        lines: they, with a line feed at the end even where the text has none; None for one line longer than the
            limit. A blank line longer than the limit is an empty one here.
    """

    offset: int
    num_bytes: int
    lines: bytes | bytearray | None


def line_runs(chunks: Iterable[bytes], *, offset: int, limit: int, refuse: Refuse) -> Iterator[LineRun]:
    """Cuts a stream behind its line feeds.

    Args:
        chunks: the bytes of the text in order, cut anywhere.
        offset: where it begins in the text.
        limit: bytes of the longest line that is kept.
        refuse: called with the beginning of a longer line that is not blank, as soon as that is known.
    """
    rest = _Rest(offset=offset, limit=limit, refuse=refuse)
    for chunk in chunks:
        behind = chunk.rfind(b"\n") + 1
        if not behind:
            rest.add(chunk)
            continue
        if rest.num_bytes + chunk.find(b"\n") > limit:
            first = chunk.find(b"\n") + 1
            rest.add(chunk[: first - 1])
            yield rest.region(num_bytes=rest.num_bytes + 1)
            chunk, behind = chunk[first:], behind - first
        if behind:
            lines: bytes | bytearray = chunk[:behind]
            if rest.kept:
                rest.kept += lines
                lines = rest.kept
            yield LineRun(offset=rest.offset, num_bytes=len(lines), lines=lines)
            rest.begin(rest.offset + len(lines))
        rest.add(chunk[behind:])
    if rest.num_bytes:
        yield rest.region(num_bytes=rest.num_bytes)


class _Rest:
    """A line whose end is not there yet: its bytes up to the limit, then only whether it is blank."""

    def __init__(self, *, offset: int, limit: int, refuse: Refuse) -> None:
        self._limit, self._refuse = limit, refuse
        self.begin(offset)

    def begin(self, offset: int) -> None:
        self.offset, self.num_bytes = offset, 0
        self.kept = bytearray()
        self._is_long = self._is_text = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> None:
        self.num_bytes += len(data)
        if self._is_text:
            return
        self.kept += data
        if self.num_bytes <= self._limit:
            return
        self._is_long = True
        for at in range(0, len(self.kept), _LOOK_BYTES):
            text = self._decoder.decode(self.kept[at : at + _LOOK_BYTES])
            if text and not text.isspace():
                self._is_text = True
                break
        self.kept = bytearray()
        if self._is_text:
            self._refuse(self.offset)

    def region(self, *, num_bytes: int) -> LineRun:
        """The line as a region of its own; begins the next one."""
        if self._is_long and not self._is_text and self._decoder.decode(b"", final=True):
            self._is_text = True  # it ends within a character
            self._refuse(self.offset)
        lines = None if self._is_text else b"\n" if self._is_long else bytes(self.kept) + b"\n"
        region = LineRun(offset=self.offset, num_bytes=num_bytes, lines=lines)
        self.begin(self.offset + num_bytes)
        return region


def split_lines(runs: Iterable[LineRun], *, stop: int | None, limit: int) -> Iterator[Extent]:
    """Every line that is not empty; lines of white space among them.

    Args:
        runs: from ``line_runs``.
        stop: no line that begins there or later; None: all.
        limit: as for ``line_runs``.
    """
    for run in runs:
        if run.lines is None:
            if stop is not None and run.offset >= stop:
                return
            yield run.offset, run.offset + run.num_bytes, None
            continue
        at, end = run.offset, run.offset + run.num_bytes
        lines = run.lines.split(b"\n")
        lines.pop()
        for line in lines:
            if stop is not None and at >= stop:
                return
            after = at + len(line) + 1
            if line:
                is_long = len(line) > limit and not line.decode("utf-8", "replace").isspace()
                yield at, min(after, end), None if is_long else line
            at = after


def split_blocks(
    runs: Iterable[LineRun], *, stop: int | None, limit: int, inside: int | None, refuse: Refuse
) -> Iterator[Extent]:
    """Every run of lines that are not blank.

    Args:
        runs: from ``line_runs``.
        stop, limit: as for ``split_lines``.
        inside: where a block has begun whose lines may go on here; None: there is none.
        refuse: called with the beginning of a block longer than ``limit``, as soon as that is known.
    """
    begun, kept, num_bytes = inside, bytearray(), 0
    end = 0 if inside is None else inside
    for run in runs:
        at, lines = 0, run.lines
        if lines is None:
            if begun is None and stop is not None and run.offset >= stop:
                return
            begun = run.offset if begun is None else begun
            num_bytes = limit + 2
            kept.clear()
            continue
        if blank := _BLANK_LINES.match(lines):
            if begun is not None:
                yield begun, run.offset, bytes(kept[:-1]) if num_bytes - 1 <= limit else None
                begun = None
            at = blank.end()
        while at < len(lines):
            if begun is None:
                begun, kept, num_bytes = run.offset + at, bytearray(), 0
                if stop is not None and begun >= stop:
                    return
            separator = _SEPARATOR.search(lines, at)
            behind = separator.start() + 1 if separator else len(lines)
            num_bytes += behind - at
            if num_bytes - 1 > limit:
                refuse(begun)
                kept.clear()
            if not separator:
                if num_bytes - 1 <= limit:
                    kept += lines[at:]
                break
            end = run.offset + min(behind, run.num_bytes)
            if num_bytes - 1 > limit:
                yield begun, end, None
            else:
                yield begun, end, bytes(kept) + lines[at : behind - 1] if kept else lines[at : behind - 1]
            begun, at = None, separator.end()
        end = run.offset + run.num_bytes
        if begun is None and stop is not None and end >= stop:
            return
    if begun is not None:
        yield begun, end, bytes(kept[:-1]) if num_bytes - 1 <= limit else None


def line_before(handle: BinaryIO, *, start: int, first: int) -> int:
    """Where to begin so that a parser sees whether the line that holds byte ``start - 1`` is blank.

    Args:
        handle: an uncompressed file, in which one can seek.
        start: beginning of a range, behind ``first``.
        first: where the file's text begins.

    Returns:
        The beginning of that line; or, where that is far, a place in it before text that is not white space.
    """
    high = start - 1
    while high > first:
        low = max(first, high - _LOOK_BYTES)
        handle.seek(low)
        data = handle.read(high - low)
        line = data.rfind(b"\n") + 1
        if line or data.rstrip(_SPACE_BYTES):
            return low + line
        high = low
    return first
