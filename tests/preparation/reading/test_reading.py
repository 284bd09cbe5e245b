"""Documents of every kind of file: what they are, where file ranges meet, and what happens to bad ones."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.reading import splitting, streams
from deberta_dist.preparation.reading.documents import Document, TextReadOptions
from deberta_dist.preparation.reading.inputs import FileRange, InputFile, list_inputs
from deberta_dist.preparation.reading.texts import cut, read_documents

SPACES = [b"\n", b"\n\n", b"\r\n", b" ", b"\t", b"\xc2\xa0", b"\xe3\x80\x80", b"\x0c"]
NASTY = [*SPACES, b"a", b"bb", b"\xe2\x82\xac", b"xyz"]
MARK = b"\xef\xbb\xbf"


def read(path: Path, *, options: TextReadOptions | None = None) -> list[Document]:
    return list(read_documents(list_inputs([path])[0], options=options or TextReadOptions()))


def texts(path: Path, *, options: TextReadOptions | None = None) -> list[str]:
    return [document.text for document in read(path, options=options)]


def in_ranges(file: InputFile, ranges: Sequence[FileRange], *, options: TextReadOptions) -> list[Document]:
    return [document for file_range in ranges for document in read_documents(file, options=options, file_range=file_range)]


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
def test_pieces_together_are_the_file_wherever_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    draw = random.Random(1)
    path = tmp_path / "nasty.txt"
    for _ in range(60):
        data = draw.choice([MARK, b""]) + b"".join(draw.choices(NASTY, k=draw.randrange(1, 30)))
        path.write_bytes(data)
        file = list_inputs([path])[0]
        limit = draw.choice([3, 6, 1 << 20])
        options = TextReadOptions(document=unit, bad_records="drop", max_document_bytes=limit)
        monkeypatch.setattr(streams, "CHUNK_BYTES", draw.choice([1, 2, 7, 1 << 20]))
        monkeypatch.setattr(splitting, "_LOOK_BYTES", draw.choice([1, 2, 1 << 16]))
        whole = list(read_documents(file, options=options))
        assert [document.text for document in whole] == expected(data, unit=unit, limit=limit), data
        for size in range(1, len(data) + 1):
            ranges = [FileRange(start=a, stop=min(a + size, len(data))) for a in range(0, len(data), size)]
            again = in_ranges(file, ranges, options=options)
            assert [(d.text, d.offset, d.fault) for d in again] == [(d.text, d.offset, d.fault) for d in whole], data


def test_pieces_of_a_larger_file_and_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(5000)))
    file = list_inputs([path])[0]
    ranges = cut(file, range_bytes=10_000)
    assert [file_range.start for file_range in ranges] == [0, *(file_range.stop for file_range in ranges[:-1])]
    assert ranges[-1].stop == file.num_bytes and all(9000 < p.stop - p.start < 11_000 for p in ranges)
    documents = in_ranges(file, ranges, options=TextReadOptions())
    assert [document.text for document in documents] == [f"document {i}" for i in range(5000)]
    whole = read(path)
    assert sum(document.num_bytes for document in whole) == file.num_bytes
    assert whole[1].where == f"{path}: byte {whole[0].num_bytes}"
    (tmp_path / "empty.txt").touch()
    assert cut(list_inputs([tmp_path / "empty.txt"])[0], range_bytes=1) == [] and read(tmp_path / "empty.txt") == []


def test_what_a_document_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + b'{"text": "one"}\r\n{"text": ""}\n \n{"text": "th\\u2028ree"}')
    lines = ['{"text": "one"}', '{"text": ""}', '{"text": "th\\u2028ree"}']
    assert texts(path) == [f"{lines[0]}\r\n{lines[1]}", lines[2]]
    assert texts(path, options=TextReadOptions(document="line")) == lines
    assert texts(path, options=TextReadOptions(document="record")) == ["one", "", "th\u2028ree"]
    assert texts(path, options=TextReadOptions(document="file")) == [path.read_bytes().decode("utf-8-sig")]
    file = list_inputs([path])[0]
    ranges = [FileRange(start=0, stop=9), FileRange(start=9, stop=file.num_bytes)]
    assert len(in_ranges(file, ranges, options=TextReadOptions(document="file"))) == 1
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\xe2\x80\xa8four\x0cfive\n")
    documents = read(path)
    assert [document.text for document in documents] == ["one\r\ntwo", "three\u2028four\x0cfive"]
    assert sum(document.num_bytes for document in documents) == path.stat().st_size


@pytest.mark.parametrize("option", ["document", "invalid_utf8", "bad_records"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} = 'x', expected one of .*error|block"):
        TextReadOptions(**{option: "x"})
    with pytest.raises(ConfigError, match="max_document_bytes = 0"):
        TextReadOptions(max_document_bytes=0)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    start = b'{"text": "fine"}\n\n'
    path = tmp_path / name
    path.write_bytes(start + b'{"text": "caf\xe9"}\n\n{"text": "fine"}')
    with pytest.raises(DataError, match=rf"{name}:3: byte {len(start) + 13} of the file \(0xe9\) is not UTF-8"):
        read(path)
    faults = [(d.text[-4:], d.fault) for d in read(path, options=TextReadOptions(document="record", invalid_utf8="drop"))]
    assert faults == [("fine", None), ("", "dropped_utf8"), ("fine", None)]
    replaced = read(path, options=TextReadOptions(document="record", invalid_utf8="replace"))[1]
    assert (replaced.text, replaced.fault, replaced.is_dropped) == ("caf\ufffd", "replaced_utf8", False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a.jsonl:2: not a line of JSON"),
        ("[" * 100_000, r"a.jsonl:2: not a line of JSON \(nested too deeply\)"),
        ('{"text": "one", "text": "two"}', r"a.jsonl:2: the field 'text' is there twice"),
        ('\ufeff{"text": "x"}', r"a.jsonl:2: not a line of JSON \(Unexpected UTF-8 BOM"),
        ('["text"]', r"a.jsonl:2: expected a JSON object"),
        ('{"body": "x", "id": 3}', r"a.jsonl:2: no string in the field 'text'; fields here: body, id"),
        (f'{{"text": {"9" * 5000}}}', r"a.jsonl:2: no string in the field 'text'"),
        ('{"text": null}', r"a.jsonl:2: no string in the field 'text'"),
    ],
)
def test_lines_that_are_no_records_are_located_or_left_out(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + '\n\n{"text": "", "body": "x"}\n')
    with pytest.raises(DataError, match=message):
        read(path)
    faults = [document.fault for document in read(path, options=TextReadOptions(bad_records="drop"))]
    assert faults == [None, "bad_record", None]


def test_what_stands_beside_the_text_does_not_matter(tmp_path: Path) -> None:
    odd = ("9" * 5000, "-" + "9" * 5000, "1e999", "NaN", '"\\ud800"', '{"a": 1, "a": 2}', "[" * 500 + "]" * 500)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"odd": {value}, "text": "{i}"}}\n' for i, value in enumerate(odd)))
    assert texts(tmp_path / "a.jsonl") == [str(i) for i in range(len(odd))]
    twice = '{"meta": {"text": "x", "text": "y"}, "text": "one"}\n{"note": "\\"text\\": twice", "text": "two"}\n'
    (tmp_path / "b.jsonl").write_text(twice)
    assert texts(tmp_path / "b.jsonl") == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "field", "expected"),
    [
        ('{"doc": {"text": "in"}, "text": "out"}', "doc.text", "in"),
        ('{"doc": {"text": "in"}, "doc.text": "whole"}', "doc.text", "whole"),
        ('{"a": {"b.c": {"d": "deep"}}}', "a.b.c.d", "deep"),
        ('{"a": "x", "a.b": {"c": "long"}}', "a.b.c", "long"),
        ('{"doc": ["text"]}', "doc.text", "no string in the field 'doc.text'; fields here: doc"),
        ('{"doc": {"text": "a"}, "doc": {"text": "b"}}', "doc.text", "the field 'doc' is there twice"),
        ('{"doc": {"text": "a", "text": "b"}}', "doc.text", "the field 'text' is there twice"),
    ],
)
def test_fields_in_objects(tmp_path: Path, line: str, field: str, expected: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"{line}\n")
    if " " not in expected:
        assert texts(path, options=TextReadOptions(text_field=field)) == [expected]
    else:
        with pytest.raises(DataError, match=f"a.json:1: {expected}"):
            read(path, options=TextReadOptions(text_field=field))
    for field in ("", ".text", "doc."):
        with pytest.raises(ConfigError, match="text_field = "):
            TextReadOptions(text_field=field)


@pytest.mark.parametrize(
    "content",
    ['[{"text": "one"}, {"text": "two"}]', '[\n "one",\n "two"\n]', ' \n[ \n {"text": "x"}]', "[]", '{\n "text": "x"\n}'],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_json_that_is_one_value_is_refused_whatever_becomes_of_bad_records(tmp_path: Path, name: str, content: str) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    message = rf"{name} is one JSON (array|object over many lines), expected one object a line: jq -c"
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, options=TextReadOptions(bad_records="drop", max_document_bytes=10))


def articles(data: bytes, *, limit: int) -> list[tuple[str, str | None]]:
    """Articles and faults by the words of the definition, line by line."""
    found: list[list[bytes]] = []
    is_open = False
    for line in data.splitlines(keepends=True):
        if line.startswith(b"<doc ") or (not is_open and line.strip()):
            found.append([])
            is_open = True
        if is_open:
            found[-1].append(line)
        if line.startswith(b"</doc>"):
            is_open = False
    result: list[tuple[str, str | None]] = []
    for lines in found:
        is_whole = lines[0].startswith(b"<doc ") and lines[-1].startswith(b"</doc>") and len(lines) > 1
        text = b"".join(lines[1:-1]).decode().strip("\r\n").replace("&amp;", "&")
        if sum(map(len, lines)) > limit:
            result.append(("", "too_long"))
        else:
            result.append((text, None) if is_whole else ("", "bad_record"))
    return result


def test_articles_of_wikiextractor_wherever_the_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    lines = [
        b'<doc id="1" title="A > B">\n',
        b"</doc>\n",
        b"\n",
        b"x <doc y>\n",
        b"A &amp; \xe2\x82\xac\n",
        b"  \n",
        b"<docs>\n",
    ]
    path = tmp_path / "wiki_00"
    for _ in range(80):
        data = b"".join(draw.choices(lines, weights=[3, 3, 1, 1, 2, 1, 1], k=draw.randrange(1, 14)))
        data = data[: -draw.randrange(2) or None]
        path.write_bytes(data)
        file = list_inputs([path], format="wikiextractor")[0]
        limit = draw.choice([40, 1 << 20])
        options = TextReadOptions(format="wikiextractor", bad_records="drop", max_document_bytes=limit)
        monkeypatch.setattr(streams, "CHUNK_BYTES", draw.choice([1, 7, 1 << 20]))
        whole = list(read_documents(file, options=options))
        assert [(d.text, d.fault) for d in whole] == articles(data, limit=limit), data
        for size in range(1, len(data) + 1, 3):
            ranges = [FileRange(start=a, stop=min(a + size, len(data))) for a in range(0, len(data), size)]
            again = in_ranges(file, ranges, options=options)
            assert [(d.text, d.offset, d.fault) for d in again] == [(d.text, d.offset, d.fault) for d in whole], (data, size)


def test_a_file_that_is_not_of_wikiextractor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wiki_00"
    options = TextReadOptions(format="wikiextractor")

    def found() -> list[str]:
        return [d.text for d in read_documents(list_inputs([path], format="wikiextractor")[0], options=options)]

    path.write_text('<doc id="1">\nTitle\n\nWhere a &lt; b &amp;amp; c\n\n</doc>\n\n<doc id="2">\n</doc>')
    assert found() == ["Title\n\nWhere a < b &amp; c", ""]
    for content, message in (
        ('{"text": "of --json"}\n', r"wiki_00:1: text outside <doc .*not a file of WikiExtractor; --bad-records drop"),
        ('<doc id="1">\nx\n</doc>\nstray\n', r"wiki_00:4: text outside <doc"),
        ('<doc id="1">\nx\n', r"wiki_00:1: an article without </doc>: the file is cut short"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            found()


def test_documents_too_long_are_named_or_left_out_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_BYTES", 100)
    (tmp_path / "a.txt").write_text("\n\nshort line\n" * 30 + "no empty line\n" * 100 + "\nlast")
    (tmp_path / "b.jsonl").write_text("\n" + "x" * 1001 + '\n{"text": "last"}')
    for name, message in (("a.txt", r":90: a document is larger .* empty line"), ("b.jsonl", ":2: a line is larger")):
        with pytest.raises(DataError, match=name + message):
            read(tmp_path / name, options=TextReadOptions(max_document_bytes=1000))
        documents = read(tmp_path / name, options=TextReadOptions(max_document_bytes=1000, bad_records="drop"))
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
        list(splitting.line_runs(endless(), offset=0, limit=1000, refuse=refuse))
    assert seen == 1100


def test_a_file_that_changes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    file = list_inputs([path])[0]
    reader = read_documents(file, options=TextReadOptions())
    assert next(reader).text == "one"
    with open(path, "a") as more:
        more.write("!")
    with pytest.raises(DataError, match="a.txt changed while it was read"):
        list(reader)
    with pytest.raises(DataError, match="a.txt changed while it was read"):
        list(read_documents(file, options=TextReadOptions()))
    # A change explains what else is wrong.
    monkeypatch.setattr(streams, "CHUNK_BYTES", 5)
    reader = read_documents(list_inputs([path])[0], options=TextReadOptions())
    assert next(reader).text == "one"
    path.write_bytes(b"one\n\n\xff")
    with pytest.raises(DataError, match="changed"):
        list(reader)
    path.unlink()
    with pytest.raises(DataError, match="a.txt cannot be read"):
        list(read_documents(file, options=TextReadOptions()))
