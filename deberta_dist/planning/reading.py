"""What a run reads of its training text: its sources, opened, and how often it goes through each.

The dry run and the start of a run show it.
"""

from fractions import Fraction
from pathlib import Path

from deberta_dist.config import RunConfig
from deberta_dist.data.bucketed_dataset import BucketMixture
from deberta_dist.data.chunks import count_chunks
from deberta_dist.data.sources import CorpusSource, Mixture
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.planning.buckets import describe_buckets, describe_shapes

# Of the only source of a run that names one corpus, data.train.
UNNAMED = "train"


def open_sources(config: RunConfig) -> list[CorpusSource]:
    """The corpora of ``data.train`` or ``data.sources``.

    Raises:
        DataError: as ``open_corpus``.
    """
    data = config.data
    if data.train is not None:
        return [CorpusSource(corpus=open_corpus(data.train))]
    return [
        CorpusSource(corpus=open_corpus(source.path), name=name, proportion=source.proportion, epochs=source.epochs)
        for name, source in data.sources.items()
    ]


def training_paths(config: RunConfig) -> dict[str, Path]:
    """Paths of the training text by their key in ``[data]``."""
    data = config.data
    if data.train is not None:
        return {"train": data.train}
    return {f"sources.{name}.path": source.path for name, source in data.sources.items()}


def reading_block(config: RunConfig) -> list[str]:
    """``describe_reading`` where all of the training text is there already, else nothing or shapes of micro-batches.

    Raises:
        DataError: what is there is no corpus, or too short.
    """
    data = config.data
    if not all(path.exists() for path in training_paths(config).values()):
        return [] if data.bucket_lengths is None else [describe_shapes(config)]
    if data.bucket_lengths is not None:
        sources = open_sources(config)
        sizes = [count_chunks(source.corpus, data.bucket_lengths) for source in sources]
        mixture = BucketMixture(sources, sizes, samples_per_step=config.training.global_batch_size)
        return [describe_reading(config, mixture)]
    mixed = Mixture(open_sources(config), max_seq_length=data.max_seq_length, document_boundaries=data.document_boundaries)
    return [describe_reading(config, mixed)]


def describe_reading(config: RunConfig, mixture: Mixture | BucketMixture) -> str:
    """One line per source (and bucket): its share, its size, and the epochs that ``training.max_steps`` makes of it."""
    if isinstance(mixture, BucketMixture):
        return "\n".join([describe_buckets(config, mixture), *_other_length(config, mixture.num_samples)])
    training = config.training
    consumed = training.max_steps * training.global_batch_size
    width = max(len(name) for name in (*(source.name for source in mixture.sources), "source"))
    lines = [
        f"DATA        {consumed:,} samples of {config.data.max_seq_length} tokens in {training.max_steps:,} steps",
        f"  {'source':<{width}}     share   samples/epoch      epochs",
    ]
    for source, share, place in zip(mixture.sources, mixture.blend.shares, mixture.positions(consumed).values(), strict=True):
        asked = f"  (asked for: {source.epochs:g})" if source.epochs is not None else ""
        name = f"{source.name or UNNAMED:<{width}}"
        lines.append(f"  {name} {float(share):9.3%} {place.num_samples:>15,} {place.epochs:>11,.3f}{asked}")
    return "\n".join([*lines, *_other_length(config, mixture.num_samples)])


def _other_length(config: RunConfig, wanted: Fraction | None) -> list[str]:
    """One line where the run is of another length than the epochs asked for."""
    training = config.training
    consumed = training.max_steps * training.global_batch_size
    if wanted is None or abs(consumed - wanted) < training.global_batch_size:
        return []
    return [
        f"  training.max_steps = {training.max_steps:,} reads {float(consumed / wanted):.3g} times what the epochs "
        f"asked for hold ({float(wanted):,.0f} samples, {float(wanted / training.global_batch_size):,.1f} steps)"
    ]
