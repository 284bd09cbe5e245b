"""Cuts a corpus into samples: windows of tokens that ignore document boundaries or mark them.

No list of samples exists: sample i is found from i alone. Used by the loader.
"""

import numpy as np

from deberta_dist.data.token_corpus import TokenCorpus
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError


def count_samples(corpus: TokenCorpus, *, max_seq_length: int, document_boundaries: bool) -> tuple[int, int]:
    """(samples of a corpus, tokens behind the last), the ``[SEP]`` of documents included; as ``Packing`` makes them.

    Raises:
        ConfigError: ``max_seq_length`` is less than 3.
        DataError: the corpus has less than one sample.
    """
    if max_seq_length < 3:
        raise ConfigError(f"max_seq_length = {max_seq_length} leaves no room between [CLS] and [SEP]")
    length = corpus.num_tokens + (corpus.num_documents if document_boundaries else 0)
    num_samples, rest = divmod(length, max_seq_length - 2)
    if num_samples == 0:
        raise DataError(
            f"{corpus.path} has {corpus.num_tokens} tokens, less than one sample of "
            f"max_seq_length - 2 = {max_seq_length - 2}: give more text or a smaller max_seq_length"
        )
    return num_samples, rest


class Packing:
    """Samples of S tokens: ``[CLS]``, a window of S-2, ``[SEP]``. Sample i is the window from i * (S-2) on.

    Boundaries ignored, as published: windows of the corpus's tokens; documents follow each other without a mark.

    Boundaries honoured: windows of the same tokens with a ``[SEP]`` behind every document. A document that ends in one
    window and begins in the next is cut, as it would be otherwise; ``[CLS]`` belongs to the first document of a sample and
    the last ``[SEP]`` to the last.

    What is left behind the last full window is not used.

    Attributes:
        num_samples: full windows of the corpus.
        num_dropped_tokens: tokens behind the last full window, the ``[SEP]`` of documents included.
    """

    def __init__(self, corpus: TokenCorpus, tokenizer: Tokenizer, *, max_seq_length: int, document_boundaries: bool) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._window = max_seq_length - 2
        self._honours = document_boundaries
        self.num_samples, self.num_dropped_tokens = count_samples(
            corpus, max_seq_length=max_seq_length, document_boundaries=document_boundaries
        )

    def sequences(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Samples before masking.

        Args:
            samples: their numbers, int64 [B].

        Returns:
            (ids, documents): ids in the corpus's type [B, S]; with boundaries the number of each token's document within
            its sample, from 1, int64 [B, S], otherwise None.
        """
        shape = (samples.size, self._window + 2)
        ids = np.empty(shape, self._corpus.dtype)
        ids[:, 0], ids[:, -1] = self._tokenizer.cls_id, self._tokenizer.sep_id
        documents = np.empty(shape, np.int64) if self._honours else None
        for row, sample in enumerate(samples.tolist()):
            start = sample * self._window
            if documents is None:
                ids[row, 1:-1] = self._corpus.read(start, start + self._window)
            else:
                ids[row, 1:-1], documents[row, 1:-1] = self._with_boundaries(start)
        if documents is not None:
            # [CLS] and the last [SEP] belong to the document beside them: with a number of their own they would see nothing.
            documents[:, 0], documents[:, -1] = documents[:, 1], documents[:, -2]
        return ids, documents

    def _with_boundaries(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and documents of the window that begins at ``start``, counted in tokens and ``[SEP]`` of documents."""
        first = self._corpus.document_at(start, num_separators=1)
        stop = min(first + self._window, self._corpus.num_documents)
        # Where the [SEP] of each document lies: behind its tokens and one [SEP] for each before it.
        ends = self._corpus.document_offsets(first + 1, stop + 1) + np.arange(first, stop)
        positions = np.arange(start, start + self._window)
        which = np.searchsorted(ends, positions)
        is_end = ends[which] == positions
        ids = np.full(self._window, self._tokenizer.sep_id, self._corpus.dtype)
        begin = start - first
        ids[~is_end] = self._corpus.read(begin, begin + int((~is_end).sum()))
        return ids, which - which[0] + 1
