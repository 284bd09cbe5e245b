"""Masking and collation beside the published procedure, on the same samples and one thread.

Ours is what a run does for a batch: order, reading, masking, tensors. Numbers are in processor time, and also as
multiples of what a data-parallel rank of the 1.5B run consumes.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.data_inputs import DataInputs
from deberta_dist.operations.measure import BenchmarkError, Sample, interleaved, summary

if TYPE_CHECKING:
    import numpy as np

PUBLISHED, OFFICIAL, UNIFORM = "published procedure", "ours, official", "ours, uniform"
SEQUENCE_LENGTH, MAX_NGRAM = 512, 3
BATCH_SIZE = 256  # sequences of a data-parallel rank per step: 2048 on 8 ranks
GPUS_OF_A_DATA_RANK = 8  # tensor 2 x pipeline 4
MODEL_FLOPS_UTILISATION = 0.4
_MOST_DEVIATION = 5.0  # standard errors between two means


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Flags of this part."""
    parser.add_argument("--samples", type=int, default=1024, help="most samples in a round (default: 1024)")


def run(arguments: argparse.Namespace, inputs: DataInputs) -> dict[str, Any]:
    """Compares the contestants' targets, times them round by round, and returns figures as JSON.

    Raises:
        BenchmarkError: the contestants do not mask the same samples alike.
        DataError: the token file has less than one sample, or is not the tokenizer's.
    """
    # Other parts measure processes that must not inherit torch's memory.
    import numpy as np
    import torch

    from benchmarks.published_masking import PublishedMasking
    from deberta_dist.data.loader import MaskedLMDataset
    from deberta_dist.data.masking import MaskingConfig
    from deberta_dist.data.token_corpus import open_corpus
    from deberta_dist.data.tokenizer import Tokenizer

    torch.set_num_threads(1)
    tokenizer, tokens = Tokenizer(inputs.tokenizer), open_corpus(inputs.tokens)

    def ours(method: str) -> MaskedLMDataset:
        masking = MaskingConfig(method=method, mask_probability=0.15, max_ngram=MAX_NGRAM)
        return MaskedLMDataset(tokens, tokenizer, max_seq_length=SEQUENCE_LENGTH, masking=masking, seed=1)

    official, uniform = ours("official"), ours("uniform")
    count = min(arguments.samples, official.num_samples)
    order = [sample for _, sample in official.samples_at(0, count)]
    length = SEQUENCE_LENGTH - 2
    peer = PublishedMasking(
        [" ".join(tokenizer.pieces(tokens.read(i * length, (i + 1) * length))) for i in range(official.num_samples)],
        pieces=tokenizer.pieces(range(tokenizer.num_tokens)),
        word_starts=tokenizer.pieces(np.flatnonzero(tokenizer.is_word_start)),
        max_length=SEQUENCE_LENGTH,
        max_ngram=MAX_NGRAM,
    )
    starts = range(0, count, BATCH_SIZE)

    def drawn(data: MaskedLMDataset) -> Callable[[], list[Any]]:
        return lambda: [data.batch(start, min(BATCH_SIZE, count - start)) for start in starts]

    def published() -> list[Any]:
        return [peer.batch(order[start : start + BATCH_SIZE]) for start in starts]

    ours_masked = [(batch.input_ids.numpy(), batch.labels.numpy()) for batch in drawn(official)()]
    peer_masked = [(batch["input_ids"].numpy(), batch["labels"].numpy()) for batch in published()]
    compared = compare(
        *(np.concatenate(columns) for columns in zip(*ours_masked, strict=True)),
        *(np.concatenate(columns) for columns in zip(*peer_masked, strict=True)),
        mask_id=tokenizer.mask_id,
    )
    makers = {PUBLISHED: published, OFFICIAL: drawn(official), UNIFORM: drawn(uniform)}
    contestants = {name: _timed(make) for name, make in makers.items()}
    interleaved(contestants, rounds=1)  # warm-up of page cache and allocators
    samples = interleaved(contestants, rounds=arguments.rounds)
    found = summary(samples, against=(PUBLISHED,))
    consumption = consumed_per_second()
    for name, rounds in samples.items():
        found[name] |= rates(rounds, num_tokens=count * SEQUENCE_LENGTH, consumption=consumption)
        found[name]["times_published"] = found[name]["tokens_per_second"] / found[PUBLISHED]["tokens_per_second"]
    print(_describe(found, compared=compared, count=count, consumption=consumption), flush=True)
    return {"samples": count, "agreement": compared, "consumption": consumption, "contestants": found}


