"""Relative rows, masks and the gathering of targets."""

import hashlib

import pytest
import torch

from deberta_dist.kernels import RelativePositions
from deberta_dist.models.positions import (
    position_row_of_distance,
    relative_positions,
    visibility,
)

ANCHORS = {0: 0, 1: 1, 127: 127, 128: 128, 129: 129, 131: 131, 132: 131, 140: 137, 160: 149}
ANCHORS |= {192: 166, 256: 192, 300: 207, 384: 229, 448: 243, 500: 254, 506: 255, 511: 255}


def buckets(num_buckets: int, max_distance: int) -> torch.Tensor:
    """Bucket of every distance that clamping leaves."""
    return torch.tensor(position_row_of_distance(num_buckets, max_distance)[1:-1]) - num_buckets


def positions(**settings: int) -> RelativePositions:
    return relative_positions(**settings, device=torch.device("cpu"))


def test_log_buckets_of_the_release():
    table = buckets(256, 512)
    digest = hashlib.sha256(table.to(torch.int16).numpy().astype("<i2").tobytes()).hexdigest()
    assert digest == "8a32a2f2502450fa77c691b0d1308ea1a98607507629d281d68be4d27651ef27"
    for distance, bucket in ANCHORS.items():
        assert table[511 + distance] == bucket
        assert table[511 - distance] == -bucket
    assert table.tolist() == (-table.flip(0)).tolist()


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(8, 64), (16, 64), (256, 512), (256, 1024), (256, 2048)])
def test_buckets_are_those_of_the_published_float32_formula(num_buckets, max_distance):
    distance = torch.arange(-max_distance + 1, max_distance)
    middle = num_buckets // 2
    size = torch.where(distance.abs() < middle, torch.tensor(middle - 1), distance.abs())
    last = torch.log(torch.tensor((max_distance - 1) / middle, dtype=torch.float64)).item()
    logarithmic = torch.ceil(torch.log(size / middle) / last * (middle - 1)) + middle
    expected = torch.where(size <= middle, distance, (logarithmic * distance.sign()).long())
    assert torch.equal(buckets(num_buckets, max_distance), expected)


def test_distances_beyond_the_largest_never_reach_untrained_row_0():
    index = positions(num_buckets=256, max_distance=512).index(1024, 1024)
    assert (index.min(), index.max()) == (1, 511)
    assert torch.all(index[:500, 1012:] == 1) and torch.all(index[1012:, :500] == 511)


def test_without_buckets_every_distance_has_a_row_and_both_ends_are_clamped():
    index = positions(num_buckets=-1, max_distance=4).index(9, 9)
    assert index[8].tolist() == [7, 7, 7, 7, 7, 7, 6, 5, 4]
    assert index[0].tolist() == [4, 3, 2, 1, 0, 0, 0, 0, 0]


def test_positions_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        positions(num_buckets=-1, max_distance=77)
    index = positions(num_buckets=-1, max_distance=77).index(3, 3)
    x = torch.zeros(3, 154, requires_grad=True)
    x.gather(-1, index).sum().backward()
    assert x.grad.sum() == 9


def test_masks():
    tokens = torch.tensor([[1, 1, 0]])
    assert visibility(tokens).visible()[0].int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    documents = torch.tensor([[[1, 0, 0], [0, 1, 1], [0, 1, 1]]])
    assert torch.equal(visibility(documents).visible(), documents.bool())
    assert visibility(documents).seen().tolist() == [[True, True, True]]
    assert visibility(tokens).is_of_padding and not visibility(documents).is_of_padding
    with pytest.raises(ValueError, match="attention_mask has shape"):
        visibility(torch.ones(1, 1, 3, 3))
