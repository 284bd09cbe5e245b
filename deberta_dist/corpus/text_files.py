"""Text files as a stream of documents, read strictly: what is not text is an error that says where.

Preparation and tokenizer training read through this file, so both see the same documents.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.errors import DataError

SUFFIXES = (".jsonl", ".txt")
MAX_DOCUMENT_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of an input file.

    Attributes:
        text: its text.
        path, line: where it begins; lines count from 1.
        num_bytes: bytes of the file from the end of the document before to the end of this one.
    """

    text: str
    path: Path
    line: int
    num_bytes: int


def list_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """The text files that ``inputs`` name, in the order they are read.

    Args:
        inputs: files, and folders, which stand for every .jsonl and .txt file below them, ordered by path;
            names that begin with a dot are passed over.

    Raises:
        DataError: an input is missing, has another suffix, has no text files below it, or comes twice.
    """
    files: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir():
            below = files_below(given, suffixes=SUFFIXES)
            if not below:
                raise DataError(f"{given} has no {' or '.join(SUFFIXES)} files below it")
            files += below
        elif not given.is_file():
            raise DataError(f"input {given} does not exist")
        elif given.suffix not in SUFFIXES:
            kinds = " nor ".join(SUFFIXES)
            raise DataError(f"input {given} is neither {kinds}: convert or decompress it first")
        else:
            files.append(given)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"input {file} is given twice")
        seen.add(file.resolve())
    return files


def files_below(folder: Path, *, suffixes: tuple[str, ...]) -> list[Path]:
    """The files below a folder with one of these endings, ordered by path; hidden files and folders are passed over."""
    found = (p for p in folder.rglob("*") if p.suffix in suffixes and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def read_documents(path: str | Path, *, text_field: str = "text") -> Iterator[Document]:
    """The documents of one file.

    A .jsonl file has one per line, in the named field; blank lines are none. In a .txt file an empty line
    (or one of white space) ends a document.

    Args:
        path: the file, in UTF-8; a byte order mark at its start is dropped.
        text_field: field of the .jsonl objects which holds the text.

    Raises:
        DataError: the file cannot be opened; or, with file and line, bytes are not UTF-8, a line is no
            JSON object, the field is missing or not a string, or a document is larger than 256 MiB.
    """
    path = Path(path)
    is_jsonl = path.suffix == ".jsonl"
    kept: list[str] = []
    first_line, num_bytes = 1, 0
    for line, (raw_bytes, text) in enumerate(_read_lines(path), start=1):
        blank = not text or text.isspace()
        num_bytes += raw_bytes
        if not blank:
            first_line = first_line if kept else line
            kept.append(text)
        if is_jsonl and not blank:
            kept = [_parse(text, text_field=text_field, place=f"{path}:{line}")]
        elif num_bytes > MAX_DOCUMENT_BYTES and kept:
            raise DataError(
                f"{path}:{first_line}: a document is larger than {MAX_DOCUMENT_BYTES >> 20} MiB; in .txt "
                "files an empty line separates documents"
            )
        if kept and (is_jsonl or blank):
            yield Document(text="".join(kept), path=path, line=first_line, num_bytes=num_bytes)
            kept, num_bytes = [], 0
    if kept:
        yield Document(text="".join(kept), path=path, line=first_line, num_bytes=num_bytes)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(bytes, text) of every line; only a line feed ends one, whatever else Unicode counts as a line end."""
    offset = line = 0
    try:
        opened = open(path, "rb")
    except OSError as error:
        raise DataError(f"input {path} cannot be read ({error.strerror})") from error
    with opened as file:
        while raw := file.readline(MAX_DOCUMENT_BYTES + 1):
            line += 1
            if len(raw) > MAX_DOCUMENT_BYTES:
                raise DataError(f"{path}:{line}: a line is larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
            body = raw.removeprefix(codecs.BOM_UTF8) if offset == 0 else raw
            try:
                text = body.decode("utf-8")
            except UnicodeDecodeError as error:
                at = offset + len(raw) - len(body) + error.start
                raise DataError(
                    f"{path}:{line}: byte {at} of the file (0x{body[error.start]:02x}) is not UTF-8: "
                    "convert the file to UTF-8 first"
                ) from error
            yield len(raw), text
            offset += len(raw)


def _parse(line: str, *, text_field: str, place: str) -> str:
    """The text field of one line of a .jsonl file."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a line of JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object with the field {text_field!r}")
    if not isinstance(value.get(text_field), str):
        found = ", ".join(value) or "none"
        raise DataError(f"{place}: no string in the field {text_field!r}; fields here: {found[:200]}")
    return value[text_field]


def read_texts(
    inputs: Iterable[str | Path], *, text_field: str = "text", max_bytes: int | None = None
) -> Iterator[str]:
    """Texts of all documents, or an even sample of them, to train a tokenizer on.

    Args:
        inputs: as for ``list_inputs``.
        text_field: as for ``read_documents``.
        max_bytes: bytes of input to sample down to, about; the same documents every time. None: all.

    Raises:
        DataError: as ``list_inputs`` and ``read_documents``.
    """
    files = list_inputs(inputs)
    total = sum(file.stat().st_size for file in files)
    share = 1.0 if max_bytes is None else max_bytes / max(total, 1)
    number = 0
    for file in files:
        for document in read_documents(file, text_field=text_field):
            digest = hashlib.sha256(number.to_bytes(8, "little")).digest()
            number += 1
            if int.from_bytes(digest[:6], "little") / (1 << 48) < share:
                yield document.text
