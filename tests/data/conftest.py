"""Small texts of the tests of this room."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deberta_dist.data.token_corpus import TokenCorpus, open_corpus
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer
from tests.small_corpus import other_tokenizer, texts, token_file, tokenizer

__all__ = ["other_tokenizer", "texts", "token_file", "tokenizer"]


def corpus_of(path: Path, tokenizer: Tokenizer, lengths: Sequence[int] | np.ndarray) -> TokenCorpus:
    """A token file of documents of these lengths, whose tokens are drawn at random, by the file.s name."""
    lengths = np.asarray(lengths)
    random = np.random.default_rng(zlib.crc32(path.name.encode()))
    ids = random.integers(4, tokenizer.num_tokens - 1, lengths.sum())
    with TokenFileWriter(path, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.num_tokens) as writer:
        writer.add_documents(ids, lengths)
    return open_corpus(path)