def compare(
    input_ids: "np.ndarray",
    labels: "np.ndarray",
    peer_input_ids: "np.ndarray",
    peer_labels: "np.ndarray",
    *,
    mask_id: int,
) -> dict[str, dict[str, float]]:
    """Checks that two procedures mask the same samples, and alike.

    The numbers of every sample are compared by their means: targets, how many of them are ``[MASK]`` and how many
    stay, runs of neighbouring targets, and targets in every tenth of the sample.

    Args:
        input_ids, labels: of one procedure, integers [N, S]; labels are 0 off targets.
        peer_input_ids, peer_labels: of the other.
        mask_id: id of ``[MASK]``.

    Returns:
        By number: both means, and how many standard errors they are apart.

    Raises:
        BenchmarkError: the samples are others, or two means are more than five standard errors apart.
    """
    import numpy as np

    originals = [np.where(there > 0, there, ids) for ids, there in ((input_ids, labels), (peer_input_ids, peer_labels))]
    if originals[0].shape != originals[1].shape or not np.array_equal(*originals):
        raise BenchmarkError("the contestants do not mask the same samples")
    numbers = _numbers(input_ids, labels, mask_id=mask_id)
    peer_numbers = _numbers(peer_input_ids, peer_labels, mask_id=mask_id)
    found = {}
    for name, values in numbers.items():
        others = peer_numbers[name]
        error = max(float(np.sqrt((values.var() + others.var()) / len(values))), 1e-9)
        apart = float(values.mean() - others.mean()) / error
        found[name] = {"ours": float(values.mean()), "published": float(others.mean()), "standard_errors": apart}
        if abs(apart) > _MOST_DEVIATION:
            raise BenchmarkError(
                f"{name} per sample: {values.mean():.3f} of ours, {others.mean():.3f} of the published procedure, "
                f"{abs(apart):.1f} standard errors apart; at most {_MOST_DEVIATION:g} were expected"
            )
    return found


def _numbers(input_ids: "np.ndarray", labels: "np.ndarray", *, mask_id: int) -> dict[str, "np.ndarray"]:
    """What is compared, [N] each."""
    import numpy as np

    is_target = labels > 0
    found = {
        "targets": is_target.sum(axis=1),
        "targets that are [MASK]": (is_target & (input_ids == mask_id)).sum(axis=1),
        "targets that stay": (is_target & (input_ids == labels)).sum(axis=1),
        "runs of targets": (is_target[:, 1:] & ~is_target[:, :-1]).sum(axis=1),
    }
    tenths = np.array_split(is_target[:, 1:-1], 10, axis=1)
    return found | {f"targets in tenth {i + 1}": tenth.sum(axis=1) for i, tenth in enumerate(tenths)}


def consumed_per_second() -> dict[str, float]:
    """Tokens/s that a data-parallel rank of the 1.5B run consumes on 64 GPUs (tensor 2 x pipeline 4 x data 8).

    The GPUs' peak, of which the model's own FLOPs take 40%, divided by the FLOPs of a token. Every GPU's process makes
    the rank's whole batch, on a core of its own: this is the rate one core has to keep up with.
    """
    from deberta_dist.models.flops import PEAK_FLOPS, forward_flops
    from deberta_dist.models.presets import preset

    flops = forward_flops(
        preset("v2-xxlarge"), max_seq_length=SEQUENCE_LENGTH, micro_batch_size=4, mask_probability=0.15
    ).training
    return {gpu: GPUS_OF_A_DATA_RANK * MODEL_FLOPS_UTILISATION * PEAK_FLOPS[gpu] / flops for gpu in ("A100", "H100")}


def rates(rounds: Sequence[Sample], *, num_tokens: int, consumption: Mapping[str, float]) -> dict[str, Any]:
    """Tokens per second of processor time: median, range, multiples of consumption."""
    per_second = [num_tokens / sample.cpu_seconds for sample in rounds]
    median = statistics.median(per_second)
    return {
        "tokens_per_second": median,
        "tokens_per_second_range": [min(per_second), max(per_second)],
        "times_consumption": {gpu: median / consumed for gpu, consumed in consumption.items()},
    }


def _timed(make: Callable[[], list[Any]]) -> Callable[[], Sample]:
    def contestant() -> Sample:
        wall, cpu = time.perf_counter(), time.process_time()
        make()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Sample(time.perf_counter() - wall, time.process_time() - cpu, peak)

    return contestant


def _describe(
    found: Mapping[str, Mapping[str, Any]],
    *,
    compared: Mapping[str, Mapping[str, float]],
    count: int,
    consumption: Mapping[str, float],
) -> str:
    """The comparison in a line, then one contestant a line."""
    targets = compared["targets"]
    worst = max(abs(row["standard_errors"]) for row in compared.values())
    lines = [
        f"masking and collation of {count:,} samples of {SEQUENCE_LENGTH} tokens, one thread, processor time",
        f"  agreement: {targets['ours']:.2f} targets per sample, published {targets['published']:.2f}; "
        f"{len(compared)} means at most {worst:.1f} standard errors apart",
        "  a data-parallel rank of the 1.5B run consumes "
        + ", ".join(f"{rate / 1e3:,.0f}k tokens/s ({GPUS_OF_A_DATA_RANK} {gpu})" for gpu, rate in consumption.items()),
    ]
    for name, row in found.items():
        low, high = (rate / 1e6 for rate in row["tokens_per_second_range"])
        multiples = ", ".join(f"{times:.0f}x {gpu}" for gpu, times in row["times_consumption"].items())
        lines.append(
            f"  {name:<20} {row['tokens_per_second'] / 1e6:6.2f} M tokens/s per core ({low:.2f} to {high:.2f})  "
            f"{row['times_published']:5.1f}x published; of consumption {multiples}"
        )
    return "\n".join(lines)
