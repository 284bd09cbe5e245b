"""Compressed and Parquet files: the same documents, and every kind of damage told apart."""

import builtins
import bz2
import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from deberta_dist.corpus.documents import ReadOptions
from deberta_dist.corpus.inputs import Piece, list_inputs
from deberta_dist.corpus.reading import cut, read_documents
from deberta_dist.errors import DataError
from tests.corpus.test_reading import in_pieces, read, texts

PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress}
TEXT = b"\xef\xbb\xbf" + b"".join(b"document %d\nof two lines\n\n" % i for i in range(3000))


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x55]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("kind", PACK)
def test_compressed_text_is_the_same_text(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    pack, half = PACK[kind], len(TEXT) // 2
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" if kind == "zst" else b""
    for name, data in (("one", pack(TEXT)), ("two", skippable + pack(TEXT[:half]) + pack(TEXT[half:]) + skippable)):
        path = tmp_path / f"{name}.txt.{kind}"
        path.write_bytes(data)
        plain, packed = read(tmp_path / "a.txt"), read(path)
        assert [(d.text, d.offset, d.num_bytes) for d in packed] == [(d.text, d.offset, d.num_bytes) for d in plain]
        assert cut(list_inputs([path])[0], piece_bytes=100) == [Piece(start=0, stop=len(data))]
    (tmp_path / f"a.jsonl.{kind}").write_bytes(pack(b'{"text": "one"}\n{"text": 2}'))
    with pytest.raises(DataError, match=rf"a.jsonl.{kind}:2: no string"):
        read(tmp_path / f"a.jsonl.{kind}")
    for nothing in (b"", pack(b"")):
        (tmp_path / f"a.jsonl.{kind}").write_bytes(nothing)
        assert read(tmp_path / f"a.jsonl.{kind}") == []


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-5], "is cut short: its {kind} data ends after"),
        (lambda data: data[:3], "is cut short: its {kind} data ends after 0 bytes"),
        (flipped, "(has damaged {kind} data|is cut short: its {kind} data ends) after"),
        (lambda data: data + b"something else", "has damaged {kind} data after"),
        (lambda data: b"plain text\n" * 99, "has damaged {kind} data after 0 bytes"),
    ],
)
def test_damaged_archives_are_told(
    tmp_path: Path, kind: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / f"a.txt.{kind}"
    # zstandard writes no checksum unless asked to.
    pack = zstandard.ZstdCompressor(write_checksum=True).compress if kind == "zst" else PACK[kind]
    path.write_bytes(damage(pack(TEXT)))
    with pytest.raises(DataError, match=re.escape(str(path)) + " " + message.format(kind=kind)) as raised:
        texts(path, options=ReadOptions(invalid_utf8="replace"))
    assert "\n" not in str(raised.value)


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=10)
    return path


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    expected = [f"text {i} \u20ac" for i in range(35)]
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    for kind in kinds:
        path = parquet(tmp_path / "a.parquet", id=list(range(35)), text=pyarrow.array(expected).cast(kind))
        assert texts(path) == expected
    file = list_inputs([path])[0]
    pieces = cut(file, piece_bytes=1)
    assert pieces == [Piece(start=i, stop=i + 1) for i in range(4)]
    documents = in_pieces(file, pieces, options=ReadOptions())
    assert [(d.text, d.offset) for d in documents] == [(text, i) for i, text in enumerate(expected)]
    assert documents[17].where == f"{path}: row 17" and documents[17].num_bytes == len(expected[17].encode())
    assert cut(file, piece_bytes=10**9) == [Piece(start=0, stop=4)]
    assert read(parquet(tmp_path / "b.parquet", text=pyarrow.array([], pyarrow.string()))) == []


def test_bad_rows_and_damaged_parquet_files(tmp_path: Path) -> None:
    values = pyarrow.array([b"fine", None, b"caf\xe9", b"x" * 99, b""]).view(pyarrow.string())
    path = parquet(tmp_path / "a.parquet", text=values)
    for options, message in (
        (ReadOptions(), "row 1 has no value in column 'text'"),
        (ReadOptions(bad_records="drop"), r"row 2: byte 3 of the value \(0xe9\) is not UTF-8"),
        (ReadOptions(text_field="body"), "has no column 'body'; its columns: text: give --text-field"),
    ):
        with pytest.raises(DataError, match=message):
            read(path, options=options)
    options = ReadOptions(bad_records="drop", invalid_utf8="drop", max_document_bytes=50)
    assert [d.fault for d in read(path, options=options)] == [None, "bad_record", "dropped_utf8", "too_long", None]
    with pytest.raises(DataError, match="column 'text' holds int64, expected text"):
        read(parquet(tmp_path / "b.parquet", text=[1]))
    for damaged in (path.read_bytes()[:-5], b"", path.read_bytes()[:4] + bytes(60) + path.read_bytes()[64:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="a.parquet is no Parquet file, or is damaged or cut short"):
            read(path)


@pytest.mark.parametrize(("module", "suffix"), [("pyarrow", "parquet"), ("zstandard", "txt.zst")])
def test_a_missing_package_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, suffix: str
) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"x")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith(module):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=rf"a.{suffix} needs the package {module}: pip install {module} \(extra"):
        list(read_documents(list_inputs([tmp_path / f"a.{suffix}"])[0], options=ReadOptions()))
