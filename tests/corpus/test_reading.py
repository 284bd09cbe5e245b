"""Documents of every kind of file: what they are, where pieces part, and what happens to bad ones."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from deberta_dist.corpus import splitting, streams
from deberta_dist.corpus.documents import Document, ReadOptions
from deberta_dist.corpus.inputs import InputFile, Piece, list_inputs
from deberta_dist.corpus.reading import cut, read_documents
from deberta_dist.errors import ConfigError, DataError

SPACES = [b"\n", b"\n\n", b"\r\n", b" ", b"\t", b"\xc2\xa0", b"\xe3\x80\x80", b"\x0c"]
NASTY = [*SPACES, b"a", b"bb", b"\xe2\x82\xac", b"xyz"]
MARK = b"\xef\xbb\xbf"


def read(path: Path, *, options: ReadOptions | None = None) -> list[Document]:
    return list(read_documents(list_inputs([path])[0], options=options or ReadOptions()))


def texts(path: Path, *, options: ReadOptions | None = None) -> list[str]:
    return [document.text for document in read(path, options=options)]


def in_pieces(file: InputFile, pieces: Sequence[Piece], *, options: ReadOptions) -> list[Document]:
    return [document for piece in pieces for document in read_documents(file, options=options, piece=piece)]


def expected(data: bytes, *, unit: str, limit: int) -> list[str]:
    """The documents of a text by the words of the definition, line by line."""
    found, block = [], b""
    for line in [*data.removeprefix(MARK).split(b"\n"), b""]:
        if line and not line.decode().isspace():
            if unit == "line":
                found.append(line)
            block += line + b"\n"
        elif block:
            if unit == "block":
                found.append(block[:-1])
            block = b""
    return ["" if len(text) > limit else text.decode().removesuffix("\r") for text in found]


@pytest.mark.parametrize("unit", ["line", "block"])
def test_pieces_together_are_the_file_wherever_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    draw = random.Random(1)
    path = tmp_path / "nasty.txt"
    for _ in range(60):
        data = draw.choice([MARK, b""]) + b"".join(draw.choices(NASTY, k=draw.randrange(1, 30)))
        path.write_bytes(data)
        file = list_inputs([path])[0]
        limit = draw.choice([3, 6, 1 << 20])
        options = ReadOptions(document=unit, bad_records="drop", max_document_bytes=limit)
        monkeypatch.setattr(streams, "CHUNK_BYTES", draw.choice([1, 2, 7, 1 << 20]))
        monkeypatch.setattr(splitting, "_LOOK_BYTES", draw.choice([1, 2, 1 << 16]))
        whole = list(read_documents(file, options=options))
        assert [document.text for document in whole] == expected(data, unit=unit, limit=limit), data
        for size in range(1, len(data) + 1):
            pieces = [Piece(start=a, stop=min(a + size, len(data))) for a in range(0, len(data), size)]
            again = in_pieces(file, pieces, options=options)
            assert [(d.text, d.offset, d.fault) for d in again] == [(d.text, d.offset, d.fault) for d in whole], data


def test_pieces_of_a_larger_file_and_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(5000)))
    file = list_inputs([path])[0]
    pieces = cut(file, piece_bytes=10_000)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == file.num_bytes and all(9000 < p.stop - p.start < 11_000 for p in pieces)
    documents = in_pieces(file, pieces, options=ReadOptions())
    assert [document.text for document in documents] == [f"document {i}" for i in range(5000)]
    whole = read(path)
    assert sum(document.num_bytes for document in whole) == file.num_bytes
    assert whole[1].where == f"{path}: byte {whole[0].num_bytes}"
    (tmp_path / "empty.txt").touch()
    assert cut(list_inputs([tmp_path / "empty.txt"])[0], piece_bytes=1) == [] and read(tmp_path / "empty.txt") == []


def test_what_a_document_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + b'{"text": "one"}\r\n{"text": ""}\n \n{"text": "th\\u2028ree"}')
    lines = ['{"text": "one"}', '{"text": ""}', '{"text": "th\\u2028ree"}']
    assert texts(path) == [f"{lines[0]}\r\n{lines[1]}", lines[2]]
    assert texts(path, options=ReadOptions(document="line")) == lines
    assert texts(path, options=ReadOptions(document="record")) == ["one", "", "th\u2028ree"]
    assert texts(path, options=ReadOptions(document="file")) == [path.read_bytes().decode("utf-8-sig")]
    file = list_inputs([path])[0]
    pieces = [Piece(start=0, stop=9), Piece(start=9, stop=file.num_bytes)]
    assert len(in_pieces(file, pieces, options=ReadOptions(document="file"))) == 1
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\xe2\x80\xa8four\x0cfive\n")
    documents = read(path)
    assert [document.text for document in documents] == ["one\r\ntwo", "three\u2028four\x0cfive"]
    assert sum(document.num_bytes for document in documents) == path.stat().st_size


@pytest.mark.parametrize("option", ["document", "invalid_utf8", "bad_records"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} = 'x', expected one of .*error|block"):
        ReadOptions(**{option: "x"})
    with pytest.raises(ConfigError, match="max_document_bytes = 0"):
        ReadOptions(max_document_bytes=0)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    start = b'{"text": "fine"}\n\n'
    path = tmp_path / name
    path.write_bytes(start + b'{"text": "caf\xe9"}\n\n{"text": "fine"}')
    with pytest.raises(DataError, match=rf"{name}:3: byte {len(start) + 13} of the file \(0xe9\) is not UTF-8"):
        read(path)
    faults = [(d.text[-4:], d.fault) for d in read(path, options=ReadOptions(document="record", invalid_utf8="drop"))]
    assert faults == [("fine", None), ("", "dropped_utf8"), ("fine", None)]
    replaced = read(path, options=ReadOptions(document="record", invalid_utf8="replace"))[1]
    assert (replaced.text, replaced.fault, replaced.is_dropped) == ("caf\ufffd", "replaced_utf8", False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a.jsonl:2: not a line of JSON"),
        ("[" * 100_000, r"a.jsonl:2: not a line of JSON"),
        ('["text"]', r"a.jsonl:2: expected a JSON object"),
        ('{"body": "x", "id": 3}', r"a.jsonl:2: no string in the field 'text'; fields here: body, id"),
        ('{"text": null}', r"a.jsonl:2: no string in the field 'text'"),
    ],
)
def test_lines_that_are_no_records_are_located_or_left_out(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + '\n\n{"text": "", "body": "x"}\n')
    with pytest.raises(DataError, match=message):
        read(path)
    faults = [document.fault for document in read(path, options=ReadOptions(bad_records="drop"))]
    assert faults == [None, "bad_record", None]


def test_documents_too_long_are_named_or_left_out_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK_BYTES", 100)
    (tmp_path / "a.txt").write_text("\n\nshort line\n" * 30 + "no empty line\n" * 100 + "\nlast")
    (tmp_path / "b.jsonl").write_text("\n" + "x" * 1001 + '\n{"text": "last"}')
    for name, message in (("a.txt", r":90: a document is larger .* empty line"), ("b.jsonl", ":2: a line is larger")):
        with pytest.raises(DataError, match=name + message):
            read(tmp_path / name, options=ReadOptions(max_document_bytes=1000))
        documents = read(tmp_path / name, options=ReadOptions(max_document_bytes=1000, bad_records="drop"))
        assert [d.fault for d in documents[-2:]] == ["too_long", None] and documents[-1].text == "last"

    seen = 0

    def endless() -> object:
        nonlocal seen
        while True:
            seen += 100
            yield b"x" * 100

    def refuse(start: int) -> None:
        raise DataError(f"too long at {start}")

    with pytest.raises(DataError, match="too long at 0"):
        list(splitting.regions(endless(), offset=0, limit=1000, refuse=refuse))
    assert seen == 1100


def test_a_file_that_changes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    file = list_inputs([path])[0]
    reader = read_documents(file, options=ReadOptions())
    assert next(reader).text == "one"
    with open(path, "a") as more:
        more.write("!")
    with pytest.raises(DataError, match="a.txt changed while it was read"):
        list(reader)
    with pytest.raises(DataError, match="a.txt changed while it was read"):
        list(read_documents(file, options=ReadOptions()))
    # A change explains what else is wrong.
    monkeypatch.setattr(streams, "CHUNK_BYTES", 5)
    reader = read_documents(list_inputs([path])[0], options=ReadOptions())
    assert next(reader).text == "one"
    path.write_bytes(b"one\n\n\xff")
    with pytest.raises(DataError, match="changed"):
        list(reader)
    path.unlink()
    with pytest.raises(DataError, match="a.txt cannot be read"):
        list(read_documents(file, options=ReadOptions()))
