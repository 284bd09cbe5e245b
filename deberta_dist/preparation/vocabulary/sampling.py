"""Samples texts evenly from a corpus of any size, to train a tokenizer and to measure it.

Called by tools/train_tokenizer.py.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deberta_dist.errors import ConfigError
from deberta_dist.preparation.reading.documents import Document, TextReadOptions
from deberta_dist.preparation.reading.inputs import PARQUET, FileRange, InputFile
from deberta_dist.preparation.reading.parquet import RowGroup, row_groups
from deberta_dist.preparation.reading.streams import open_input, text_chunks
from deberta_dist.preparation.reading.texts import RowRange, read_documents

_MAX_WINDOW_BYTES = 1 << 20
_MIN_WINDOWS = 64
_ESTIMATE_BYTES = 8 << 20
_HELD_OUT_PER_CENT = 2


def is_held_out(text: str) -> bool:
    """Whether a text is one of the 2% that no tokenizer is trained on: it depends on the text alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") % 100 < _HELD_OUT_PER_CENT


def sample_files(
    files: Sequence[InputFile], *, options: TextReadOptions, max_bytes: int | None, salt: str = ""
) -> Iterator[tuple[str, bool]]:
    """Texts of all documents, or about ``max_bytes`` of them taken evenly from all inputs.

    Every document has the same chance. Of plain and .parquet files only samples are read: windows of at most 1 MiB,
    one at a drawn place in each of as many equal stretches of the corpus; the documents that begin in a window are
    taken. Compressed files cannot be entered in the middle: they are read whole, and each document is drawn by its
    number. Where documents are larger than ``max_bytes / 64`` the sample's size is that rough.

    Args:
        files: from ``list_inputs``, in the order in which they are sampled.
        options: as for ``read_documents``; documents that are left out are left out here, too.
        max_bytes: bytes of text to take, about; of files with records, of their lines. None: all.
        salt: another one gives another sample; the same gives the same.

    Yields:
        (text, ``is_held_out(text)``), in the order of the inputs.

    Raises:
        ConfigError: ``max_bytes`` is less than 1.
        DataError: as ``read_documents``.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max_bytes = {max_bytes}, expected at least 1")
    for document in _sample(files, options=options, max_bytes=max_bytes, salt=salt):
        if not document.is_dropped:
            yield document.text, is_held_out(document.text)


def _sample(files: Sequence[InputFile], *, options: TextReadOptions, max_bytes: int | None, salt: str) -> Iterator[Document]:
    layouts = [] if max_bytes is None else [_layout(file, options=options) for file in files]
    total = sum(layout.num_bytes for layout in layouts)
    if max_bytes is None or max_bytes >= total:
        for file in files:
            yield from read_documents(file, options=options)
        return
    windows = _Windows(
        total=sum(layout.num_bytes for layout in layouts if not layout.file.compression),
        share=max_bytes / total,
        size=max(1, min(_MAX_WINDOW_BYTES, max_bytes // _MIN_WINDOWS)),
        salt=salt,
    )
    begin = 0
    for number, layout in enumerate(layouts):
        if layout.file.compression:
            documents = read_documents(layout.file, options=options)
            for position, document in enumerate(documents):
                if _draw(salt, "document", number, position) < windows.share:
                    yield document
            continue
        end = begin + layout.num_bytes
        inside = [FileRange(start=low - begin, stop=high - begin) for low, high in windows.within(begin, end)]
        if layout.groups:
            yield from _rows(layout, inside, options=options)
        else:
            for file_range in inside:
                yield from read_documents(layout.file, options=options, file_range=file_range)
        begin = end


def _rows(layout: "_Layout", windows: Sequence[FileRange], *, options: TextReadOptions) -> Iterator[Document]:
    """The rows of a Parquet file whose text lies in windows, if the rows of a group are equally long.

    A group is read once, up to the last row that is wanted: its rows cannot be entered in the middle.
    """
    begin = first_row = 0
    for group in layout.groups:
        rows_per_byte = group.num_rows / max(1, group.text_bytes)
        wanted: set[int] = set()
        for window in windows:
            low, high = (min(max(0, at - begin), group.text_bytes) for at in (window.start, window.stop))
            wanted.update(range(math.ceil(low * rows_per_byte), math.ceil(high * rows_per_byte)))
        if wanted:
            rows = RowRange(first=first_row + min(wanted), last=first_row + max(wanted) + 1)
            for document in read_documents(layout.file, options=options, file_range=rows):
                if document.offset - first_row in wanted:
                    yield document
        begin += group.text_bytes
        first_row += group.num_rows


def _draw(salt: str, kind: str, *numbers: int) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    digest = hashlib.sha256(" ".join([kind, *map(str, numbers), salt]).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "little") / (1 << 48)


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Windows of ``size`` bytes in ``total`` bytes: one at a drawn place in each stretch of ``size / share``."""

    total: int
    share: float
    size: int
    salt: str

    def within(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """What of the windows lies in ``[begin, end)``, in order."""
        stretch = self.size / self.share
        for number in range(int(begin / stretch), math.ceil(self.total / stretch)):
            start = int(number * stretch)
            if start >= end:
                return
            low = int((number + _draw(self.salt, "window", number)) * stretch)
            # A window that leaves its stretch continues at the stretch's beginning: every byte has the same chance.
            over = max(0, low + self.size - int((number + 1) * stretch))
            for a, b in ((start, min(start + over, low)), (low, low + self.size - over)):
                a, b = max(a, begin), min(b, end)
                if a < b:
                    yield a, b


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where a file's text lies.

    Attributes:
        num_bytes: bytes of its text; of a compressed one estimated from its beginning, of a .parquet file as its
            end tells.
        groups: row groups of a .parquet file.
    """

    file: InputFile
    num_bytes: int
    groups: tuple[RowGroup, ...] = ()


def _layout(file: InputFile, *, options: TextReadOptions) -> _Layout:
    with open_input(file) as handle:
        if file.kind == PARQUET:
            groups = tuple(row_groups(file, handle, field=options.text_field))
            return _Layout(file=file, num_bytes=sum(group.text_bytes for group in groups), groups=groups)
        if not file.compression:
            return _Layout(file=file, num_bytes=file.num_bytes)
        num_bytes = 0
        for chunk in text_chunks(file, handle):
            num_bytes += len(chunk)
            if num_bytes >= _ESTIMATE_BYTES:
                return _Layout(file=file, num_bytes=num_bytes * file.num_bytes // max(1, handle.tell()))
        return _Layout(file=file, num_bytes=num_bytes)
