"""Runs with dynamic batching: the same steps on every layout and after every interruption, real tokens counted."""

import json
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.preparation.reading.texts import read_texts
from tests.integration.conftest import TEXT
from tests.integration.test_resume import interrupted, run, weights
from tests.token_files import write_token_file

BUCKETS = {"data__bucket_lengths": "[8, 16, 32]"}


@pytest.fixture(scope="module")
def phrases(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with documents of 2 to 12 words, about twice as many tokens: a sequence has 32."""
    directory = tmp_path_factory.mktemp("phrases")
    for name in ("spm.model", "valid.tokens"):
        (directory / name).symlink_to(corpus / name)
    words, counts = iter(" ".join(read_texts([TEXT / "valid.jsonl"])).split()[:8000]), cycle((2, 2, 2, 5, 5, 12))
    with open(directory / "train.jsonl", "w", encoding="utf-8") as file:
        while phrase := list(islice(words, next(counts))):
            file.write(json.dumps({"text": " ".join(phrase)}) + "\n")
    write_token_file([directory / "train.jsonl"], directory / "train.tokens", tokenizer=Tokenizer(directory / "spm.model"))
    return directory


def steps(directory: Path) -> list[tuple]:
    """(step, length of its sequences, padding, consumed samples, loss, norm) of every step."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "sequence_length", "padding", "consumed_samples", "loss", "grad_norm")
    return [tuple(line[key] for key in keys) for line in lines if "loss" in line]


def test_every_layout_and_every_start_takes_the_same_steps(phrases: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(phrases, whole, (1, 1, 1), **BUCKETS)
    expected = steps(whole)
    assert {length for _, length, *_ in expected} == {8, 16, 32}, "otherwise one shape is compared with itself"
    assert [s[3] for s in expected] == [8 * number for number in range(1, 7)], "every step has as many tokens"
    assert all(0 < padding < 0.6 for _, _, padding, *_ in expected)

    (list_of_pieces,) = phrases.glob("train.tokens.8-16-32.*.pieces")
    made = list_of_pieces.stat().st_mtime_ns
    run(phrases, tmp_path / "cut", (2, 2, 1), **BUCKETS)
    np.testing.assert_allclose(steps(tmp_path / "cut"), expected, rtol=1e-5)
    assert list_of_pieces.stat().st_mtime_ns == made

    same = interrupted(whole, tmp_path / "same")
    run(phrases, same, (1, 1, 1), **BUCKETS)
    assert steps(same) == expected[2:]
    assert all(np.array_equal(weights(same)[name], value) for name, value in weights(whole).items())

    other = interrupted(whole, tmp_path / "other")
    run(phrases, other, (1, 1, 2), **BUCKETS)
    np.testing.assert_allclose(steps(other), expected[2:], rtol=1e-5)


def test_a_change_of_the_buckets_is_told(phrases: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(phrases, whole, (1, 1, 1), training__max_steps=2)
    run(phrases, interrupted(whole, tmp_path / "run"), (1, 1, 1), training__max_steps=3, **BUCKETS)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    told = "\n".join(record["changed"])
    assert "data.bucket_lengths: None -> [8, 16, 32]" in told and "order of the samples: changed" in told
