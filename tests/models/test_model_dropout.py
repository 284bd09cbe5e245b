"""Keyed dropout: determinism, rate, independence of sites and shards."""

import pytest
import torch

from deberta_dist.models.dropout import Dropout, mix_key


def kept(dropout: Dropout, key: int, count: int = 40_000) -> torch.Tensor:
    return dropout(torch.ones(count), key) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    dropout = Dropout(p, site=0)
    y = dropout(torch.ones(1_000_001), 5)
    assert abs((y == 0).float().mean() - p) < 5 * (p * (1 - p) / 1e6) ** 0.5
    dropped = round(p * 65536)
    assert torch.all((y == 0) | (y == torch.tensor(65536 / (65536 - dropped))))


def test_mask_is_a_function_of_key_site_and_shard():
    first = Dropout(0.5, site=1)
    assert torch.equal(kept(first, 7), kept(Dropout(0.5, site=1), 7))
    shard = Dropout(0.5, site=1)
    shard.shard = 1
    for other in (kept(first, 8), kept(Dropout(0.5, site=2), 7), kept(shard, 7)):
        agreement = (kept(first, 7) == other).float().mean()
        assert abs(agreement - 0.5) < 0.02


def test_a_key_does_not_touch_the_global_random_state():
    state = torch.get_rng_state()
    Dropout(0.5, site=0)(torch.ones(10), 3)
    assert torch.equal(state, torch.get_rng_state())


def test_without_a_key_the_global_random_state_decides():
    dropout = Dropout(0.5, site=0)
    torch.manual_seed(1)
    first = dropout(torch.ones(1000), None)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(torch.ones(1000), None))
    assert not torch.equal(first, dropout(torch.ones(1000), None))


def test_gradient_has_the_same_mask_and_scale():
    x = torch.ones(3, 5, 7, requires_grad=True)
    y = Dropout(0.3, site=0)(x, 1)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("shape", [(3, 8, 5), (1, 4, 3), (2, 12, 1)])
def test_parts_of_a_sequence_get_their_parts_of_the_mask(shape):
    whole = Dropout(0.5, site=2)
    expected = whole(torch.ones(shape), 9)
    for parts in (1, 2, 4):
        found = []
        for number in range(parts):
            part = Dropout(0.5, site=2)
            part.sequence_shard = (number, parts)
            found.append(part(torch.ones(shape[0], shape[1] // parts, shape[2]), 9))
        assert torch.equal(torch.cat(found, dim=1), expected)


def test_views_of_any_layout_get_the_mask_of_their_shape():
    x = torch.ones(6, 8)
    dropout = Dropout(0.5, site=0)
    assert torch.equal(dropout(x.t(), 1), dropout(x.t().contiguous(), 1))


def test_identity_in_evaluation_and_at_zero():
    x = torch.randn(4)
    assert Dropout(0.5, site=0).eval()(x, 1) is x
    assert Dropout(0.0, site=0)(x, 1) is x


def test_mixed_keys_are_64_bit_and_distinct_in_every_argument_and_order():
    arguments = [(0,), (1,), (0, 0), (0, 1), (1, 0)]
    keys = {mix_key(seed, *numbers) for seed in range(4) for numbers in arguments}
    assert len(keys) == 4 * 5
    assert all(0 <= key < 2**64 for key in keys)
    assert mix_key(3, 1, 2) == mix_key(mix_key(3, 1), 2)
    # Pinned: a resumed run of a later version has to draw the same masks.
    assert mix_key(0, 0) == 0xA706DD2F4D197E6F
