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
    """``describe_reading`` if all of the training text exists; otherwise nothing, or shapes of micro-batches.

    Raises:
        DataError: a text is not a corpus, or too short.
    """
    data = config.data
    if not all(path.exists() for path in training_paths(config).values()):
        return [] if data.bucket_lengths is None else [_describe_shapes(config)]
    if data.bucket_lengths is not None:
        sources = open_sources(config)
        sizes = [count_chunks(source.corpus, data.bucket_lengths) for source in sources]
        mixture = BucketMixture(sources, sizes, samples_per_step=config.training.global_batch_size)
        return [describe_reading(config, mixture)]
    sizes = {"max_seq_length": data.max_seq_length, "document_boundaries": data.document_boundaries}
    return [describe_reading(config, Mixture(open_sources(config), **sizes))]


def describe_reading(config: RunConfig, mixture: Mixture | BucketMixture) -> str:
    """One line per source (and bucket): its share, its size, and the epochs that ``training.max_steps`` makes of it."""
    if isinstance(mixture, BucketMixture):
        return "\n".join([_describe_buckets(config, mixture), *_other_length(config, mixture.num_samples)])
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


def _describe_buckets(config: RunConfig, mixture: BucketMixture) -> str:
    """One line per source and bucket, with the epochs that ``training.max_steps`` makes of it."""
    training = config.training
    consumed = training.max_steps * training.global_batch_size
    positions = mixture.positions(consumed)
    width = max(len("bucket"), *map(len, positions))
    lines = [
        f"DATA        {training.max_steps:,} steps of {training.global_batch_size * config.data.max_seq_length:,} tokens, "
        "padding included, each of one bucket",
        f"  {'bucket':<{width}}   in a micro-batch   sequences/epoch   padding      epochs",
    ]
    real = 0.0
    for bucket, (rows, _) in enumerate(config.micro_batch_shapes):
        for number, sizes in enumerate(mixture.sizes):
            if (place := positions.get(mixture.name(number, bucket))) is not None:
                lines.append(
                    f"  {mixture.name(number, bucket):<{width}} {rows:>18,} {place.num_samples:>17,} "
                    f"{sizes.padding(bucket):>9.1%} {place.epochs:>11,.3f}"
                )
                real += float(mixture.shares[number]) * sizes.room[bucket] / sum(sizes.room) * (1 - sizes.padding(bucket))
    steps = ", ".join(
        f"{length}: {float(share):.1%}" for length, share in zip(mixture.lengths, mixture.bucket_shares, strict=True)
    )
    lines.append(f"  steps of each length: {steps}; padding in all: {1 - real:.1%}")
    for bucket, length in enumerate(mixture.lengths):
        count, wanted = sum(sizes.num_chunks[bucket] for sizes in mixture.sizes), mixture.sequences_per_step(bucket)
        if 0 < count < wanted:
            lines.append(
                f"  {length}: a step takes {wanted:,} sequences, an epoch has {count:,}, so some come several times in one "
                "step;\n    leave this length out of data.bucket_lengths"
            )
    return "\n".join(lines)


def _describe_shapes(config: RunConfig) -> str:
    """The buckets of a text that is not there yet."""
    shapes = ", ".join(f"{rows:,} x {length:,}" for rows, length in config.micro_batch_shapes)
    return f"DATA        micro-batches (sequences x tokens), each step of one of them: {shapes}"


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
