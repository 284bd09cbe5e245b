"""The most bytes that one real step holds, counted storage by storage."""

from typing import Any

import torch

from deberta_dist.data.loader import Batch
from deberta_dist.planning.activations import LiveBytes
from deberta_dist.planning.memory import expected_targets
from deberta_dist.training.trainer import Trainer
from tests.integration.parallel_run import LEARNING_RATE, Case, own_batch


def even_batch(case: Case, bucket: int) -> Batch:
    """Sequences with the expected number of targets, and a token of padding: without any, a CPU skips the mask."""
    batch = own_batch(case, step=bucket)
    labels = torch.zeros_like(batch.labels)
    labels[:, 1 : 1 + expected_targets(case.run_config(), length=labels.shape[1])] = 5
    attention_mask = torch.ones_like(batch.attention_mask)
    attention_mask[:, -1] = 0
    return Batch(input_ids=batch.input_ids, attention_mask=attention_mask, labels=labels)


def step_peaks(trainer: Trainer, case: Case) -> dict[str, int]:
    """Bytes that a step adds to what is there between steps: in its micro-batches, and after them.

    The least of several steps: gloo's threads let go of a collective's message a moment after it has arrived, in some
    steps later than in others. The most of all buckets.
    """
    least: dict[str, list[int]] = {"in_micro_batches": [], "in_reduction": []}
    for bucket in range(len(case.buckets)):
        found = [_peaks_of_one_step(trainer, even_batch(case, bucket), step=step) for step in range(9, 13)]
        for name, values in least.items():
            values.append(min(peaks[name] for peaks in found))
    return {name: max(values) for name, values in least.items()}


def _peaks_of_one_step(trainer: Trainer, batch: Batch, *, step: int) -> dict[str, int]:
    model, peaks = trainer.parts.sharded_model, {}
    reduce_ties = model.reduce_ties

    def look_and_collect() -> Any:
        peaks["in_micro_batches"], live.peak = live.peak, live.now
        return reduce_ties()

    model.reduce_ties = look_and_collect
    with LiveBytes() as live:
        # As copied to a device.
        ids, mask = batch.input_ids.clone(), batch.attention_mask.clone()
        here = Batch(input_ids=ids, attention_mask=mask, labels=batch.labels)
        trainer.step(here, step=step, learning_rate=LEARNING_RATE)
    peaks["in_reduction"] = live.peak
    model.reduce_ties = reduce_ties
    return peaks
