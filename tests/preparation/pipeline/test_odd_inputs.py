"""Inputs that are odd and right, or odd and wrong: names, splits with nothing in them, documents of any length."""

import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.filtering.contamination import benchmark_ngrams
from deberta_dist.preparation.pipeline.report import Outcome
from deberta_dist.preparation.reading.texts import TextReadOptions
from tests.preparation.pipeline.runs import Start
from tests.preparation.pipeline.small import documents_of, files_of, jsonl, prepare


def test_names_of_any_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    names = ("a\nb.jsonl", "x=y.jsonl", "*[.jsonl", os.fsdecode(b"\xff.jsonl"))
    inputs = [jsonl(folder / name, name) for name in names]
    inputs[-1].write_text('{"text": "no text in its name"}\n')
    (tmp_path / "link.jsonl").symlink_to(inputs[0])
    arguments = ["--tokenizer", tokenizer.path, "--workers", 2, "--held-out", 0]
    output = folder / "corpus"
    with Start(output, [*arguments, "--input", *map(os.fsencode, inputs)]) as start:
        code, told, errors = start.end()
    assert code == 0 and told.startswith(f"{tmp_path}/caf\\udce9/corpus: 4 documents"), errors
    texts = [*names[:3], "no text in its name"]
    assert documents_of(output / "train") == [tokenizer.encode(text) for text in texts]
    with pytest.raises(DataError, match=r"link\.jsonl is given twice \(also as"):
        prepare([*inputs, tmp_path / "link.jsonl"], tmp_path / "x", tokenizer=tokenizer)


