"""Turns the inputs that a user names into a list of files, in the order in which they are read.

Preparation, tokenizer training and their samples all begin here; ``texts`` turns the files into documents.
"""

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.errors import DataError, encodable, printable
from deberta_dist.files.foreign import HEAD_BYTES, begins_like, head_of, refuse_stand_in
from deberta_dist.preparation.reading.finding import entries_below, fitting_entries, is_hidden, require_regular

TEXT, RECORDS, PARQUET, ARTICLES = "text", "jsonl", "parquet", "wikiextractor"
AUTO = "auto"
FORMATS = (AUTO, TEXT, RECORDS, PARQUET, ARTICLES)
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_ENDINGS = {".txt": TEXT, ".jsonl": RECORDS, ".ndjson": RECORDS, ".json": RECORDS, ".parquet": PARQUET}
_NAMED = re.compile(r"([A-Za-z0-9_-]+)=(.+)", re.S)
_NUMBER = re.compile(r"\.\d+(-of-\d+)?", re.IGNORECASE)
_KINDS = ".txt, .jsonl, .ndjson, .json (all also with .gz, .zst, .bz2 or .xz) and .parquet"
_NUM_TOLD = 10
# Path, kind and compression.
_Found = tuple[Path, str, str]


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read, as it was when it was listed.

    Attributes:
        path: as it was given, or found below a directory.
        kind: ``TEXT``, ``RECORDS``, ``PARQUET`` or ``ARTICLES``.
        compression: one of ``COMPRESSIONS``, or "".
        source: name of the source it belongs to; "" where none was given.
        num_bytes: bytes on disk; a change of it ends the reading.
        modified_ns: time of its last change, in nanoseconds.
    """

    path: Path
    kind: str
    compression: str
    source: str
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True, kw_only=True)
class FileRange:
    """Bytes or row groups of one file that can be read without the rest.

    Attributes:
        start, stop: bytes ``[start, stop)`` of a plain file; row groups ``[start, stop)`` of a .parquet file. A
            compressed file cannot be cut: its only range is all its bytes.
    """

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """What lay in directories or fitted patterns and is not read.

    Attributes:
        count: how many there are; a hidden directory is one.
        first: up to ten of them as they can be printed, hidden ones last.
    """

    count: int = 0
    first: tuple[str, ...] = ()

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "PassedOver":
        """Counts them and names some."""
        ordered = sorted(set(paths), key=lambda path: (is_hidden(path), path))
        names = [f"{path}/" if path.is_dir() else str(path) for path in ordered[:_NUM_TOLD]]
        return cls(count=len(ordered), first=tuple(printable(encodable(name)) for name in names))

    @classmethod
    def join(cls, several: Iterable["PassedOver"]) -> "PassedOver":
        """All of them together."""
        several = list(several)
        first = tuple(name for one in several for name in one.first)[:_NUM_TOLD]
        return cls(count=sum(one.count for one in several), first=first)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return self.count > 0

    def __str__(self) -> str:
        """``3 (a.md, b.csv, .git/)``."""
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count:,} ({', '.join(self.first)}{more})"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What inputs name.

    Attributes:
        files: what is read, in order.
        passed_over: what lay in the directories, or fitted the patterns, and is not read.
    """

    files: list[InputFile]
    passed_over: PassedOver


def list_inputs(inputs: Iterable[str | Path], *, format: str = AUTO) -> list[InputFile]:
    """The files of ``find_inputs``."""
    return find_inputs(inputs, format=format).files


def find_inputs(inputs: Iterable[str | Path], *, format: str = AUTO) -> Listing:
    """The files that ``inputs`` name, in the order they are given, and what lay beside them.

    Each is ``PATH`` or ``NAME=PATH`` (letters, digits, ``-`` and ``_``): all of them have a name, or none. A PATH is
    a file, a directory (every readable file below it, ordered by path; names that begin with a dot are passed over)
    or a pattern with ``*``, ``?``, ``[]`` or ``**`` (every readable file that fits, ordered by path, none hidden).
    What exists under the whole word is that file, whatever ``=`` or ``*`` it contains.

    Args:
        inputs: words of a command line, or paths.
        format: one of ``FORMATS``. "auto": by the ending, whatever its case; readable are .txt, .jsonl, .ndjson and
            .json, all also with .gz, .zst, .bz2 or .xz after it, and .parquet. Another one: what files hold. Of
            directories and of patterns that end with ``*`` or ``**`` the files with its endings or none (a number is
            none) are readable, else files of any name.

    Raises:
        DataError: an input is missing, not readable or of another kind, has nothing readable below it or fits
            nothing, a file comes twice, or some inputs have a name and some have none; a directory cannot be read or
            links to one it lies in; what is not hidden is a link that leads nowhere, a pipe, a socket or a device; a
            file is the pointer of Git LFS or git-annex.
    """
    assert format in FORMATS
    given = [_name_and_path(word) for word in inputs]
    unnamed = [str(path) for name, path in given if not name]
    if unnamed and len(unnamed) < len(given):
        raise DataError(f"input {unnamed[0]} has no name and others have: write NAME=PATH for all inputs or for none")
    files: list[InputFile] = []
    passed_over: list[Path] = []
    seen: dict[Path, Path] = {}
    for source, path in given:
        for found, kind, compression in _files_of(path, format=format, passed_over=passed_over):
            real = found.resolve()
            if real in seen:
                also = "" if seen[real] == found else f" (also as {seen[real]})"
                raise DataError(f"input {found} is given twice{also}")
            seen[real] = found
            files.append(input_file(found, kind=kind, compression=compression, source=source))
    return Listing(files=files, passed_over=PassedOver.of(passed_over))


