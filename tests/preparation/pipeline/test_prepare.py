"""Text to a corpus: every document in order, what is left out counted, the same bytes by any number of processes."""

import json
from pathlib import Path

import pytest

from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.filtering.contamination import benchmark_ngrams
from deberta_dist.preparation.filtering.filters import Filters
from deberta_dist.preparation.pipeline.progress import Progress
from deberta_dist.preparation.pipeline.recipe import PreparationRecipe
from deberta_dist.preparation.reading.inputs import list_inputs
from deberta_dist.preparation.reading.texts import TextReadOptions
from tests.preparation.pipeline.small import documents_of, files_of, jsonl, prepare


def test_the_corpus_holds_the_documents_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    jsonl(folder / "b.jsonl", "the time machine", "", "it was \0 late")
    jsonl(folder / ".hidden" / "c.jsonl", "never read")
    (folder / "README.md").write_text("never read")
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text("one line\nanother\n\n \n\nsecond document", encoding="utf-8")
    single = jsonl(tmp_path / "z.jsonl", "and first")
    outcome = prepare([single, folder], tmp_path / "out" / "x", tokenizer=tokenizer)
    expected = ["and first", "the time machine", "it was late", "one line another", "second document"]
    corpus = tmp_path / "out" / "x" / "train"
    assert documents_of(corpus) == [tokenizer.encode(text) for text in expected]
    total = outcome.total
    assert (total.files, total.train.documents, total.read_documents) == (3, 5, 6)
    assert total.dropped == {"empty": 1} and total.altered == {"nul_or_surrogate": 1}
    assert total.train.tokens == open_corpus(corpus).num_tokens
    assert total.input_bytes == sum(file.num_bytes for file in list_inputs([single, folder]))
    assert open_corpus(corpus).tokenizer_sha256 == tokenizer.sha256
    assert sorted(path.name for path in (tmp_path / "out" / "x").iterdir()) == ["report.json", "report.md", "train"]