def test_sources_that_a_file_system_could_mix_up(tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = ("web", "Wiki", "wiki")
    inputs = [f"{name}={jsonl(tmp_path / f'{number}.jsonl', 'x')}" for number, name in enumerate(names)]
    with pytest.raises(DataError, match="sources Wiki and wiki differ in case alone"):
        prepare(inputs, tmp_path / "x", tokenizer=tokenizer)


def test_folders_that_are_missing_are_told(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    inputs = [f"{name}={jsonl(tmp_path / f'{name}.jsonl', *texts[:3])}" for name in ("first", "again")]
    outcome = prepare(inputs, tmp_path / "x", tokenizer=tokenizer)
    assert sorted(path.name for path in (tmp_path / "x" / "train").iterdir()) == ["first"]
    line = "train/again/ is not there: no document is left for it"
    assert line in outcome.summary(tmp_path / "x") and f"- {line}\n" in (tmp_path / "x" / "report.md").read_text()
    assert json.loads((tmp_path / "x" / "report.json").read_text())["missing"] == ["train/again"]
    # All held out; and held-out inputs alone never miss a folder of their own.
    outcome = prepare([tmp_path / "first.jsonl"], tmp_path / "y", tokenizer=tokenizer, held_out_percent=99.9999)
    assert outcome.missing == ["train"] and len(documents_of(tmp_path / "y" / "heldout")) == 3
    # Too few to hold one out: data.validation has nothing to name.
    for percent, missing in ((0.0001, ["heldout"]), (0, [])):
        output = tmp_path / f"{percent}"
        outcome = prepare([tmp_path / "first.jsonl"], output, tokenizer=tokenizer, held_out_percent=percent)
        assert outcome.missing == missing
    valid = jsonl(tmp_path / "valid.jsonl", "x")
    outcome = prepare(inputs[:1], tmp_path / "z", tokenizer=tokenizer, held_out_inputs=[valid])
    assert outcome.missing == [] and outcome.total.heldout.documents == 1


def test_a_document_longer_than_a_token_file_has_one_alone(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    short, long = [f"number {number}" for number in range(4)], " ".join(texts[:4])
    expected = [short[0], long, *short[1:], f"{long} again", f"{long} and again"]
    path = jsonl(tmp_path / "a.jsonl", *expected)
    outcome = prepare([path], tmp_path / "x", tokenizer=tokenizer, shard_bytes=1 << 12)
    assert 2 * len(tokenizer.encode(long)) > 1 << 12
    assert documents_of(tmp_path / "x" / "train") == [tokenizer.encode(text) for text in expected]
    assert outcome.shards == {"train": 5}
    # Wherever the input is cut.
    prepare([path], tmp_path / "y", tokenizer=tokenizer, shard_bytes=1 << 12, piece_bytes=20_000)
    assert files_of(tmp_path / "y") == files_of(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"--max-document-bytes 2147483648: expected at most 2147483647"):
        prepare([path], tmp_path / "z", tokenizer=tokenizer, reading=TextReadOptions(max_document_bytes=1 << 31))


def test_files_of_every_name_are_read_or_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    (folder / "AA").mkdir(parents=True)
    (folder / "a.txt").write_text("the first text")
    (folder / "b.json.gz").write_bytes(gzip.compress(b'{"text": "the second"}\n'))
    (folder / "c.txt.xz").write_bytes(lzma.compress(b"the third"))
    (folder / "d.ndjson").write_text('{"text": "the fourth", "n": ' + "9" * 5000 + "}\n")
    (folder / "AA" / "wiki_00").write_text('<doc id="1">\nThe fifth\n\nof all\n</doc>\n')
    (folder / "notes|\n.md").touch()
    (folder / ".git").mkdir()
    texts = ["the first text", "the second", "the third", "the fourth"]
    outcome = prepare([folder], tmp_path / "x", tokenizer=tokenizer)
    assert documents_of(tmp_path / "x" / "train") == [tokenizer.encode(text) for text in texts]
    assert outcome.passed_over.count == 3
    told = json.loads((tmp_path / "x" / "report.json").read_text())["passed_over"]
    assert told == {"count": 3, "first": [f"{folder}/AA/wiki_00", repr(f"{folder}/notes|\n.md"), f"{folder}/.git/"]}
    line = f"passed over beside the inputs: 3 ({', '.join(told['first'])})"
    assert line in outcome.summary(tmp_path / "x") and f"- {line}\n" in (tmp_path / "x" / "report.md").read_text()

    reading = TextReadOptions(format="wikiextractor")
    outcome = prepare([folder], tmp_path / "y", tokenizer=tokenizer, reading=reading)
    assert documents_of(tmp_path / "y" / "train") == [tokenizer.encode("The fifth\n\nof all")]
    assert outcome.passed_over.count == 6
    assert Outcome.from_json(json.loads(json.dumps(outcome.as_json()))) == outcome
    # Nothing beside, nothing told.
    assert "passed over" not in prepare([folder / "a.txt"], tmp_path / "z", tokenizer=tokenizer).summary(tmp_path)
    (folder / "e.jsonl").symlink_to("gone")
    with pytest.raises(DataError, match="e.jsonl is a link that leads nowhere, to gone"):
        prepare([folder], tmp_path / "w", tokenizer=tokenizer)
    assert not (tmp_path / "w").exists()


def test_a_benchmark_is_listed_file_by_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    passages = [" ".join(f"word{number}x{place}" for place in range(14)) for number in range(3)]
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"p": passages[0], "q": "?"}).encode()))
    (folder / "b|c.csv").write_text(f'id,text\n1,"{passages[1]}"\n')
    (folder / "labels.txt").write_text("yes\nno\n")
    (folder / "README.md").touch()
    leaked = jsonl(tmp_path / "leaked.jsonl", *(f"So {passage}!" for passage in passages))
    ngrams = benchmark_ngrams([folder])
    outcome = prepare([leaked], tmp_path / "x", tokenizer=tokenizer, ngrams=ngrams)
    assert outcome.total.dropped == {"contaminated": 2}
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    found = [(Path(used["path"]).name, used["num_texts"], used["num_searched"]) for used in report["benchmark"]]
    assert found == [("a.jsonl.gz", 2, 1), ("b|c.csv", 4, 1), ("labels.txt", 1, 0)]
    line = "compared with 2 of 7 texts in 3 benchmark files (the others are shorter); 1 files have none that is long enough"
    assert line in outcome.summary(tmp_path) and f"beside the benchmark: 1 ({folder}/README.md)" in outcome.summary(tmp_path)
    text = (tmp_path / "x" / "report.md").read_text()
    assert f"| {folder}/b\\|c.csv | 4 | 1 |\n" in text and line in text
    assert Outcome.from_json(report) == outcome


def test_what_is_to_be_held_out_never_comes_to_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = jsonl(tmp_path / "a.jsonl", "some text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "b.txt").touch()
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    valid = jsonl(tmp_path / "valid.jsonl", "other text")
    with pytest.raises(DataError, match=r"--held-out-input .*empty has no bytes: nothing would be held out"):
        prepare([text], tmp_path / "x", tokenizer=tokenizer, held_out_inputs=[valid, tmp_path / "empty"])
    assert not (tmp_path / "x").exists()
    reading = TextReadOptions(bad_records="drop")
    for name, why in (("blank.txt", "the inputs are empty"), ("bad.jsonl", "1 bad_record")):
        with pytest.raises(DataError, match=rf"no document of --held-out-input is left to hold out \({why}\)"):
            held_out = [tmp_path / name]
            prepare([text], tmp_path / name[:3], tokenizer=tokenizer, reading=reading, held_out_inputs=held_out)
