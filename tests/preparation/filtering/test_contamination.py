"""Shared n-grams against a search for the words themselves; benchmark files read strictly."""

import dataclasses
import gzip
import json
import lzma
import pickle
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.filtering.contamination import NgramSet, benchmark_ngrams
from deberta_dist.preparation.filtering.words import split_words

DEMO = Path(__file__).resolve().parents[3] / "launchers" / "demo_superglue"
NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()


def ngrams_of(text: str, *, n: int) -> list[str]:
    words = split_words(text)
    listed = words.slice(0, len(words.hashes))
    return [" ".join(listed[i : i + n]) for i in range(len(listed) - n + 1)]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_agrees_with_a_search_for_the_words(tmp_path: Path) -> None:
    generator = random.Random(1)

    def words() -> str:
        return " ".join(generator.choices(["a", "b", "é", "中", "x-y"], k=generator.randrange(30)))

    strings = [words() for _ in range(60)]
    ngram_set = benchmark_ngrams([write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, strings)))], n=6)
    expected = {ngram for string in strings for ngram in ngrams_of(string, n=6)}
    assert len(ngram_set.hashes) == len(expected)
    num_shared = 0
    for _ in range(1000):
        text = words().upper()
        shared = next((ngram for ngram in ngrams_of(text, n=6) if ngram in expected), None)
        assert ngram_set.first_shared(text) == shared
        assert ngram_set.shares(text) == (shared is not None)
        num_shared += shared is not None
    assert 100 < num_shared < 900


def test_every_string_of_every_kind_of_file(tmp_path: Path) -> None:
    passage = {"text": "Alpha beta", "qas": [{"idx": 3, "query": "gamma, DELTA"}]}
    deep = {"passage": passage, "not a key": None, "x": True, "half a \ud800 pair": "k" * 5}
    write(tmp_path / "Task" / "val.jsonl", b"\xef\xbb\xbf" + json.dumps(deep).encode() + b'\n\n{"a": "epsilon\\nzeta"}')
    write(tmp_path / "Task" / "one.json", json.dumps([[["eta theta"]]], indent=2))
    write(tmp_path / "t.tsv", "iota\tkappa\nlambda mu\n")
    write(tmp_path / "t.txt", "nu xi\u2028omicron\npi\n\nrho sigma\n")
    write(tmp_path / "SOURCES.md", "left out")
    write(tmp_path / ".hidden" / "h.txt", "left out")
    ngram_set = benchmark_ngrams([tmp_path], n=2)
    inside = "alpha beta|gamma delta|epsilon zeta|eta theta|iota kappa|lambda mu|nu xi|xi omicron|omicron pi|rho sigma".split(
        "|"
    )
    # A key can be a text.
    inside += ["not a", "a key", "half a", "a pair"]
    assert [ngram_set.first_shared(f"so {pair}!") for pair in inside] == inside
    outside = ["beta gamma", "kappa lambda", "left out", "qas query", "delta alpha", "pi rho"]
    assert [ngram_set.first_shared(pair) for pair in outside] == [None] * len(outside)
    assert len(ngram_set.hashes) == len(inside)