def input_file(path: Path, *, kind: str, compression: str, source: str = "") -> InputFile:
    """A file, as it is now.

    Raises:
        DataError: it is no regular file, may not be read, or is the pointer of Git LFS or git-annex.
    """
    status = require_regular(path)
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read (Permission denied)")
    if status.st_size <= HEAD_BYTES:
        refuse_stand_in(head_of(path), path)
    return InputFile(
        path=path,
        kind=kind,
        compression=compression,
        source=source,
        num_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
    )


def split_name(path: Path) -> tuple[str, str]:
    """``(".jsonl", ".gz")`` for "a.JSONL.gz": the ending in lower case, and one of ``COMPRESSIONS``, or "" for each."""
    name = path.name.lower()
    compression = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def _name_and_path(word: str | Path) -> tuple[str, Path]:
    """``("wiki", Path("w.txt"))`` for "wiki=w.txt"; ``("", path)`` where there is no name."""
    named = _NAMED.fullmatch(word) if isinstance(word, str) else None
    if named is None or os.path.lexists(word):
        return "", Path(word)
    return named[1], Path(named[2])


def _sort(path: Path, *, format: str, is_named: bool) -> tuple[str, str]:
    """Kind and compression of a file by its name; two empty strings for what is not read."""
    ending, compression = split_name(path)
    kind = _ENDINGS.get(ending, "")
    if format != AUTO:
        has_none = not ending or _NUMBER.fullmatch(ending)
        kind = format if is_named or has_none or kind == format else ""
    return (kind, compression) if kind and not (kind == PARQUET and compression) else ("", "")


def _files_of(path: Path, *, format: str, passed_over: list[Path]) -> list[_Found]:
    """The readable files that one PATH names, in order; appends what is passed over."""
    is_pattern = glob.has_magic(str(path)) and not os.path.lexists(path)
    if not is_pattern and not path.is_dir():
        if not os.path.lexists(path):
            raise DataError(f"input {path} does not exist")
        require_regular(path)
        return [(path, *_sort_of_named(path, format=format))]
    found: list[_Found] = []
    left: list[Path] = []
    is_named = is_pattern and path.name not in ("*", "**")
    for entry in sorted(fitting_entries(path) if is_pattern else entries_below(path)):
        # A pattern fits a hidden name only if it has the dot.
        if (is_hidden(entry) and not is_pattern) or (is_pattern and entry.is_dir()):
            left.append(entry)
            continue
        require_regular(entry)
        kind, compression = _sort(entry, format=format, is_named=is_named)
        if kind:
            found.append((entry, kind, compression))
        else:
            left.append(entry)
    inside = {parent for entry, *_ in found for parent in entry.parents}
    left = [entry for entry in left if entry not in inside]
    if not found:
        what = f"no readable file fits {path}" if is_pattern else f"{path} has no readable files below it"
        if is_pattern and any(map(Path.is_dir, left)):
            what += "; for what is below directories, end the pattern with /**"
        beside = f"; passed over: {PassedOver.of(left)}" if left else ""
        raise DataError(f"{what}; {_readable(format)}{beside}")
    passed_over += left
    return found


def _sort_of_named(path: Path, *, format: str) -> tuple[str, str]:
    """Kind and compression of a file that is named itself."""
    kind, compression = _sort(path, format=format, is_named=True)
    if not kind:
        raise DataError(f"input {path} is not of a supported kind{begins_like(head_of(path))}; {_readable(format)}")
    return kind, compression


def _readable(format: str) -> str:
    if format == AUTO:
        return f"readable are {_KINDS}; --format says what files with other names hold"
    return f"--format {format}: readable are files named themselves, and in directories those without an ending" + (
        f" or with {', '.join(end for end, kind in _ENDINGS.items() if kind == format)}" if format != ARTICLES else ""
    )
