"""Inputs that are odd and right, or odd and wrong: names, splits with nothing in them, documents of any length."""

import json
import os
from pathlib import Path

import pytest

from deberta_dist.corpus.reading import ReadOptions
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from tests.preparation.runs import Start
from tests.preparation.small import documents_of, files_of, jsonl, prepare


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


def test_a_document_longer_than_a_token_file_has_one_alone(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
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
        prepare([path], tmp_path / "z", tokenizer=tokenizer, reading=ReadOptions(max_document_bytes=1 << 31))
