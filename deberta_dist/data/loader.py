"""Masked batches from a corpus, by global sample position.

Every pipeline stage and rank of a run calls ``MaskedLMDataset.batch`` with positions only; the same positions
give the same batch everywhere, so nothing has to be sent or stored.

A corpus is cut into windows of tokens that ignore document boundaries or mark them (`Packing`). No list of samples exists:
sample i is found from i alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from deberta_dist.data.masking import MaskingConfig, mask_batch
from deberta_dist.data.sampler import check_seed, samples_at
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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one batch, int64 [B, S] each.

    Attributes:
        input_ids: ids with `[MASK]`, a random id or the original at each target.
        attention_mask: 1 for every token, 0 for padding, of which only shorter sequences of a bucket have any.
        labels: original id of targets, 0 elsewhere.
        document_ids: number of each token's document within its sequence: 1, 2, ... in order, 0 for padding; documents
            do not see each other. None: whatever a sequence holds is one text.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor | None = None


ROWS_MULTIPLE = 128
"""A vocabulary that follows from a tokenizer is a multiple of this: whole tiles of the products with it."""
_MANY_UNUSED = 0.05  # share of the rows that no token uses from which on it is worth a word


def rows_for(num_tokens: int) -> int:
    """Rows of the word embeddings for so many tokens, whatever the layout: rounded up to ``ROWS_MULTIPLE``."""
    return -(-num_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE


def unused_rows(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """One sentence where many of a model's rows belong to no token of its tokenizer, None otherwise."""
    unused, fitting = vocab_size - tokenizer.num_tokens, rows_for(tokenizer.num_tokens)
    if vocab_size <= fitting or unused < _MANY_UNUSED * vocab_size:
        return None
    return (
        f"model.vocab_size = {vocab_size}, but {tokenizer.path} has {tokenizer.num_tokens} tokens ([MASK] included): "
        f"{unused:,} rows ({unused / vocab_size:.0%}) of the word embeddings and of the logits belong to none and cost memory "
        f'and time; model.vocab_size = "auto" makes {fitting}'
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a model whose vocabulary is smaller than the tokenizer's.

    Args:
        vocab_size: rows of the model's word embeddings; more than the tokenizer has is fine.

    Raises:
        DataError: ``vocab_size`` is less than ``tokenizer.num_tokens``.
    """
    if vocab_size < tokenizer.num_tokens:
        raise DataError(
            f"model.vocab_size = {vocab_size} is less than the {tokenizer.num_tokens} tokens of {tokenizer.path} ([MASK] "
            f'included): raise it to at least that; "auto" makes {rows_for(tokenizer.num_tokens)}'
        )


def mask_sequences(
    sequences: np.ndarray,
    tokenizer: Tokenizer,
    *,
    where: Path,
    masking: MaskingConfig,
    seed: int,
    epochs: np.ndarray,
    samples: np.ndarray,
    lengths: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of sequences, int64 [B, S] each.

    Args:
        sequences: ids [B, S].
        tokenizer: says which ids are special and which begin a word.
        where: path of the corpus, for messages.
        masking, seed, epochs, samples, lengths: as for ``mask_batch``; samples are also what the message calls them.

    Raises:
        DataError: an id is outside the vocabulary; with the corpus and the first sample that holds one.
    """
    if sequences.max() >= tokenizer.num_tokens:
        row, _ = np.unravel_index(sequences.argmax(), sequences.shape)
        raise DataError(
            f"{where} is damaged: sample {samples[row]} holds the id {sequences.max()} of {tokenizer.num_tokens}; "
            "prepare the corpus again"
        )
    input_ids, labels = mask_batch(
        sequences,
        is_word_start=tokenizer.is_word_start,
        special_ids=tokenizer.special_ids,
        mask_id=tokenizer.mask_id,
        vocab_size=tokenizer.num_tokens,
        seed=seed,
        epochs=epochs,
        samples=samples,
        config=masking,
        lengths=lengths,
    )
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


class MaskedLMDataset:
    """Samples of a corpus for masked language modelling.

    Sample i is ``[CLS]``, a window of S-2 tokens, ``[SEP]``, with S = max_seq_length, and may span several documents;
    ``Packing`` says how.

    Positions run on through the epochs: position p is the sample at p % num_samples of epoch
    p // num_samples. Its mask depends on (seed, epoch, sample).

    Attributes:
        num_samples: samples of one epoch; the rest behind the last full one is never read.
        num_dropped_tokens: tokens behind the last full sample.
        max_seq_length: tokens per sample, S.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        tokenizer: Tokenizer,
        *,
        max_seq_length: int,
        masking: MaskingConfig,
        seed: int,
        shuffle: bool = True,
        document_boundaries: bool = False,
    ) -> None:
        """Checks that corpus and tokenizer belong together.

        Args:
            tokenizer: the tokenizer it was made with.
            max_seq_length: tokens per sample, ``[CLS]`` and ``[SEP]`` included.
            masking: how targets are chosen.
            seed: decides the order of every epoch and the masks.
            shuffle: every epoch in its own order; otherwise in the order of the text.
            document_boundaries: documents of a sample are separated and do not see each other.

        Raises:
            ConfigError: ``max_seq_length`` is less than 3 or ``seed`` outside 0 .. 2**64 - 1.
            DataError: the corpus was made with another tokenizer, or has less than one sample.
        """
        corpus.require_tokenizer(tokenizer)
        self.max_seq_length = max_seq_length
        self._packing = Packing(corpus, tokenizer, max_seq_length=max_seq_length, document_boundaries=document_boundaries)
        self.num_samples, self.num_dropped_tokens = self._packing.num_samples, self._packing.num_dropped_tokens
        self.corpus = corpus
        self._tokenizer = tokenizer
        self._masking = masking
        self._seed = check_seed(seed)
        self._shuffle = shuffle

    def samples_at(self, start: int, count: int) -> list[tuple[int, int]]:
        """(epoch, sample) at global positions start .. start + count - 1."""
        epochs, samples = self._samples_at(start, count)
        return list(zip(epochs.tolist(), samples.tolist(), strict=True))

    def _samples_at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return samples_at(start, count, size=self.num_samples, seed=self._seed if self._shuffle else None)

    def batch(self, start: int, count: int) -> Batch:
        """The samples at global positions start .. start + count - 1.

        Args:
            start: first position, from 0: the number of samples consumed before.
            count: number of samples, at least 1.

        Returns:
            A batch of ``count`` sequences, on the CPU. Safe to call from several threads.

        Raises:
            DataError: the corpus holds an id outside the vocabulary, hence is damaged.
        """
        assert start >= 0 and count >= 1
        epochs, samples = self._samples_at(start, count)
        sequences, documents = self._packing.sequences(samples)
        input_ids, labels = mask_sequences(
            sequences,
            self._tokenizer,
            where=self.corpus.path,
            masking=self._masking,
            seed=self._seed,
            epochs=epochs,
            samples=samples,
        )
        return Batch(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            labels=labels,
            document_ids=None if documents is None else torch.from_numpy(documents),
        )
