"""What dynamic batching makes of a text: sequences, steps and padding of every bucket, for the dry run and the log."""

from deberta_dist.config import RunConfig
from deberta_dist.data.bucketed_dataset import BucketMixture


def describe_buckets(config: RunConfig, mixture: BucketMixture) -> str:
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


def describe_shapes(config: RunConfig) -> str:
    """The buckets of a text that is not there yet."""
    shapes = ", ".join(f"{rows:,} x {length:,}" for rows, length in config.micro_batch_shapes)
    return f"DATA        micro-batches (sequences x tokens), each step of one of them: {shapes}"
