"""Samples that a vocabulary is made from, and the tool that makes or takes one."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from deberta_dist.data.tokenizer import Tokenizer, train_tokenizer
from deberta_dist.data.training_words import TrainingWords
from deberta_dist.data.vocabulary_options import VocabularyOptions
from deberta_dist.errors import ConfigError
from deberta_dist.preparation.reading.documents import TextReadOptions
from deberta_dist.preparation.reading.inputs import list_inputs
from deberta_dist.preparation.reading.texts import read_texts
from deberta_dist.preparation.vocabulary import sampling, vocabulary
from deberta_dist.preparation.vocabulary.sampling import is_held_out, sample_files
from deberta_dist.preparation.vocabulary.vocabulary import measure
from tests.preparation.test_tools import TEXT, assert_one_line_error, run

TOOL = "train_tokenizer.py"


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """3 x 4000 documents of one size: plain, compressed and Parquet; each says its kind and number."""
    lines = {kind: [f"{kind} {i:05} {'x' * 30}" for i in range(4000)] for kind in ("plain", "packed", "column")}
    (tmp_path / "plain.txt").write_text("\n\n".join(lines["plain"]))
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress("\n\n".join(lines["packed"]).encode()))
    table = pyarrow.table({"text": lines["column"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=700, use_dictionary=False)
    return [tmp_path / "plain.txt", tmp_path / "packed.txt.gz", tmp_path / "c.parquet"]


def test_a_sample_is_even_over_all_inputs_and_repeatable(corpus: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    options = TextReadOptions()
    everything = list(sample_files(list_inputs(corpus), options=options, max_bytes=None))
    assert len(everything) == 12_000
    size = sum(len(text) for text, _ in everything)
    sample = list(sample_files(list_inputs(corpus), options=options, max_bytes=size // 4))
    assert sample == list(sample_files(list_inputs(corpus), options=options, max_bytes=size // 4))
    assert sample != list(sample_files(list_inputs(corpus), options=options, max_bytes=size // 4, salt="another"))
    assert len(set(sample)) == len(sample) and set(sample) < set(everything)
    for kind in ("plain", "packed", "column"):
        numbers = [int(text.split()[1]) for text, _ in sample if text.startswith(kind)]
        assert 850 < len(numbers) < 1150 and 1850 < sum(numbers) / len(numbers) < 2150, kind
    # Plain text outside the windows is not read: what is wrong there is not seen.
    monkeypatch.setattr(sampling, "_MAX_WINDOW_BYTES", 1000)
    corpus[0].write_bytes(corpus[0].read_bytes()[:80_000] + b"\n\n\xff\xff\n\n")
    few = list(sample_files(list_inputs(corpus[:1]), options=options, max_bytes=3000))
    assert 30 < len(few) < 100


def test_every_document_has_the_same_chance(tmp_path: Path) -> None:
    """Also those at the ends of files, and in files smaller than a window."""
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"{i} first\n\n{i} {'x' * 100}\n\n{i} last")
    counts: dict[str, int] = {}
    for salt in range(200):
        for text, _ in sample_files(list_inputs([tmp_path]), options=TextReadOptions(), max_bytes=400, salt=str(salt)):
            counts[text] = counts.get(text, 0) + 1
    share = 400 / sum(path.stat().st_size for path in tmp_path.iterdir())
    assert len(counts) == 30
    # Five standard deviations of 200 draws.
    assert all(abs(n - 200 * share) < 5 * (200 * share * (1 - share)) ** 0.5 for n in counts.values()), counts


def test_held_out_depends_on_the_text_alone(corpus: list[Path]) -> None:
    texts = list(sample_files(list_inputs(corpus), options=TextReadOptions(), max_bytes=None))
    held_out = {text for text, is_out in texts if is_out}
    assert 180 < len(held_out) < 300 and all(is_held_out(text) == (text in held_out) for text, _ in texts)
    assert is_held_out("lone \ud800 surrogate") in (True, False)
    with pytest.raises(ConfigError, match="max_bytes = 0"):
        list(sample_files(list_inputs(corpus), options=TextReadOptions(), max_bytes=0))


def test_held_out_text_is_measured_and_not_trained_on(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def train(texts: Iterable[str], path: str | Path, *, vocab_size: int, options: VocabularyOptions) -> TrainingWords:
        trained.extend(texts)
        return train_tokenizer(trained[:200], path, vocab_size=vocab_size, options=options)

    monkeypatch.setattr(vocabulary, "train_tokenizer", train)
    made = vocabulary.train_vocabulary(
        corpus, tmp_path / "m", reading=TextReadOptions(), options=VocabularyOptions(), vocab_size=50, max_bytes=None
    )
    assert made.fit.num_documents + len(trained) == 12_000 and not any(map(is_held_out, trained))


def test_measures(tokenizer: Tokenizer) -> None:
    fit = measure(tokenizer, ["the time machine", "the \u2603\u2603 \u6f22"])
    ids = tokenizer.encode("the time machine") + tokenizer.encode("the \u2603\u2603 \u6f22")
    assert (fit.num_documents, fit.num_words, fit.num_bytes) == (2, 6, 16 + 4 + 6 + 1 + 3)
    assert (fit.num_characters, fit.num_unknown_characters) == (14 + 3 + 3, 3)
    assert (fit.num_tokens, fit.num_unknown_tokens) == (len(ids), ids.count(tokenizer.unk_id)) and ids.count(3) == 2
    assert str(fit).startswith("85.0000% of 20 characters covered, ")


def test_train_then_take_the_result_as_published(tmp_path: Path) -> None:
    whole = "\n".join(read_texts([TEXT]))
    parts = [whole[i : i + 1000] for i in range(0, len(whole), 1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in parts) + "not JSON\n")
    reading = ("--input", "a.jsonl", "--text-field", "body", "--bad-records", "drop")
    made = run(TOOL, *reading, "--output", "spm.model", "--vocab-size", 600, cwd=tmp_path)
    assert made.returncode == 0 and "601 tokens" in made.stdout and "held-out text: 99." in made.stdout, made.stderr
    again = run(TOOL, *reading, "--output", "again.model", "--vocab-size", 600, cwd=tmp_path)
    assert again.returncode == 0
    model = (tmp_path / "spm.model").read_bytes()
    assert (tmp_path / "again.model").read_bytes() == model

    taken = run(TOOL, *reading, "--output", "taken.model", "--published", "spm.model", cwd=tmp_path)
    assert taken.returncode == 0 and f"({len(parts):,} documents" in taken.stdout, taken.stderr
    assert (tmp_path / "taken.model").read_bytes() == model
    take = (TOOL, *reading, "--output")
    refused = run(*take, "taken.model", "--published", "spm.model", cwd=tmp_path)
    assert_one_line_error(refused, code=65, words="exists already")
    refused = run(*take, "new.model", "--published", "a.jsonl", cwd=tmp_path)
    assert_one_line_error(refused, code=65, words="not a sentencepiece model")
    refused = run(*take, "new.model", "--published", "spm.model", "--max-document-bytes", 0, cwd=tmp_path)
    assert_one_line_error(refused, code=2, words="max_document_bytes = 0")
    assert not (tmp_path / "new.model").exists()


def test_options_of_training_are_in_the_report(tmp_path: Path) -> None:
    """And a run without white space, which it cuts, counts and names."""
    lines = "\n\n".join(read_texts([TEXT])).split("\n")[:600]
    (tmp_path / "a.txt").write_text("\n\n".join([*lines, "x" * 30 + "+/" * 20_000]))
    (tmp_path / "symbols.txt").write_text("<URL>\n[USER]\n")
    options = ("--byte-fallback", "--character-coverage", 0.999, "--normalization-rule", "nfkc", "--max-run-characters", 500)
    train = (TOOL, "--input", "a.txt", "--output", "spm.model", "--vocab-size", 700)
    made = run(*train, *options, "--user-defined-symbols", "symbols.txt", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "cut before training: 1 runs of more than 500 characters without white space, 40,030 characters" in made.stdout
    report = (tmp_path / "spm.model.report.md").read_text()
    for row in (
        "character-coverage | 0.999", "byte-fallback | yes", "user-defined-symbols | `<URL>`, `[USER]`",
        "normalization-rule | nfkc", "max-run-characters | 500", "1 runs without white space, of 40,030 characters",
        f"SHA-256 | {Tokenizer(tmp_path / 'spm.model').sha256}", "inputs | `a.txt`",
    ):  # fmt: skip
        assert row in report
    assert Tokenizer(tmp_path / "spm.model").pieces([4, 5]) == ["<URL>", "[USER]"]
    again = run(*train[:4], "taken.model", "--published", "spm.model", "--byte-fallback", cwd=tmp_path)
    assert_one_line_error(again, code=2, words="--byte-fallback is about training")
    (tmp_path / "taken.model.report.md").write_text("")
    again = run(*train[:4], "taken.model", "--published", "spm.model", cwd=tmp_path)
    assert_one_line_error(again, code=65, words="taken.model.report.md exists already")
    assert not (tmp_path / "taken.model").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("b.txt", "caf\xe9\n".encode("latin-1"), "b.txt:1: byte 3 of the file (0xe9) is not UTF-8"),
        ("b.txt", "caf\xe9\n".encode("utf-16"), "b.txt:1: byte 0 of the file (0xff) is not UTF-8"),
        ("b.txt.gz", gzip.compress(b"some text " * 999, mtime=0)[:-20], "b.txt.gz is cut short"),
        ("b.jsonl", b'{"text": 5}\n', "b.jsonl:1: no string in the field 'text'"),
    ],
    ids=["Latin-1", "UTF-16", "a truncated archive", "a record"],
)
def test_what_cannot_be_read_is_one_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    """Though the trainer has begun to read when it is met."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("plain text\n\n" * 50)
    (tmp_path / "in" / name).write_bytes(content)
    result = run(TOOL, "--input", "in", "--output", "spm.model", "--vocab-size", 20, cwd=tmp_path)
    # Another version of the library than the tested one may be told first.
    assert result.returncode == 65 and result.stderr.splitlines()[-1].startswith("error: ") and words in result.stderr
    assert "Traceback" not in result.stderr and [path.name for path in tmp_path.iterdir()] == ["in"]
