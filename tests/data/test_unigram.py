"""The yardstick of a run, against numbers worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.unigram import blended_counts, unigram_counts, unigram_loss


def test_by_hand(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "a.tokens", tokenizer_sha256="", vocab_size=6) as writer:
        writer.add_document([4, 4, 4, 5])
    corpus = open_corpus(tmp_path / "a.tokens")
    counts = unigram_counts(corpus, vocab_size=8)
    assert counts.tolist() == [0, 0, 0, 0, 3, 1, 0, 0]
    found = unigram_loss(counts, np.array([4, 4, 5, 1]), vocab_size=8)
    assert found.loss == pytest.approx(-(2 * math.log(4 / 12) + math.log(2 / 12) + math.log(1 / 12)) / 4)
    assert found.entropy == pytest.approx(1.5 * math.log(2))
    assert unigram_loss(counts, np.array([[4, 4], [5, 1]]), vocab_size=8) == found


def test_distributions_are_blended_not_sizes(tmp_path: Path) -> None:
    for name, ids in (("a", [4, 4, 4, 5]), ("b", [1] * 12)):
        with TokenFileWriter(tmp_path / f"{name}.tokens", tokenizer_sha256="", vocab_size=6) as writer:
            writer.add_document(ids)
    corpora = [open_corpus(tmp_path / f"{name}.tokens") for name in "ab"]
    counts = blended_counts(corpora, proportions=[0.75, 0.25], vocab_size=7, max_tokens=10)
    assert counts == pytest.approx(np.array([0, 4, 0, 0, 9, 3, 0]))
    assert blended_counts(corpora[:1], proportions=[1.0], vocab_size=6).tolist() == [0, 0, 0, 0, 3, 1]


def test_no_constant_prediction_is_below_the_entropy(token_file: TokenFile) -> None:
    targets = np.array(token_file.ids[:5000])
    counts = unigram_counts(open_corpus(token_file.path), vocab_size=1024)
    found = unigram_loss(counts, targets, vocab_size=1024)
    assert 0 < found.entropy < found.loss < math.log(1024)
    own = np.bincount(targets, minlength=1024)
    assert unigram_loss(own, targets, vocab_size=1024).loss >= found.entropy
