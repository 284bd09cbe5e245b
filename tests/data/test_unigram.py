"""The yardstick of a run, against numbers worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.unigram import unigram_counts, unigram_loss


def test_by_hand(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "a.tokens", tokenizer_sha256="", vocab_size=6) as writer:
        writer.add_document([4, 4, 4, 5])
    file = TokenFile(tmp_path / "a.tokens")
    assert unigram_counts(file, vocab_size=8).tolist() == [0, 0, 0, 0, 3, 1, 0, 0]
    found = unigram_loss(file, np.array([4, 4, 5, 1]), vocab_size=8)
    assert found.loss == pytest.approx(-(2 * math.log(4 / 12) + math.log(2 / 12) + math.log(1 / 12)) / 4)
    assert found.entropy == pytest.approx(1.5 * math.log(2))
    assert unigram_loss(unigram_counts(file, vocab_size=8), np.array([[4, 4], [5, 1]]), vocab_size=8) == found


def test_no_constant_prediction_is_below_the_entropy(token_file: TokenFile) -> None:
    targets = np.array(token_file.ids[:5000])
    found = unigram_loss(token_file, targets, vocab_size=1024)
    assert 0 < found.entropy < found.loss < math.log(1024)
    own = np.bincount(targets, minlength=1024)
    assert unigram_loss(own, targets, vocab_size=1024).loss >= found.entropy
