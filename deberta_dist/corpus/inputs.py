"""Which files are read: what the user names becomes a list of files, in the order they are read.

Preparation, tokenizer training and their samples all begin here; ``reading`` turns the files into documents.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.errors import DataError

TEXT, RECORDS, PARQUET = ".txt", ".jsonl", ".parquet"
COMPRESSIONS = (".gz", ".zst", ".bz2")
_READABLE = re.compile(r".*?(?P<kind>\.txt|\.jsonl|\.parquet)(?P<compression>(?<!parquet)(?:\.gz|\.zst|\.bz2))?", re.S)
_NAMED = re.compile(r"([A-Za-z0-9_-]+)=(.+)", re.S)
_KINDS = ".txt, .jsonl (both also with .gz, .zst or .bz2) and .parquet"


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read, as it was when it was listed.

    Attributes:
        path: the file.
        source: name of the source it belongs to; "" where none was given.
        num_bytes: its size.
        modified_ns: time of its last change, in nanoseconds.
    """

    path: Path
    source: str
    num_bytes: int
    modified_ns: int

    @property
    def kind(self) -> str:
        """``TEXT``, ``RECORDS`` or ``PARQUET``."""
        return _suffixes(self.path)[0]

    @property
    def compression(self) -> str:
        """One of ``COMPRESSIONS``, or ""."""
        return _suffixes(self.path)[1]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of one file that can be read without the rest.

    Attributes:
        start, stop: bytes ``[start, stop)`` of a plain file; row groups ``[start, stop)`` of a .parquet file. A
            compressed file cannot be cut: its only piece is all its bytes.
    """

    start: int
    stop: int


def list_inputs(inputs: Iterable[str | Path]) -> list[InputFile]:
    """The files that ``inputs`` name, in the order they are given.

    Each is ``PATH`` or ``NAME=PATH`` (letters, digits, ``-`` and ``_``): all of them have a name, or none. A PATH is
    a file, a directory (every readable file below it, ordered by path; names that begin with a dot are passed over)
    or a pattern with ``*``, ``?``, ``[]`` or ``**`` (every readable file that fits, ordered by path, none hidden).
    What exists under the whole word is that file, whatever ``=`` or ``*`` it contains.

    Args:
        inputs: words of a command line, or paths.

    Returns:
        The files; readable are .txt and .jsonl, both also with .gz, .zst or .bz2 after it, and .parquet.

    Raises:
        DataError: an input is missing, not readable or of another kind, has nothing readable below it or fits
            nothing, a file comes twice, or some inputs have a name and some have none.
    """
    given = [_name_and_path(word) for word in inputs]
    unnamed = [str(path) for name, path in given if not name]
    if unnamed and len(unnamed) < len(given):
        raise DataError(f"input {unnamed[0]} has no name and others have: write NAME=PATH for all inputs or for none")
    files: list[InputFile] = []
    seen: dict[Path, Path] = {}
    for source, path in given:
        for found in _files_of(path):
            real = found.resolve()
            if real in seen:
                also = "" if seen[real] == found else f" (also as {seen[real]})"
                raise DataError(f"input {found} is given twice{also}")
            seen[real] = found
            status = found.stat()
            files.append(
                InputFile(path=found, source=source, num_bytes=status.st_size, modified_ns=status.st_mtime_ns)
            )
    return files


def files_below(folder: Path, *, suffixes: tuple[str, ...]) -> list[Path]:
    """The files below a directory with one of these endings, ordered by path; hidden ones are passed over.

    Raises:
        DataError: a directory cannot be read, or links to one it lies in.
    """
    return sorted(file for file in _below(folder, ()) if file.suffix in suffixes)


def _name_and_path(word: str | Path) -> tuple[str, Path]:
    """``("wiki", Path("w.txt"))`` for "wiki=w.txt"; ``("", path)`` where there is no name."""
    named = _NAMED.fullmatch(word) if isinstance(word, str) else None
    if named is None or os.path.lexists(word):
        return "", Path(word)
    return named[1], Path(named[2])


def _suffixes(path: Path) -> tuple[str, str]:
    """Kind and compression by a file's name; two empty strings for what is not readable."""
    match = _READABLE.fullmatch(path.name)
    return (match["kind"], match["compression"] or "") if match else ("", "")


def _files_of(path: Path) -> list[Path]:
    """The readable files that one PATH names."""
    if path.is_dir():
        found = sorted(file for file in _below(path, ()) if _suffixes(file)[0])
        if not found:
            raise DataError(f"{path} has no readable files below it; readable are {_KINDS}")
        return found
    if path.exists():
        return [_checked(path)]
    if not glob.has_magic(str(path)):
        raise DataError(f"input {path} does not exist")
    fitting = [Path(name) for name in glob.iglob(str(path), recursive=True)]
    found = sorted({file for file in fitting if _suffixes(file)[0] and file.is_file()})
    if not found:
        hint = "; for what is below directories, end the pattern with /**" if fitting else ""
        raise DataError(f"no readable file fits {path}{hint}; readable are {_KINDS}")
    return found


def _checked(path: Path) -> Path:
    """A file that is named itself."""
    if not path.is_file():
        raise DataError(f"input {path} is not a regular file: write it to a file first")
    if not _suffixes(path)[0]:
        lines = "; JSON is read one object a line, in files named .jsonl" if ".json" in path.suffixes else ""
        raise DataError(f"input {path} is of no kind that can be read{lines}; readable are {_KINDS}")
    return path


def _below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Every file below a directory that is not hidden, through links as well."""
    real = folder.resolve()
    if real in above:
        raise DataError(f"input {folder} is a link to a directory that it lies in: name what is below it instead")
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"input {folder} cannot be read ({error.strerror})") from error
    for entry in entries:
        if entry.is_dir():
            yield from _below(folder / entry.name, (*above, real))
        elif entry.is_file():
            yield folder / entry.name
