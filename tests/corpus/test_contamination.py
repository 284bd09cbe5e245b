"""Shared n-grams against a search for the words themselves; benchmark files read strictly."""

import dataclasses
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.corpus.contamination import NgramSet, benchmark_ngrams
from deberta_dist.corpus.words import split_words
from deberta_dist.errors import ConfigError, DataError

DEMO = Path(__file__).resolve().parents[2] / "launchers" / "demo_superglue"
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
    deep = {"passage": passage, "not a key": None, "x": True}
    write(tmp_path / "Task" / "val.jsonl", b"\xef\xbb\xbf" + json.dumps(deep).encode() + b'\n\n{"a": "epsilon\\nzeta"}')
    write(tmp_path / "Task" / "one.json", json.dumps([[["eta theta"]]], indent=2))
    write(tmp_path / "t.tsv", "iota\tkappa\nlambda mu\n")
    write(tmp_path / "t.txt", "nu xi\u2028omicron\n")
    write(tmp_path / "SOURCES.md", "left out")
    write(tmp_path / ".hidden" / "h.txt", "left out")
    ngram_set = benchmark_ngrams([tmp_path], n=2)
    inside = "alpha beta|gamma delta|epsilon zeta|eta theta|iota kappa|lambda mu|nu xi|xi omicron".split("|")
    assert [ngram_set.first_shared(f"so {pair}!") for pair in inside] == inside
    outside = ["beta gamma", "kappa lambda", "not a", "left out", "qas query", "delta alpha"]
    assert [ngram_set.first_shared(pair) for pair in outside] == [None] * len(outside)
    assert len(ngram_set.hashes) == len(inside)


def test_superglue() -> None:
    ngram_set = benchmark_ngrams([DEMO])
    row = json.loads((DEMO / "BoolQ" / "val.jsonl").read_text().splitlines()[0])
    passage = row["passage"].split()
    assert ngram_set.shares("Some page. " + " ".join(passage[2:40]).upper() + " More of it.")
    assert not ngram_set.shares(" ".join(passage[2:10] + ["otherwise"] + passage[11:19]))
    assert not ngram_set.shares("")
    assert not ngram_set.shares("no " * 1000)


def test_fewer_words_than_n(tmp_path: Path) -> None:
    file = write(tmp_path / "b.txt", " ".join(NUMBERS[:12]) + "\n" + " ".join(NUMBERS[1:14]) + "\n")
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
    one = write(tmp_path / "one" / "b.txt", "red green blue\nwhite grey black\n")
    listed = '["WHITE grey black", ["short", "Red, green: blue", "red green blue"]]'
    other = write(tmp_path / "other" / "b.json", listed)
    more = write(tmp_path / "more" / "b.txt", "red green blue\nwhite grey black\nred red red\n")
    prints = [benchmark_ngrams([path], n=n).fingerprint for path, n in [(one, 3), (other, 3), (more, 3), (one, 2)]]
    assert prints[0] == prints[1]
    assert len(set(prints[1:])) == 3
    assert int(prints[0], 16) < 1 << 256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl", b'{"a": "b"}\n{"a": }\n', r"b.jsonl:2 is not JSON"),
        ("b.json", b'{"a": "b"}\n{"a": "b"}\n', r"b.json is not JSON"),
        ("b.json", b"[" * 200_000, r"b.json is not JSON"),
        ("b.txt", b"caf\xe9\n", r"b.txt is not UTF-8"),
        ("b.txt", b"too short\n", r"b.txt has 13 words: nothing to look for"),
        ("b.parquet", b"", r"b.parquet ends in none of .json, .jsonl, .tsv, .txt"),
        ("folder/b.md", b"", r"folder has no .json, .jsonl, .tsv, .txt files below it"),
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
