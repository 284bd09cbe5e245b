"""Reads every string of a benchmark's files, in all common formats; a file that cannot be read is an error, never skipped.

Called by ``contamination``, which looks for these texts in documents.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deberta_dist.errors import DataError
from deberta_dist.files.strict_json import json_integer
from deberta_dist.preparation.reading.finding import entries_below, is_hidden, require_regular
from deberta_dist.preparation.reading.inputs import PARQUET, RECORDS, TEXT, InputFile, PassedOver, input_file, split_name
from deberta_dist.preparation.reading.parquet import read_columns
from deberta_dist.preparation.reading.streams import open_input, text_chunks

ENDINGS = (".json", ".jsonl", ".ndjson", ".tsv", ".csv", ".txt", ".parquet")
_JSON = (".json", ".jsonl", ".ndjson")
_READABLE = f"{', '.join(ENDINGS[:-1])} (all also with .gz, .zst, .bz2 or .xz) and {ENDINGS[-1]}"
# What lies beside data and is none of it.
_BESIDE = re.compile(
    r"(readme|licen[cs]e|copying|notice|sources?|citation|authors|changelog).*|.*\.(md|rst|py|sh|cff|bib)", re.I
)
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_MAX_COLUMNS = 12
_SPACE = re.compile(r"[ \t\n\r]*")


class Derived(str):
    """A string that is a text where it is as long as one: a key, as in {"a question": "its answer"}; a list of tokens."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkFile:
    """A file of a benchmark.

    Attributes:
        file: the file with its compression.
        ending: one of ``ENDINGS``.
    """

    file: InputFile
    ending: str


def list_benchmark(paths: Iterable[str | Path]) -> tuple[list[BenchmarkFile], PassedOver]:
    """The files of a benchmark, in order, and what lies beside them.

    Args:
        paths: files, and folders, which stand for every file below them.

    Returns:
        The files; and what is hidden or documentation.

    Raises:
        DataError: a path is missing; a file below it has none of ``ENDINGS`` and is no documentation; a folder has no
            file; or as ``find_inputs`` for files and folders that cannot be read.
    """
    files: list[BenchmarkFile] = []
    beside: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = list(entries_below(path))
            found = [entry for entry in below if not _is_beside(entry)]
            beside += [entry for entry in below if _is_beside(entry)]
            if not found:
                raise DataError(f"benchmark {path} has no {', '.join(ENDINGS)} files below it")
            files += map(_benchmark_file, sorted(found))
        elif not path.exists() and not path.is_symlink():
            raise DataError(f"benchmark {path} does not exist")
        else:
            files.append(_benchmark_file(path))
    return files, PassedOver.of(beside)


def texts_of(one: BenchmarkFile) -> Iterator[str]:
    """Every text of a file.

    Of JSON and Parquet files every string at any depth, and the strings of a list together, which may be tokens; of .csv
    files every cell, of .tsv files every line, of .txt files every block between blank lines, and of both, where there is
    a token a line, the tokens. Text files that hold JSON are read as it.

    Yields:
        Them; ``Derived`` for keys, and for what was put together.

    Raises:
        DataError: it cannot be read, is damaged, not UTF-8 or not JSON.
    """
    with open_input(one.file) as handle:
        if one.file.kind == PARQUET:
            for rows in read_columns(one.file, handle):
                yield from _strings(rows)
            return
        lines = _lines(one.file, text_chunks(one.file, handle))
        if one.ending in (".jsonl", ".ndjson"):
            for number, line in enumerate(lines, start=1):
                yield from _json_strings(line, where=f"{one.file.path}:{number}")
        elif one.ending == ".json":
            yield from _json_strings("".join(lines), where=str(one.file.path))
        elif one.ending == ".csv":
            yield from _cells(lines, where=one.file.path)
        elif one.ending == ".tsv":
            text = "".join(lines)
            yield from text.split("\n")
            yield from _tokens(text)
        else:
            yield from _blocks("".join(lines))


def _is_beside(path: Path) -> bool:
    return is_hidden(path) or (split_name(path)[0] not in ENDINGS and _BESIDE.fullmatch(path.name) is not None)


def _benchmark_file(path: Path) -> BenchmarkFile:
    require_regular(path)
    ending, compression = split_name(path)
    if ending not in ENDINGS or (ending == ".parquet" and compression):
        raise DataError(
            f"benchmark {path} is not of a kind that is searched for texts ({_READABLE}): unpack or convert it, or name the "
            "files to use one by one"
        )
    kind = PARQUET if ending == ".parquet" else RECORDS if ending in _JSON else TEXT
    return BenchmarkFile(file=input_file(path, kind=kind, compression=compression), ending=ending)


def _lines(file: InputFile, chunks: Iterator[bytes]) -> Iterator[str]:
    """Lines with their ends; only a line feed ends a line, whatever else Unicode counts as a line end."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest = ""
    try:
        for chunk in (*chunks, b""):
            *lines, rest = (rest + decoder.decode(chunk, final=not chunk)).split("\n")
            yield from (f"{line}\n" for line in lines)
    except UnicodeDecodeError as error:
        raise DataError(f"benchmark {file.path} is not UTF-8 ({error.reason}): convert it first") from error
    if rest:
        yield rest


def _blocks(text: str) -> Iterator[str]:
    if text.lstrip()[:1] in ("{", "["):
        try:
            yield from _json_strings(text, where="")
            return
        except DataError:
            pass  # a text that begins with a bracket
    yield from _BLANK_LINE.split(text)
    yield from _tokens(text)


def _tokens(text: str) -> Iterator[str]:
    """The columns of blocks with a token and its tags a line, as CoNLL's data have them, each column as a text."""
    for block in _BLANK_LINE.split(text):
        rows = [line.split() for line in block.split("\n") if line.strip()]
        if len(rows) > 2 and 1 < len(rows[0]) <= _MAX_COLUMNS and len({len(row) for row in rows}) == 1:
            yield from (Derived(" ".join(column)) for column in zip(*rows, strict=True))


def _cells(lines: Iterable[str], *, where: Path) -> Iterator[str]:
    before = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines)
    try:
        for row in reader:
            yield from row
    except csv.Error as error:
        raise DataError(f"benchmark {where}:{reader.line_num} is not CSV ({error})") from error
    finally:
        csv.field_size_limit(before)


def _json_strings(text: str, *, where: str) -> Iterator[str]:
    """Every string in JSON values one after another, in the order of the text."""
    # A key that is there twice has two values.
    decoder = json.JSONDecoder(object_pairs_hook=_all_pairs, parse_int=json_integer)
    at = _after_space(text, 0)
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"benchmark {where} is not JSON ({error})") from error
        yield from _strings(value)
        at = _after_space(text, at)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "no space matches as well"
    return found.end()


def _all_pairs(pairs: list[tuple[str, Any]]) -> tuple[Any, ...]:
    return tuple(part for key, value in pairs for part in (Derived(key), value))


def _strings(value: Any) -> Iterator[str]:
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, bytes):
            value = _decoded(value)
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            rest += reversed(value.values())
        elif isinstance(value, (list, tuple)):
            if isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) for one in value):
                yield Derived(" ".join(value))
            rest += reversed(value)


def _decoded(value: bytes) -> str | None:
    """Text of a column of bytes; None for pictures and sounds."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None
