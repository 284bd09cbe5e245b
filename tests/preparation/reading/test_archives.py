"""Compressed and Parquet files: the same documents, and every kind of damage told apart."""

import builtins
import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from deberta_dist.errors import DataError
from deberta_dist.preparation.reading import streams
from deberta_dist.preparation.reading.documents import TextReadOptions
from deberta_dist.preparation.reading.inputs import FileRange, list_inputs
from deberta_dist.preparation.reading.texts import cut, read_documents
from tests.preparation.reading.test_reading import in_ranges, read, texts

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
TEXT = b"\xef\xbb\xbf" + b"".join(b"document %d\nof two lines\n\n" % i for i in range(3000))


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x55]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("kind", PACK)
def test_compressed_text_is_the_same_text(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    pack, half = PACK[kind], len(TEXT) // 2
    skippable = {"zst": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", "xz": bytes(8)}.get(kind, b"")
    for name, data in (("one", pack(TEXT)), ("two", skippable + pack(TEXT[:half]) + skippable + pack(TEXT[half:]) + skippable)):
        path = tmp_path / f"{name}.txt.{kind}"
        path.write_bytes(data)
        plain, packed = read(tmp_path / "a.txt"), read(path)
        assert [(d.text, d.offset, d.num_bytes) for d in packed] == [(d.text, d.offset, d.num_bytes) for d in plain]
        assert cut(list_inputs([path])[0], range_bytes=100) == [FileRange(start=0, stop=len(data))]
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
def test_damaged_archives_are_told(tmp_path: Path, kind: str, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / f"a.txt.{kind}"
    # zstandard writes no checksum unless asked to.
    pack = zstandard.ZstdCompressor(write_checksum=True).compress if kind == "zst" else PACK[kind]
    path.write_bytes(damage(pack(TEXT)))
    with pytest.raises(DataError, match=re.escape(str(path)) + " " + message.format(kind=kind)) as raised:
        texts(path, options=TextReadOptions(invalid_utf8="replace"))
    assert "\n" not in str(raised.value)


def zstd(data: bytes, *, window_log: int) -> bytes:
    """As ``zstd --long`` packs a stream: the header asks for the window, whatever the size of the text."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, compression_level=1)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_windows_of_every_size_that_zstd_has_are_read(tmp_path: Path, window_log: int) -> None:
    path = tmp_path / "dump.jsonl.zst"
    path.write_bytes(zstd(b'{"text": "one"}\n', window_log=window_log) + zstd(b'{"text": "two"}\n', window_log=20))
    assert texts(path) == ["one", "two"]


def test_archives_that_are_sound_and_too_large_say_how_to_repack_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The byte behind the magic and the flags is the window: 2**(10 + 22) bytes, which nothing here writes.
    packed = zstd(b"x", window_log=31)
    assert packed[4:6] == b"\x00\xa8"
    (tmp_path / "a.txt.zst").write_bytes(packed[:5] + b"\xb0" + packed[6:])
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(TEXT, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26}]))
    for name in ("a.txt.zst", "b.txt.xz"):
        if name.endswith("xz"):
            monkeypatch.setattr(streams, "MAX_WINDOW_BYTES", 1 << 20)
        with pytest.raises(DataError, match=rf"{name} takes more than 2 GiB of memory to unpack, .*pack it again .*--long=27"):
            texts(tmp_path / name)
    trained = zstandard.train_dictionary(1 << 12, [f"text {i} of many".encode() * 9 for i in range(300)])
    (tmp_path / "c.txt.zst").write_bytes(zstandard.ZstdCompressor(dict_data=trained).compress(TEXT))
    with pytest.raises(DataError, match=r"c.txt.zst was compressed with a dictionary: decompress it first"):
        texts(tmp_path / "c.txt.zst")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"<!DOCTYPE html>\n<p>Log in", "an HTML page"), (b"Entry not found", "a server's answer")],
)
def test_a_page_in_place_of_a_file_is_told(tmp_path: Path, content: bytes, kind: str, compressed: bool) -> None:
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} is {kind}.* saved in place of the file.*: download it again"):
        texts(path, options=TextReadOptions(bad_records="drop"))
    (tmp_path / "a.txt").write_bytes(content)
    assert texts(tmp_path / "a.txt") == [content.decode()]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.xz"])
def test_an_archive_without_its_ending_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(TEXT))
    with pytest.raises(DataError, match=rf"{name} begins like gzip data, expected (text|xz data) by its name"):
        texts(tmp_path / name, options=TextReadOptions(invalid_utf8="replace", bad_records="drop"))
    for text in ("PAR1 and more", "BZh is text", "GGUF"):
        (tmp_path / "b.txt").write_text(text)
        assert texts(tmp_path / "b.txt") == [text]


def tar(content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("inside.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar(TEXT), "begins like a tar archive, expected text: decompress it first"),
        (gzip.compress(TEXT, mtime=0), "begins like gzip data, expected text: decompress it first"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_packed_is_text_and_no_other_archive(tmp_path: Path, kind: str, content: bytes, message: str) -> None:
    path = tmp_path / f"a.txt.{kind}"
    path.write_bytes(PACK[kind](content))
    with pytest.raises(DataError, match=f"what {path} was packed from {message}"):
        texts(path, options=TextReadOptions(invalid_utf8="replace", bad_records="drop"))


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
    ranges = cut(file, range_bytes=1)
    assert ranges == [FileRange(start=i, stop=i + 1) for i in range(4)]
    documents = in_ranges(file, ranges, options=TextReadOptions())
    assert [(d.text, d.offset) for d in documents] == [(text, i) for i, text in enumerate(expected)]
    assert documents[17].where == f"{path}: row 17" and documents[17].num_bytes == len(expected[17].encode())
    assert cut(file, range_bytes=10**9) == [FileRange(start=0, stop=4)]
    assert read(parquet(tmp_path / "b.parquet", text=pyarrow.array([], pyarrow.string()))) == []


def test_text_in_struct_columns(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "of": {"kind": "a"}} if i % 4 else None for i in range(30)]
    table = {"doc": rows, "doc.id": [str(i) for i in range(30)], "text": ["other"] * 30}
    path = parquet(tmp_path / "a.parquet", **table)
    found = read(path, options=TextReadOptions(text_field="doc.text", bad_records="drop"))
    assert [d.text for d in found] == [row["text"] if row else "" for row in rows]
    assert {d.fault for d in found[::4]} == {"bad_record"}
    file = list_inputs([path])[0]
    ranges = cut(file, range_bytes=1)
    assert len(ranges) == 3
    assert in_ranges(file, ranges, options=TextReadOptions(text_field="doc.text", bad_records="drop")) == found
    assert texts(path, options=TextReadOptions(text_field="doc.of.kind", bad_records="drop"))[:5] == ["", "a", "a", "a", ""]
    # A column whose name has the dot comes first, beside a struct of that name.
    assert texts(path, options=TextReadOptions(text_field="doc.id")) == table["doc.id"]
    for field, message in (
        ("doc.body", "has no column 'doc.body'; its columns: doc.text, doc.of.kind, doc.id, text: give"),
        ("text.doc", "has no column 'text.doc'"),
        ("doc", "column 'doc' holds struct<"),
        ("doc.of", "column 'doc.of' holds struct<"),
    ):
        with pytest.raises(DataError, match=message):
            read(path, options=TextReadOptions(text_field=field))


def test_bad_rows_and_damaged_parquet_files(tmp_path: Path) -> None:
    values = pyarrow.array([b"fine", None, b"caf\xe9", b"x" * 99, b""]).view(pyarrow.string())
    path = parquet(tmp_path / "a.parquet", text=values)
    for options, message in (
        (TextReadOptions(), "row 1 has no value in column 'text'"),
        (TextReadOptions(bad_records="drop"), r"row 2: byte 3 of the value \(0xe9\) is not UTF-8"),
        (TextReadOptions(text_field="body"), "has no column 'body'; its columns: text: give --text-field"),
    ):
        with pytest.raises(DataError, match=message):
            read(path, options=options)
    options = TextReadOptions(bad_records="drop", invalid_utf8="drop", max_document_bytes=50)
    assert [d.fault for d in read(path, options=options)] == [None, "bad_record", "dropped_utf8", "too_long", None]
    with pytest.raises(DataError, match="column 'text' holds int64, expected text"):
        read(parquet(tmp_path / "b.parquet", text=[1]))
    for damaged in (path.read_bytes()[:-5], b"", path.read_bytes()[:4] + bytes(60) + path.read_bytes()[64:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="a.parquet is not a Parquet file, or is damaged or cut short"):
            read(path)


@pytest.mark.parametrize(("module", "suffix"), [("pyarrow", "parquet"), ("zstandard", "txt.zst")])
def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"x")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith(module):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=rf"a.{suffix} needs the package {module}: pip install {module} \(extra"):
        list(read_documents(list_inputs([tmp_path / f"a.{suffix}"])[0], options=TextReadOptions()))
