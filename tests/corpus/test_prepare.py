"""Reading text strictly, counting what is skipped, leaving nothing half done."""

import json
from pathlib import Path

import pytest

from deberta_dist.corpus import text_files
from deberta_dist.corpus.contamination import benchmark_ngrams
from deberta_dist.corpus.filters import Filters
from deberta_dist.corpus.near_duplicates import NearDuplicates
from deberta_dist.corpus.prepare import Progress, prepare_corpus
from deberta_dist.corpus.text_files import list_inputs, read_documents, read_texts
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError


def jsonl(path: Path, *texts: str, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def documents_of(path: Path) -> list[list[int]]:
    file = TokenFile(path)
    file.verify()
    offsets = file.document_offsets
    return [file.ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def test_the_token_file_holds_the_documents_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    jsonl(folder / "b.jsonl", "the time machine", "", "it was \0 late")
    jsonl(folder / ".hidden" / "c.jsonl", "never read")
    (folder / "README.md").write_text("never read")
    (folder / "deep" / "a.txt").write_text("one line\nanother\n\n \n\nsecond document", encoding="utf-8")
    single = jsonl(tmp_path / "z.jsonl", "and first")
    report = prepare_corpus([single, folder], tmp_path / "out" / "x.tokens", tokenizer=tokenizer)
    expected = ["and first", "the time machine", "it was late", "one line another", "second document"]
    assert documents_of(tmp_path / "out" / "x.tokens") == [tokenizer.encode(text) for text in expected]
    assert (report.num_files, report.num_documents, report.num_empty_documents) == (3, 5, 1)
    assert report.num_cleaned_documents == 1
    assert report.num_tokens == TokenFile(tmp_path / "out" / "x.tokens").num_tokens
    files = list_inputs([single, folder])
    assert report.num_bytes == sum(file.stat().st_size for file in files)
    assert TokenFile(tmp_path / "out" / "x.tokens").tokenizer_sha256 == tokenizer.sha256


def test_text_and_jsonl_of_the_same_documents_agree(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    jsonl(tmp_path / "a.jsonl", *texts)
    for kind in ("txt", "jsonl"):
        prepare_corpus([tmp_path / f"a.{kind}"], tmp_path / f"{kind}.tokens", tokenizer=tokenizer)
    assert documents_of(tmp_path / "txt.tokens") == documents_of(tmp_path / "jsonl.tokens")


def test_line_ends_byte_order_marks_and_odd_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\xe2\x80\xa8four\x0cfive\n")
    documents = list(read_documents(path))
    assert [d.text.split() for d in documents] == [["one", "two"], ["three", "four", "five"]]
    assert [d.line for d in documents] == [1, 4]
    assert sum(d.num_bytes for d in documents) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_located(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    start = b'{"text": "fine"}\n'
    (tmp_path / name).write_bytes(start + b'{"text": "caf\xe9"}\n')
    message = rf"{name}:2: byte {len(start) + 13} of the file \(0xe9\) is not UTF-8"
    with pytest.raises(DataError, match=message):
        prepare_corpus([tmp_path / name], tmp_path / "x.tokens", tokenizer=tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == [name]


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
def test_lines_that_are_no_documents_are_located(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path / "a.jsonl"))


def test_another_field_can_be_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", "the time", field="body")
    prepare_corpus([tmp_path / "a.jsonl"], tmp_path / "x.tokens", tokenizer=tokenizer, text_field="body")
    assert documents_of(tmp_path / "x.tokens") == [tokenizer.encode("the time")]


def test_documents_too_large_for_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("\n\nshort line\n" * 30 + "no empty line\n" * 100)
    with pytest.raises(DataError, match=r"a.txt:90: a document is larger .* an empty line separates"):
        list(read_documents(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").write_text("\n" + "x" * 1001)
    with pytest.raises(DataError, match=r"b.jsonl:2: a line is larger"):
        list(read_documents(tmp_path / "b.jsonl"))


def test_inputs_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "x")
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        ([tmp_path / "missing.txt"], "does not exist"),
        ([tmp_path / "a.csv"], "neither .jsonl nor .txt"),
        ([tmp_path / "empty"], "has no .jsonl or .txt files"),
        ([path, tmp_path], "given twice"),
    ):
        with pytest.raises(DataError, match=message):
            list_inputs(inputs)


def test_nothing_read_and_existing_output_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    empty = jsonl(tmp_path / "a.jsonl", "", "  ")
    with pytest.raises(DataError, match=r"no text was read from 1 files \(2 empty documents\)"):
        prepare_corpus([empty], tmp_path / "x.tokens", tokenizer=tokenizer)
    with pytest.raises(DataError, match="no text was read from 0 files"):
        prepare_corpus([], tmp_path / "x.tokens", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == [empty]
    (tmp_path / "x.tokens").write_bytes(b"mine")
    with pytest.raises(DataError, match="exists already"):
        prepare_corpus([jsonl(tmp_path / "b.jsonl", "text")], tmp_path / "x.tokens", tokenizer=tokenizer)
    assert (tmp_path / "x.tokens").read_bytes() == b"mine"


def test_progress_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *["the time machine"] * 20)
    told: list[Progress] = []
    prepare_corpus(
        [path], tmp_path / "x.tokens", tokenizer=tokenizer, progress=told.append, progress_seconds=0
    )
    assert len(told) == 20 and told[-1].num_bytes == told[-1].total_bytes == path.stat().st_size
    assert str(Progress(num_bytes=10**8, total_bytes=10**9, num_tokens=25, seconds=1000.0)) == (
        "10.0% of 1,000.0 MB, 25 tokens, 0.1 MB/s, 2:30:00 left"
    )


def test_a_sample_of_the_text_is_even_and_repeatable(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *(f"document {i}" for i in range(2000)))
    assert len(list(read_texts([path]))) == 2000
    sample = list(read_texts([path], max_bytes=path.stat().st_size // 4))
    assert sample == list(read_texts([path], max_bytes=path.stat().st_size // 4))
    numbers = [int(text.split()[1]) for text in sample]
    assert 440 < len(numbers) < 560 and 900 < sum(numbers) / len(numbers) < 1100


def test_documents_that_a_filter_leaves_out_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "the time machine", "it", "", "##########!!", "was late", "no")
    filters = Filters(min_characters=3, max_symbol_share=0.5)
    report = prepare_corpus([path], tmp_path / "x.tokens", tokenizer=tokenizer, filters=filters)
    assert documents_of(tmp_path / "x.tokens") == [tokenizer.encode(text) for text in ("the time machine", "was late")]
    assert (report.num_documents, report.num_empty_documents) == (2, 1)
    assert report.num_filtered_documents == {"min_characters": 2, "max_symbol_share": 1}
    with pytest.raises(DataError, match=r"\(1 empty documents, 5 left out by min_characters\)"):
        prepare_corpus([path], tmp_path / "y.tokens", tokenizer=tokenizer, filters=Filters(min_characters=99))


def test_documents_that_quote_a_benchmark_are_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
    benchmark = jsonl(tmp_path / "test.jsonl", " ".join(words), field="passage")
    quoted, shorter = f"As they say: {' '.join(words[1:]).title()}!", " ".join(words[:12])
    path = jsonl(tmp_path / "a.jsonl", quoted, shorter)
    ngrams = benchmark_ngrams([benchmark])
    report = prepare_corpus([path], tmp_path / "x.tokens", tokenizer=tokenizer, contamination=ngrams)
    assert documents_of(tmp_path / "x.tokens") == [tokenizer.encode(shorter)]
    assert report.num_filtered_documents == {"contaminated": 1}


def test_documents_near_an_earlier_one_are_left_out(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    first, other = texts[0], texts[1]
    path = jsonl(tmp_path / "a.jsonl", first, other, first.upper() + " And one more word.")
    report = prepare_corpus(
        [path], tmp_path / "x.tokens", tokenizer=tokenizer, near_duplicates=NearDuplicates(0.8)
    )
    assert documents_of(tmp_path / "x.tokens") == [tokenizer.encode(first), tokenizer.encode(other)]
    assert report.num_filtered_documents == {"near_duplicate": 1}
