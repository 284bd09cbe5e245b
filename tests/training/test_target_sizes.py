"""Few sizes of targets, little padding, room for every micro-batch."""

import numpy as np
import pytest
import torch

from deberta_dist.planning.plan import check_plan
from deberta_dist.training.inputs import open_data
from deberta_dist.training.target_sizes import NUM_SIZES, TargetSizes, count_targets, num_sampled
from tests.training.conftest import MakeRun


def labels_of(counts: np.ndarray, length: int) -> torch.Tensor:
    return (torch.arange(length)[None] < torch.from_numpy(counts)[:, None]).long()


def drawn_counts(count: int, length: int, *, in_buckets: bool, seed: int) -> np.ndarray:
    """As masking has them: a quota of 15% and the rest of the last word."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(length // 2 + 1, length + 1, count) if in_buckets else np.full(count, length)
    return np.minimum(np.maximum(1, np.round(0.15 * lengths)) + draw.geometric(0.6, count) - 1, lengths).astype(int)


@pytest.mark.parametrize(
    ("batch", "length", "in_buckets"),
    [(16, 512, False), (4, 512, False), (1, 512, False), (2, 4096, False), (16, 512, True), (32, 256, True), (256, 32, True)],
)
def test_at_most_four_sizes_and_a_twentieth_of_padding(batch: int, length: int, in_buckets: bool) -> None:
    sample = drawn_counts(num_sampled(batch), length, in_buckets=in_buckets, seed=1)
    sizes = TargetSizes({(batch, length): sample})
    assert 1 <= len(sizes[batch, length]) <= NUM_SIZES
    real = padded = 0
    for counts in drawn_counts(300 * batch, length, in_buckets=in_buckets, seed=2).reshape(300, batch):
        width, number = size = sizes.of(labels_of(counts, length) > 0)
        assert size in sizes[batch, length], "a micro-batch beyond the largest size"
        assert width >= counts.max() and number >= counts.sum() and width <= length
        real, padded = real + counts.sum(), padded + number
    assert 1 - real / padded <= 0.05
    assert sizes.padded_share() <= 0.05


def test_more_targets_than_any_size_are_taken_as_they_are() -> None:
    sizes = TargetSizes({(2, 64): [5] * 64})
    assert sizes.of(torch.ones(2, 64, dtype=torch.bool)) == (64, 128)
    assert sizes.of(torch.zeros(2, 64, dtype=torch.bool)) == sizes[2, 64][0]


def test_a_shape_that_was_not_sampled_is_not_padded() -> None:
    sizes = TargetSizes({(2, 64): [5] * 64, (4, 32): []})
    assert sizes.of(labels_of(np.array([1, 2, 0, 4]), 32) > 0) == (4, 7)


@pytest.mark.parametrize("buckets", [None, (8, 16, 32)])
def test_sizes_of_a_run_are_of_its_text_and_masking(make_run: MakeRun, buckets: tuple[int, ...] | None) -> None:
    plan = check_plan(make_run(data={"bucket_lengths": buckets}), world_size=1)
    data, shapes = open_data(plan), plan.config.micro_batch_shapes
    train, held_out = data.target_sizes(shapes)
    assert data.target_sizes(shapes)[0][shapes[-1]] == train[shapes[-1]], "every rank finds the same"
    size = plan.config.training.global_batch_size
    for step in range(4):
        batch = data.train.batch(step * size, size)
        rows = batch.labels.chunk(plan.config.training.num_micro_batches)
        assert all(train.of(labels > 0) in train[tuple(labels.shape)] for labels in rows)
    assert len(held_out[shapes[-1]]) <= NUM_SIZES
    assert sum(count_targets(batch.labels)) == int((batch.labels > 0).sum())