def test_text_and_jsonl_of_the_same_documents_agree(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    jsonl(tmp_path / "a.jsonl", *texts)
    for kind in ("txt", "jsonl"):
        prepare([tmp_path / f"a.{kind}"], tmp_path / kind, tokenizer=tokenizer)
    assert files_of(tmp_path / "txt").keys() == files_of(tmp_path / "jsonl").keys()
    assert documents_of(tmp_path / "txt" / "train") == documents_of(tmp_path / "jsonl" / "train")


def test_every_cut_and_number_of_workers_gives_the_same_bytes(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    inputs = [f"a={jsonl(tmp_path / 'a.jsonl', *texts)}", f"b={jsonl(tmp_path / 'b.jsonl', texts[3], 'x y', *texts[:2])}"]
    settings = {"tokenizer": tokenizer, "held_out_percent": 30.0, "shard_bytes": 1 << 15}
    outcome = prepare(inputs, tmp_path / "one", **settings)
    assert outcome.sources["b"].dropped == {"duplicate": 3} and outcome.shards["train/a"] > 1
    expected = files_of(tmp_path / "one")
    assert {"train/a/index.json", "train/b/index.json", "heldout/index.json"} < expected.keys()
    # The least memory finds the same duplicates in several ranges of hashes.
    prepare(inputs, tmp_path / "two", num_workers=2, piece_bytes=10_000, memory_bytes=1 << 20, **settings)
    assert files_of(tmp_path / "two") == expected


def test_a_document_is_held_out_by_its_text_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"document number {number} of these" for number in range(400)]
    outcome = prepare([jsonl(tmp_path / "a.jsonl", *texts)], tmp_path / "a", tokenizer=tokenizer, held_out_percent=25.0)
    held_out = {tuple(ids) for ids in documents_of(tmp_path / "a" / "heldout")}
    assert outcome.total.heldout.documents == len(held_out) and 70 < len(held_out) < 130
    assert not held_out & {tuple(ids) for ids in documents_of(tmp_path / "a" / "train")}
    # In other company, twice and spelled otherwise: the same ones, each once.
    shouted = [f"  {text.upper()}" for text in texts[:200]]
    again = jsonl(tmp_path / "b.jsonl", *reversed(texts), *shouted, "something else")
    prepare([again], tmp_path / "b", tokenizer=tokenizer, held_out_percent=25.0)
    assert {tuple(ids) for ids in documents_of(tmp_path / "b" / "heldout")} - {
        tuple(tokenizer.encode("something else"))
    } == held_out
    # A larger share has the smaller one in it.
    prepare([again], tmp_path / "c", tokenizer=tokenizer, held_out_percent=50.0)
    assert held_out < {tuple(ids) for ids in documents_of(tmp_path / "c" / "heldout")}


def test_held_out_inputs_come_first(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    train, valid = jsonl(tmp_path / "train.jsonl", *texts), jsonl(tmp_path / "valid.jsonl", *texts[5:8], "only here")
    prepare([train], tmp_path / "x", tokenizer=tokenizer, held_out_inputs=[valid])
    assert documents_of(tmp_path / "x" / "heldout") == [tokenizer.encode(text) for text in (*texts[5:8], "only here")]
    assert documents_of(tmp_path / "x" / "train") == [tokenizer.encode(text) for text in (*texts[:5], *texts[8:])]
    with pytest.raises(DataError, match=r"train.jsonl is given as --input and as --held-out-input"):
        prepare([train], tmp_path / "y", tokenizer=tokenizer, held_out_inputs=[train])


def test_documents_that_a_rule_leaves_out_are_counted(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
    ngrams = benchmark_ngrams([jsonl(tmp_path / "test.jsonl", " ".join(words), field="passage")])
    quoted, shorter = f"As they say: {' '.join(words[1:]).title()}!", " ".join(words[:12])
    near = texts[0].upper() + " And one more word."
    path = jsonl(tmp_path / "a.jsonl", quoted, shorter, "", "it", "##########!!", texts[0], texts[1], near, texts[1])
    outcome = prepare(
        [path],
        tmp_path / "x",
        tokenizer=tokenizer,
        filters=Filters(min_characters=3, max_symbol_share=0.5),
        ngrams=ngrams,
        near_duplicates=0.8,
        num_workers=2,
    )
    expected = [tokenizer.encode(text) for text in (shorter, *texts[:2])]
    assert documents_of(tmp_path / "x" / "train") == expected
    assert outcome.total.dropped == {
        "contaminated": 1, "empty": 1, "min_characters": 1, "max_symbol_share": 1, "duplicate": 1, "near_duplicate": 1
    }  # fmt: skip
    with pytest.raises(DataError, match=r"no document is left to write \(1 empty, 8 min_characters\)"):
        prepare([path], tmp_path / "y", tokenizer=tokenizer, filters=Filters(min_characters=10**6))
    outcome = prepare([path], tmp_path / "z", tokenizer=tokenizer, deduplicate=False)
    assert outcome.total.train.documents == 8


def test_bad_documents_stop_it_or_are_counted_as_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "the time"}\n{"text": "caf\xe9"}\n{"other": 1}\n{"text": "was late"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: byte 34 .*--invalid-utf8 replace or drop"):
        prepare([path], tmp_path / "x", tokenizer=tokenizer)
    # As the message says: that option, and it goes on.
    options = TextReadOptions(invalid_utf8="replace")
    with pytest.raises(DataError, match=r"a\.jsonl:3: no string in the field 'text'.*--bad-records drop"):
        prepare([path], tmp_path / "x", tokenizer=tokenizer, reading=options)
    options = TextReadOptions(invalid_utf8="replace", bad_records="drop")
    outcome = prepare([path], tmp_path / "x", tokenizer=tokenizer, reading=options)
    assert outcome.total.dropped == {"bad_record": 1} and outcome.total.altered == {"replaced_utf8": 1}
    expected = [tokenizer.encode(text) for text in ("the time", "caf\ufffd", "was late")]
    assert documents_of(tmp_path / "x" / "train") == expected


def test_what_exists_is_refused_and_left(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "the time machine")
    output = tmp_path / "x"
    prepare([path], output, tokenizer=tokenizer)
    before = files_of(output)
    with pytest.raises(DataError, match="x is a complete corpus and is not overwritten"):
        prepare([path], output, tokenizer=tokenizer)
    assert files_of(output) == before
    with pytest.raises(DataError, match=r"holds other files \(a.jsonl, x\)"):
        prepare([path], tmp_path, tokenizer=tokenizer)
    with pytest.raises(DataError, match="is a file, expected a directory"):
        prepare([path], path, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="--workers 0"):
        prepare([path], tmp_path / "y", tokenizer=tokenizer, num_workers=0)
    for threshold in (0.0, 80.0, float("nan")):
        with pytest.raises(ConfigError, match=rf"--near-duplicates {threshold}: expected above 0 and at most 1"):
            PreparationRecipe.of(tokenizer, near_duplicates=threshold)
    with pytest.raises(ConfigError, match=r"--held-out 100.* below 100"):
        prepare([path], tmp_path / "y", tokenizer=tokenizer, held_out_percent=100.0)
    assert not (tmp_path / "y").exists()


def test_progress_and_report_say_what_was_done(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *texts)
    told: list[Progress] = []
    outcome = prepare(
        [path], tmp_path / "x", tokenizer=tokenizer, piece_bytes=1 << 14, progress=told.append, progress_seconds=0.01
    )
    assert {progress.phase for progress in told} == {"encoding", "finding duplicates", "writing token files"}
    assert max(progress.done_bytes for progress in told) > path.stat().st_size // 2
    assert (
        str(Progress(phase="encoding", done_bytes=10**8, total_bytes=10**9, num_tokens=25, speed=1e5, seconds_left=9000))
        == "encoding: 10.0% of 1,000.0 MB, 25 tokens, 0.1 MB/s, 2:30:00 left"
    )
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    assert report["total"]["train"] == {
        "documents": len(texts),
        "tokens": outcome.total.train.tokens,
        "text_bytes": sum(len(text.encode()) for text in texts),
    }
    assert report["recipe"]["tokenizer_sha256"] == tokenizer.sha256 and report["total"]["cpu_seconds"] > 0
    text = (tmp_path / "x" / "report.md").read_text()
    assert f"| total | 1 | 0.3 | {len(texts)} | {len(texts)} | {outcome.total.train.tokens:,} | 0 | 0 |" in text
