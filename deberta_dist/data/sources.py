"""What a run trains on: one corpus, or a blend of several sources, by global sample position.

Every pipeline stage and rank of a run calls ``BlendedDataset.batch`` with positions only, as with one corpus::

    position -> source (Blend) -> number among the source's samples -> epoch, index -> sample (Permutation)

Each source has its own order and masks, of a seed made of the run's and its name: to add, leave out or weigh another
source changes which positions a source has, never the sequence of its samples. No sample is lost or repeated: the first
k x num_samples samples that a source gives are every sample of it k times, epoch after epoch.

All of it follows from the sources, the seed and the number of samples consumed, so the sequence is the same for every
number of ranks and after every resume, and nothing about it is stored. That holds for one set of sources: with another
one the same number of samples would be other samples. A run therefore keeps its sources
(``training/resume.py`` refuses others).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import torch

from deberta_dist.data.blend import Blend
from deberta_dist.data.loader import Batch, MaskedLMDataset, count_samples
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.sampler import check_seed, position
from deberta_dist.data.token_corpus import TokenCorpus
from deberta_dist.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """A corpus and how much of it is read, in exactly one of two ways, the same for all sources of a run.

    Attributes:
        name: its name in the configuration; "" for the only one of a run, which keeps the run's own seed.
        proportion: its share of the samples, in any unit.
        epochs: how often it is read while the others are read as often as theirs say.
    """

    corpus: TokenCorpus
    name: str = ""
    proportion: float | None = None
    epochs: float | None = None


@dataclass(frozen=True, kw_only=True)
class SourcePosition:
    """Where in a source a run is.

    Attributes:
        epoch: times it was read in full.
        index: samples read of this epoch.
        num_samples: samples of one epoch of this source.
    """

    epoch: int
    index: int
    num_samples: int

    @property
    def epochs(self) -> float:
        """Epochs read, with the share of this one that is read."""
        return self.epoch + self.index / self.num_samples


def source_weights(sources: Sequence[CorpusSource], sizes: Sequence[int]) -> list[Fraction]:
    """What the sources are read in proportion to.

    Args:
        sources: all with a proportion, or all with epochs; a single one needs neither.
        sizes: of an epoch of each, in any unit.
    """
    if len(sources) == 1:
        return [Fraction(1)]
    weights = []
    for source, size in zip(sources, sizes, strict=True):
        assert (source.proportion is None) != (source.epochs is None) == (sources[0].epochs is None)
        # As it is written: 0.3 is three tenths, not the nearest binary fraction.
        weights.append(Fraction(str(source.proportion)) if source.epochs is None else Fraction(str(source.epochs)) * size)
    return weights


class Mixture:
    """How the samples of a run are shared among its sources. Knows their sizes and reads nothing of them.

    Attributes:
        sources: by name, so that the order in a file does not matter.
        sizes: samples per epoch of each.
        blend: which source is read where.
    """

    def __init__(self, sources: Sequence[CorpusSource], *, max_seq_length: int, document_boundaries: bool = False) -> None:
        """Counts samples.

        Args:
            sources: at least one, each with another name.
            max_seq_length: tokens per sample, ``[CLS]`` and ``[SEP]`` included.
            document_boundaries: documents of a sample are separated.

        Raises:
            ConfigError: as ``count_samples``.
            DataError: as ``count_samples``.
        """
        assert sources and len({source.name for source in sources}) == len(sources)
        self.sources = tuple(sorted(sources, key=lambda source: source.name))
        self.sizes = [
            count_samples(source.corpus, max_seq_length=max_seq_length, document_boundaries=document_boundaries)[0]
            for source in self.sources
        ]
        self.blend = Blend(source_weights(self.sources, self.sizes))

    @property
    def shares(self) -> list[Fraction]:
        """Share of each source in the samples."""
        return self.blend.shares

    @property
    def num_samples(self) -> Fraction | None:
        """Samples of all sources at their epochs; None where proportions are given."""
        if self.sources[0].epochs is None:
            return None
        pairs = zip(self.sources, self.sizes, strict=True)
        return sum((Fraction(str(source.epochs)) * size for source, size in pairs), Fraction(0))

    def positions(self, consumed: int) -> dict[str, SourcePosition]:
        """Where each source is, by name, after ``consumed`` samples of the run."""
        found = {}
        for source, size, given in zip(self.sources, self.sizes, self.blend.consumed(consumed), strict=True):
            epoch, index = position(given, size)
            found[source.name] = SourcePosition(epoch=epoch, index=index, num_samples=size)
        return found


def source_seed(seed: int, name: str) -> int:
    """Seed of a source's order and masks, 0 to 2**64 - 1: the run's own for a corpus without a name.

    Raises:
        ConfigError: ``seed`` is outside that range.
    """
    check_seed(seed)
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") if name else seed


class BlendedDataset:
    """Samples of several sources for masked language modelling; of one without a name, those of ``MaskedLMDataset``.

    Attributes:
        mixture: what is read, and where.
    """

    def __init__(
        self,
        sources: Sequence[CorpusSource],
        tokenizer: Tokenizer,
        *,
        max_seq_length: int,
        masking: MaskingConfig,
        seed: int,
        document_boundaries: bool = False,
    ) -> None:
        """Checks that sources and tokenizer belong together.

        Args:
            sources: the corpora, at least one, each with another name.
            tokenizer: the tokenizer they were made with.
            max_seq_length: tokens per sample, ``[CLS]`` and ``[SEP]`` included.
            masking: how targets are chosen.
            seed: the run's seed; each source derives its own from it and its name.
            document_boundaries: documents of a sample are separated and do not see each other.

        Raises:
            ConfigError: as ``MaskedLMDataset``.
            DataError: as ``MaskedLMDataset``.
        """
        self.mixture = Mixture(sources, max_seq_length=max_seq_length, document_boundaries=document_boundaries)
        self._datasets = [
            MaskedLMDataset(
                source.corpus,
                tokenizer,
                max_seq_length=max_seq_length,
                masking=masking,
                seed=source_seed(seed, source.name),
                document_boundaries=document_boundaries,
            )
            for source in self.mixture.sources
        ]

    def batch(self, start: int, count: int) -> Batch:
        """The samples at global positions of the blend; arguments, result and errors are `MaskedLMDataset.batch`'s."""
        if len(self._datasets) == 1:
            return self._datasets[0].batch(start, count)
        sources = torch.tensor(self.mixture.blend.sources_at(start, count))
        # Positions in a row are, of each source, samples in a row.
        firsts = self.mixture.blend.consumed(start)
        rows, batches = [], []
        for number in sources.unique().tolist():
            rows.append(torch.nonzero(sources == number)[:, 0])
            batches.append(self._datasets[number].batch(firsts[number], len(rows[-1])))
        return in_order(batches, torch.cat(rows))


def in_order(batches: Sequence[Batch], rows: torch.Tensor) -> Batch:
    """One batch whose row ``rows[i]`` is row i of the batches one after another."""
    order = torch.argsort(rows)

    def column(name: str) -> Any:
        tensors = [getattr(batch, name) for batch in batches]
        return None if tensors[0] is None else torch.cat(tensors)[order]

    return Batch(**{field.name: column(field.name) for field in fields(Batch)})
