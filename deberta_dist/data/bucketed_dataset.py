"""Dynamic batching: every batch holds sequences of similar length, and all batches have the same number of tokens.

A step belongs to one bucket, so that all its micro-batches have one shape on every rank::

    step -> bucket (Blend) -> sequences of the bucket, each of one source (Blend) -> its chunks (``chunk_dataset.py``)

Every source has, for every bucket, an endless order of its chunks, epoch after epoch. A step of the bucket takes the
next ones; what does not fill a step at the end of an epoch is taken by the step that begins the next. So no chunk is
lost or repeated, and as steps are shared in proportion to tokens, padding included, the buckets of a source end their
epochs together.

All of it follows from sources, lengths, seed and the number of the step: it is the same for every number of ranks and
after every resume, and nothing about it is stored. ``BucketedDataset`` takes the place of ``BlendedDataset``.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch

from deberta_dist.data.blend import Blend
from deberta_dist.data.chunk_dataset import ChunkDataset
from deberta_dist.data.chunks import BucketSizes, open_chunks
from deberta_dist.data.loader import Batch
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.sampler import position
from deberta_dist.data.sources import CorpusSource, SourcePosition, in_order, source_seed, source_weights
from deberta_dist.data.tokenizer import Tokenizer


class BucketMixture:
    """How the steps of a run are shared among buckets, and their sequences among sources. Reads nothing.

    A sample is as many tokens, padding included, as the longest sequence has: positions are counted in them.

    Attributes:
        lengths: tokens of the buckets' sequences, ascending.
        sources: by name, so that the order in a file does not matter.
        sizes: what the buckets of each source hold.
        shares: of each source in the tokens, padding included.
        bucket_shares: share of the run's steps that each bucket has; 0 for an empty one.
        samples_per_step: sequences of the longest bucket's steps.
    """

    def __init__(self, sources: Sequence[CorpusSource], sizes: Sequence[BucketSizes], *, samples_per_step: int) -> None:
        """Weighs buckets and sources.

        Args:
            sources: at least one, each with another name.
            sizes: of each, for the same lengths.
            samples_per_step: sequences of the longest bucket's steps; those of others are a whole number, too.
        """
        pairs = sorted(zip(sources, sizes, strict=True), key=lambda pair: pair[0].name)
        self.sources = tuple(source for source, _ in pairs)
        self.sizes = tuple(size for _, size in pairs)
        self.lengths = self.sizes[0].lengths
        self.samples_per_step = samples_per_step
        rooms = [size.room for size in self.sizes]
        weights = source_weights(self.sources, [sum(room) for room in rooms])
        self.shares = [weight / sum(weights) for weight in weights]
        # Of every bucket, the weight of each source that has something in it.
        weights_by_bucket = [
            {s: weights[s] * room[bucket] / sum(room) for s, room in enumerate(rooms) if room[bucket]}
            for bucket in range(len(self.lengths))
        ]
        self._used = [bucket for bucket, weight_by_source in enumerate(weights_by_bucket) if weight_by_source]
        self._order = Blend([sum(weights_by_bucket[bucket].values()) for bucket in self._used])
        self._among = {
            bucket: (list(weights_by_bucket[bucket]), Blend(list(weights_by_bucket[bucket].values()))) for bucket in self._used
        }
        shares = dict(zip(self._used, self._order.shares, strict=True))
        self.bucket_shares = [shares.get(bucket, 0) for bucket in range(len(self.lengths))]

    @property
    def num_samples(self) -> Fraction | None:
        """Samples of all sources at their epochs; None where none are given."""
        if self.sources[0].epochs is None:
            return None
        pairs = zip(self.sources, self.sizes, strict=True)
        tokens = sum((Fraction(str(source.epochs)) * sum(size.room) for source, size in pairs), Fraction(0))
        return tokens / self.lengths[-1]

    def sequences_per_step(self, bucket: int) -> int:
        """Sequences of a step of a bucket."""
        return self.samples_per_step * self.lengths[-1] // self.lengths[bucket]

    def at(self, step: int) -> tuple[int, int]:
        """Bucket of a step, and how many sequences the steps before it have taken of that bucket."""
        number = self._order.sources_at(step, 1)[0]
        bucket = self._used[number]
        return bucket, self._order.consumed(step)[number] * self.sequences_per_step(bucket)

    def sources_at(self, bucket: int, start: int, count: int) -> tuple[list[int], dict[int, int]]:
        """Source of every sequence ``start`` .. ``start + count - 1`` of a bucket, and how many each gave before."""
        sources, blend = self._among[bucket]
        given = dict(zip(sources, blend.consumed(start), strict=True))
        return [sources[number] for number in blend.sources_at(start, count)], given

    def positions(self, consumed: int) -> dict[str, SourcePosition]:
        """Where each source is in each bucket that it has, ``source/length``, after ``consumed`` samples."""
        found = {}
        for bucket, steps in zip(self._used, self._order.consumed(self.whole_steps(consumed)), strict=True):
            _, given = self.sources_at(bucket, steps * self.sequences_per_step(bucket), 0)
            for source, count in given.items():
                size = self.sizes[source].num_chunks[bucket]
                epoch, index = position(count, size)
                name = self.name(source, bucket)
                found[name] = SourcePosition(epoch=epoch, index=index, num_samples=size)
        return found

    def whole_steps(self, consumed: int) -> int:
        """Steps that ``consumed`` samples are, a begun one counted."""
        return -(-consumed // self.samples_per_step)

    def name(self, source: int, bucket: int) -> str:
        """``source/length``; the length alone for a source without a name."""
        return f"{self.sources[source].name}/{self.lengths[bucket]}".removeprefix("/")


class BucketedDataset:
    """Batches for masked language modelling, all sequences of a step from one bucket.

    Attributes:
        mixture: what is read, and where.
        samples_per_step: sequences of the longest bucket's steps.
    """

    def __init__(
        self,
        sources: Sequence[CorpusSource],
        tokenizer: Tokenizer,
        *,
        lengths: Sequence[int],
        samples_per_step: int,
        masking: MaskingConfig,
        seed: int,
        index_directory: Path | None = None,
    ) -> None:
        """Opens the list of chunks of every source, or makes it.

        Args:
            sources: the corpora, at least one, each with another name.
            tokenizer: the tokenizer they were made with.
            lengths: of the buckets, tokens, ascending.
            samples_per_step: sequences of the longest bucket's steps.
            masking: how targets are chosen.
            seed: the run's seed; each source derives its own from it and its name.
            index_directory: see ``open_chunks``.

        Raises:
            ConfigError: as ``open_chunks``, or ``seed`` is outside 0 .. 2**64 - 1.
            DataError: as ``open_chunks``, or a corpus was made with another tokenizer.
        """
        for source in sources:
            source.corpus.require_tokenizer(tokenizer)
        chunks = {source.name: open_chunks(source.corpus, lengths, directory=index_directory) for source in sources}
        self.mixture = BucketMixture(
            sources, [chunks[source.name].sizes for source in sources], samples_per_step=samples_per_step
        )
        self.samples_per_step = samples_per_step
        self._datasets = [
            ChunkDataset(
                source.corpus,
                tokenizer,
                chunks=chunks[source.name],
                masking=masking,
                seed=source_seed(seed, source.name),
            )
            for source in self.mixture.sources
        ]

    def batch(self, start: int, count: int) -> Batch:
        """The sequences of a step, or of an equal share of it, that has one shape.

        Args:
            start: samples before it: whole steps, and whole shares.
            count: samples of the share: a divisor of the step's.

        Returns:
            A batch of the step's bucket, ``count`` x its longest length tokens, on the CPU. Safe to call from several
            threads.

        Raises:
            DataError: as ``ChunkDataset.batch``.
        """
        step, offset = divmod(start, self.samples_per_step)
        share, misfit = divmod(offset, count)
        assert misfit == 0 and self.samples_per_step % count == 0, "a batch is a share of one step"
        bucket, before = self.mixture.at(step)
        rows, misfit = divmod(self.mixture.sequences_per_step(bucket) * count, self.samples_per_step)
        assert misfit == 0, "a micro-batch's tokens are a multiple of every length"
        batch = self.of_bucket(bucket, before + share * rows, rows)
        assert batch is not None, "no step is of an empty bucket"
        return batch

    def of_bucket(self, bucket: int, start: int, count: int) -> Batch | None:
        """The sequences of a bucket at positions start .. start + count - 1 of it; None if it is empty.

        Raises:
            DataError: as ``ChunkDataset.batch``.
        """
        if self.mixture.bucket_shares[bucket] == 0:
            return None
        sources, firsts = self.mixture.sources_at(bucket, start, count)
        numbers, rows, batches = torch.tensor(sources), [], []
        for number in numbers.unique().tolist():
            rows.append(torch.nonzero(numbers == number)[:, 0])
            batches.append(self._datasets[number].batch(bucket, firsts[number], len(rows[-1])))
        return in_order(batches, torch.cat(rows))