def test_files_as_benchmarks_are_published(tmp_path: Path) -> None:
    """Each hides one passage of 13 words in the way of its kind."""
    passages = iter([" ".join(f"w{number}x{place}" for place in range(13)) for number in range(20)])
    hidden: dict[str, list[str]] = {}

    def some(name: str, count: int) -> list[str]:
        hidden[name] = [next(passages) for _ in range(count)]
        return hidden[name]

    a, b, c, d = some("squad.parquet", 4)
    rows = {
        "id": [1, 2],
        "context": pyarrow.array([a, None]).dictionary_encode(),
        "answers": [{"text": ["short", b]}, None],
        "turns": [[{"said": c}], []],
        "raw": pyarrow.array([d.encode(), b"\xff\xd8 a picture"]),
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "squad.parquet")
    a, b = some("conll.parquet", 2)
    pyarrow.parquet.write_table(pyarrow.table({"tokens": [a.split(), b.split()]}), tmp_path / "conll.parquet")
    (a,) = some("squad.json", 1)
    deep = {"version": "1.1", "data": [{"paragraphs": [{"context": a, "qas": [{"question": "?"}]}]}]}
    write(tmp_path / "squad.json", json.dumps(deep, indent=1))
    (a,) = some("lines.json.xz", 1)
    write(tmp_path / "lines.json.xz", lzma.compress(f'{{"x": "y"}}\n{{"x": "{a}"}}\n'.encode()))
    a, b = some("twice.jsonl.gz", 2)
    line = f'{{"n": {"9" * 5000}, "r": 1e999, "text": "{a}", "text": "{b}"}}\n'
    write(tmp_path / "twice.jsonl.gz", gzip.compress(line.encode()))
    a, b = some("rows.csv", 2)
    write(
        tmp_path / "rows.csv", f'id,one,two\n1,"{a[:40]}\n{a[40:]}","{b}"\n'.replace(f"{a[:40]}\n", a[:40].replace(" ", "\n"))
    )
    (a,) = some("wrapped.txt", 1)
    write(tmp_path / "wrapped.txt", a.replace(" ", "\n", 6))
    (a,) = some("tokens.txt", 1)
    write(tmp_path / "tokens.txt", "".join(f"{token} NN O\n" for token in a.split()) + "\n")
    (a,) = some("tokens.tsv.gz", 1)
    rows_of_tokens = "".join(f"{place}\t{token}\t_\n" for place, token in enumerate(a.split()))
    write(tmp_path / "tokens.tsv.gz", gzip.compress(f"# a comment\n\n{rows_of_tokens}\n1\tshort\t_\n".encode()))
    (a,) = some("race/high/1.txt", 1)
    write(tmp_path / "race" / "high" / "1.txt", json.dumps({"article": "It\n" + a.replace(" ", "\n"), "options": [["A"]]}))
    write(tmp_path / "labels.tsv", "yes\nno\n")
    ngram_set = benchmark_ngrams([tmp_path])
    for name, texts in hidden.items():
        assert [ngram_set.first_shared(f"So: {text.upper()}.") for text in texts] == texts, name
    used = {Path(file.path).relative_to(tmp_path).as_posix(): file for file in ngram_set.files}
    assert {name for name, file in used.items() if file.num_searched} == {*hidden}
    assert (used["labels.tsv"].num_texts, used["labels.tsv"].num_searched) == (2, 0)
    assert (used["squad.json"].num_texts, used["squad.json"].num_searched) == (3, 1)


def test_superglue() -> None:
    ngram_set = benchmark_ngrams([DEMO])
    row = json.loads((DEMO / "BoolQ" / "val.jsonl").read_text().splitlines()[0])
    passage = row["passage"].split()
    assert ngram_set.shares("Some page. " + " ".join(passage[2:40]).upper() + " More of it.")
    assert not ngram_set.shares(" ".join([*passage[2:10], "otherwise", *passage[11:19]]))
    assert not ngram_set.shares("")
    assert not ngram_set.shares("no " * 1000)


def test_fewer_words_than_n(tmp_path: Path) -> None:
    file = write(tmp_path / "b.txt", " ".join(NUMBERS[:12]) + "\n\n" + " ".join(NUMBERS[1:14]) + "\n")
    ngram_set = benchmark_ngrams([file])
    assert len(ngram_set.hashes) == 1
    assert not ngram_set.shares(" ".join(NUMBERS[:12]))
    assert ngram_set.first_shared(" ".join(NUMBERS)) == " ".join(NUMBERS[1:14])


def test_an_equal_hash_of_other_words_is_no_hit(tmp_path: Path) -> None:
    ngram_set = benchmark_ngrams([write(tmp_path / "b.txt", "red green blue\n")], n=3)
    assert ngram_set.shares("red green blue")
    for other in (b"red green blues ", b"red green blu ", b"x" * 40):
        assert not dataclasses.replace(ngram_set, text=other).shares("red green blue")


