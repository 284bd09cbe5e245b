"""Masked batches of one corpus's chunks, by bucket and position within it. Used by ``bucketed_dataset.py``."""

import numpy as np
import torch

from deberta_dist.data.chunks import NUM_SPECIAL, ChunkList
from deberta_dist.data.loader import Batch, mask_sequences
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.sampler import check_seed, samples_at
from deberta_dist.data.token_corpus import TokenCorpus
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError


class ChunkDataset:
    """Chunks of a corpus for masked language modelling: ``[CLS]``, the chunk, ``[SEP]``, padding.

    Positions of a bucket run on through its epochs, each in its own order. The mask of a chunk depends on
    (seed, epoch of its bucket, its first token): not on the lengths of the buckets.
    """

    def __init__(
        self, corpus: TokenCorpus, tokenizer: Tokenizer, *, chunks: ChunkList, masking: MaskingConfig, seed: int
    ) -> None:
        """Of a corpus made with this tokenizer.

        Args:
            tokenizer: the tokenizer it was made with.
            chunks: where this corpus's chunks begin, by bucket.
            masking: how targets are chosen.
            seed: decides the order of every epoch and the masks.

        Raises:
            ConfigError: ``seed`` is outside 0 .. 2**64 - 1.
        """
        self.chunks = chunks
        self._corpus, self._tokenizer = corpus, tokenizer
        self._masking, self._seed = masking, check_seed(seed)

    def batch(self, bucket: int, start: int, count: int) -> Batch:
        """The chunks of a bucket at positions start .. start + count - 1.

        Args:
            bucket: number of the bucket; it is not empty.
            start: first position, from 0.
            count: number of chunks, at least 1.

        Returns:
            A batch of ``count`` sequences of the bucket's length, on the CPU. Safe to call from several threads.

        Raises:
            DataError: the corpus or the list of chunks cannot be read any more, or is damaged.
        """
        sizes = self.chunks.sizes
        epochs, numbers = samples_at(start, count, size=sizes.num_chunks[bucket], seed=self._seed)
        starts, tokens = self.chunks.read(bucket, numbers)
        if (starts + tokens).max() > self._corpus.num_tokens:
            raise DataError(f"{self.chunks.path} is damaged: a chunk ends behind the text; remove it")
        ids = np.full((count, sizes.lengths[bucket]), self._tokenizer.pad_id, self._corpus.dtype)
        ids[:, 0] = self._tokenizer.cls_id
        for row, begin, length in zip(ids, starts.tolist(), tokens.tolist(), strict=True):
            row[1 : length + 1] = self._corpus.read(begin, begin + length)
            row[length + 1] = self._tokenizer.sep_id
        lengths = tokens + NUM_SPECIAL
        input_ids, labels = mask_sequences(
            ids,
            self._tokenizer,
            where=self._corpus.path,
            masking=self._masking,
            seed=self._seed,
            epochs=epochs,
            samples=starts,
            lengths=lengths,
        )
        return Batch(
            input_ids=input_ids,
            attention_mask=torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)),
            labels=labels,
        )
