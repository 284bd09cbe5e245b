"""Text to a token file: in order, counting what is skipped, leaving nothing half done."""

import json
from pathlib import Path

import pytest

from deberta_dist.corpus.contamination import benchmark_ngrams
from deberta_dist.corpus.filters import Filters
from deberta_dist.corpus.inputs import list_inputs
from deberta_dist.corpus.near_duplicates import NearDuplicates
from deberta_dist.corpus.prepare import Progress, prepare_corpus
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
    assert report.num_bytes == sum(file.num_bytes for file in files)
    assert TokenFile(tmp_path / "out" / "x.tokens").tokenizer_sha256 == tokenizer.sha256


def test_text_and_jsonl_of_the_same_documents_agree(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    jsonl(tmp_path / "a.jsonl", *texts)
    for kind in ("txt", "jsonl"):
        prepare_corpus([tmp_path / f"a.{kind}"], tmp_path / f"{kind}.tokens", tokenizer=tokenizer)
    assert documents_of(tmp_path / "txt.tokens") == documents_of(tmp_path / "jsonl.tokens")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_located(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    start = b'{"text": "fine"}\n'
    (tmp_path / name).write_bytes(start + b'{"text": "caf\xe9"}\n')
    message = rf"{name}:2: byte {len(start) + 13} of the file \(0xe9\) is not UTF-8"
    with pytest.raises(DataError, match=message):
        prepare_corpus([tmp_path / name], tmp_path / "x.tokens", tokenizer=tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_another_field_can_be_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", "the time", field="body")
    prepare_corpus([tmp_path / "a.jsonl"], tmp_path / "x.tokens", tokenizer=tokenizer, text_field="body")
    assert documents_of(tmp_path / "x.tokens") == [tokenizer.encode("the time")]


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