def test_what_a_worker_gets(tmp_path: Path) -> None:
    file = write(tmp_path / "b.txt", "red green blue black\n")
    ngram_set = benchmark_ngrams([file], n=3)
    copy: NgramSet = pickle.loads(pickle.dumps(ngram_set))
    assert copy.first_shared("GREEN blue, black") == "green blue black"
    assert np.array_equal(copy.hashes, ngram_set.hashes)


def test_fingerprint_is_that_of_the_ngrams(tmp_path: Path) -> None:
    one = write(tmp_path / "one" / "b.tsv", "red green blue\nwhite grey black\n")
    listed = '[{"a": "WHITE grey black"}, {"b": "short", "c": "Red, green: blue", "d": "red green blue"}]'
    other = write(tmp_path / "other" / "b.json", listed)
    more = write(tmp_path / "more" / "b.tsv", "red green blue\nwhite grey black\nred red red\n")
    prints = [benchmark_ngrams([path], n=n).fingerprint for path, n in [(one, 3), (other, 3), (more, 3), (one, 2)]]
    assert prints[0] == prints[1]
    assert len(set(prints[1:])) == 3
    assert int(prints[0], 16) < 1 << 256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl", b'{"a": "b"}\n{"a": }\n', r"b.jsonl:2 is not JSON"),
        ("b.json", b'{"a": "b"}\n{"a": \n', r"b.json is not JSON"),
        ("b.jsonl.gz", gzip.compress(b'{"a": "b"}\n{"a": }\n', mtime=0), r"b.jsonl.gz:2 is not JSON"),
        ("b.jsonl.xz", b"\xfd7zXZ\0", r"b.jsonl.xz is cut short"),
        ("b.csv", b'"a,\0"\n', r"b.csv:\d is not CSV|has 13 words"),
        ("b.json", b"[" * 200_000, r"b.json is not JSON"),
        ("b.txt", b"caf\xe9\n", r"b.txt is not UTF-8"),
        ("b.txt", b"too short\n", r"b.txt has 13 words: nothing to look for"),
        ("b.parquet", b"", r"b.parquet is not a Parquet file"),
        ("b.txt", b"", r"b.txt has no text: it would be no safeguard"),
        ("folder/empty.jsonl", b"", r"empty.jsonl has no text: it would be no safeguard"),
        ("numbers.json", b'{"a": [1, 2.5]}', r"numbers.json has no text"),
        ("folder/b.md", b"", r"folder has no .json, .jsonl, .ndjson, .tsv, .csv, .txt, .parquet files below it"),
        ("folder/wiki_00", b"x", r"wiki_00 is not of a kind that is searched for texts .*unpack or convert it, or name"),
        ("folder/data-00000-of-00001.arrow", b"x", r"00001.arrow is not of a kind that is searched"),
        ("folder/combined.zip", b"PK\3\4", r"combined.zip is not of a kind that is searched"),
        ("b.parquet.gz", b"x", r"b.parquet.gz is not of a kind that is searched"),
        ("b.tsv", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", r"b.tsv is a Git LFS pointer"),
        ("b.tsv", b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\nsize 3\n", r"b.tsv is a Git LFS pointer"),
        ("b.json", b"<!DOCTYPE html>", r"b.json is an HTML page"),
        ("b.txt.gz", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), r"b.txt.gz was packed from begins like gzip data"),
        ("b.txt", gzip.compress(b"x", mtime=0), r"b.txt begins like gzip data, expected text by its name"),
        ("missing.txt", None, r"missing.txt does not exist"),
    ],
)
def test_files_that_cannot_serve(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        benchmark_ngrams([tmp_path / name.split("/")[0]])


def test_n_below_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n = 0"):
        benchmark_ngrams([write(tmp_path / "b.txt", "a b c")], n=0)
